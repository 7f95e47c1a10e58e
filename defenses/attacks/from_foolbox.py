"""The attacks that foolbox runs."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run


def _fgsm(parameters: Mapping[str, float]) -> Run:
    return lambda model, x, y: _foolbox(model, x, y, "FGSM", parameters["epsilon"])[0]


def _pgd(parameters: Mapping[str, float]) -> Run:
    options = {"abs_stepsize": parameters["step_size"], "steps": parameters["steps"]}
    return lambda model, x, y: _foolbox(model, x, y, "LinfPGD", parameters["epsilon"], **options)[0]


def _deepfool(parameters: Mapping[str, float]) -> Run:
    return lambda model, x, y: _minimal(model, x, y, "L2DeepFoolAttack", **parameters)


def _cw(parameters: Mapping[str, float]) -> Run:
    options = {_CW_NAMES.get(name, name): value for name, value in parameters.items()}
    return lambda model, x, y: _minimal(model, x, y, "L2CarliniWagnerAttack", **options)


_CW_NAMES = MappingProxyType({"searches": "binary_search_steps", "step_size": "stepsize"})


def _minimal(model: nn.Module, x: Tensor, y: Tensor, name: str, **options: float) -> Tensor:
    """Run an attack that looks for the least distance; an image on which it finds nothing comes back unchanged."""
    x_adv, success = _foolbox(model, x, y, name, None, **options)
    # Where it finds nothing C&W gives a black image, which may well be misclassified.
    found = success & x_adv.flatten(1).any(1)
    return torch.where(found.reshape(-1, 1, 1, 1), x_adv, x)


def _foolbox(
    model: nn.Module, x: Tensor, y: Tensor, name: str, epsilon: float | None, **options: float
) -> tuple[Tensor, Tensor]:
    """Return the images of an attack of that library's and (N,) whether each fools the model."""
    from foolbox import attacks
    from foolbox.models.pytorch import PyTorchModel

    wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
    _, x_adv, success = getattr(attacks, name)(**options)(wrapped, x, y, epsilons=epsilon)
    return x_adv, success


FROM_FOOLBOX: Mapping[str, Entry] = MappingProxyType(
    {
        "fgsm": Entry({"epsilon": 5 / 255}, _fgsm, Facts("linf", "gradients", 2, "Goodfellow et al. 2015")),
        "pgd": Entry(
            {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10},
            _pgd,
            Facts("linf", "gradients", 20, "Madry et al. 2018"),
        ),
        "deepfool": Entry(
            {"steps": 50, "overshoot": 0.02}, _deepfool, Facts("l2", "gradients", 550, "Moosavi-Dezfooli et al. 2016")
        ),
        "cw": Entry(
            {"searches": 5, "steps": 200, "confidence": 0.0, "step_size": 0.01, "initial_const": 1e-3},
            _cw,
            Facts("l2", "gradients", 2000, "Carlini and Wagner 2017"),
        ),
    }
)
"""FGSM, PGD in an L-infinity ball, DeepFool and C&W.

DeepFool and C&W look for the least L2 distance and end on the classifier's boundary: after rounding to 8 bits few of
their examples still fool it. C&W ends a search early once a whole batch makes no progress, so that its examples depend
a little on which images share a batch.
"""

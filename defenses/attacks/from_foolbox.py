"""The attacks that foolbox runs."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run
from defenses.attacks.isolation import frozen

if TYPE_CHECKING:
    from foolbox.attacks.base import AttackWithDistance


def _fgsm(parameters: Mapping[str, float]) -> Run:
    return lambda model, x, y: _foolbox(model, x, y, "FGSM", parameters["epsilon"])


def _bim(parameters: Mapping[str, float]) -> Run:
    options = _stepping(parameters)
    return lambda model, x, y: _foolbox(model, x, y, "LinfBasicIterativeAttack", parameters["epsilon"], **options)


def _mi_fgsm(parameters: Mapping[str, float]) -> Run:
    options = {**_stepping(parameters), "momentum": parameters["momentum"]}
    return lambda model, x, y: _run(model, x, y, _momentum_attack(**options), parameters["epsilon"])


def _pgd(parameters: Mapping[str, float]) -> Run:
    options = _stepping(parameters)
    return lambda model, x, y: _foolbox(model, x, y, "LinfPGD", parameters["epsilon"], **options)


def _stepping(parameters: Mapping[str, float]) -> dict[str, float]:
    return {"abs_stepsize": parameters["step_size"], "steps": parameters["steps"]}


def _deepfool(parameters: Mapping[str, float]) -> Run:
    return lambda model, x, y: _minimal(model, x, y, "L2DeepFoolAttack", **parameters)


def _cw(parameters: Mapping[str, float]) -> Run:
    options = {_CW_NAMES.get(name, name): value for name, value in parameters.items()}
    return lambda model, x, y: _minimal(model, x, y, "L2CarliniWagnerAttack", **options)


def _auna(parameters: Mapping[str, float]) -> Run:
    epsilon, repeats = parameters["epsilon"], parameters["repeats"]
    name = "LinfRepeatedAdditiveUniformNoiseAttack"
    return lambda model, x, y: _foolbox(model, x, y, name, epsilon, repeats=repeats)


def _boundary(parameters: Mapping[str, float]) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from defenses.attacks.labels_only import boundary

        return boundary(model, x, y, steps=int(parameters["steps"]))

    return run


def _pwa(parameters: Mapping[str, float]) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from defenses.attacks.labels_only import pointwise

        return pointwise(model, x, y, steps=int(parameters["steps"]))

    return run


_CW_NAMES = MappingProxyType({"searches": "binary_search_steps", "step_size": "stepsize"})


def _minimal(model: nn.Module, x: Tensor, y: Tensor, name: str, **options: float) -> Tensor:
    """Run an attack that looks for the least distance; an image on which it finds nothing comes back as it ended.

    The library's word for success is not taken: against a noisy model it is one more draw.
    """
    x_adv = _foolbox(model, x, y, name, None, **options)
    # Where it finds nothing C&W gives a black image, which may well be misclassified.
    found = x_adv.flatten(1).any(1)
    return torch.where(found.reshape(-1, 1, 1, 1), x_adv, x)


def _foolbox(model: nn.Module, x: Tensor, y: Tensor, name: str, epsilon: float | None, **options: float) -> Tensor:
    """Return the images of an attack of that library's."""
    from foolbox import attacks

    return _run(model, x, y, getattr(attacks, name)(**options), epsilon)


def _momentum_attack(**options: Any) -> "AttackWithDistance":
    """Return MI-FGSM as published: foolbox adds up the signs of the gradients, the paper gradients of L1 norm 1."""
    from foolbox.attacks.gradient_descent_base import normalize_lp_norms
    from foolbox.attacks.mi_fgsm import LinfMomentumIterativeFastGradientMethod

    class Published(LinfMomentumIterativeFastGradientMethod):
        def normalize(self, gradients: Any, *, x: Any, bounds: Any) -> Any:
            return normalize_lp_norms(gradients, p=1)

    return Published(**options)


def _run(model: nn.Module, x: Tensor, y: Tensor, attack: "AttackWithDistance", epsilon: float | None) -> Tensor:
    from foolbox.models.pytorch import PyTorchModel

    with frozen(model), torch.enable_grad():
        wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
        _, x_adv, _ = attack(wrapped, x, y, epsilons=epsilon)
    found: Tensor = x_adv
    return found


FROM_FOOLBOX: Mapping[str, Entry] = MappingProxyType(
    {
        "fgsm": Entry({"epsilon": 5 / 255}, _fgsm, Facts("linf", "gradients", 3, "Goodfellow et al. 2015")),
        "bim": Entry(
            {"epsilon": 8 / 255, "step_size": 1 / 255, "steps": 10},
            _bim,
            Facts("linf", "gradients", 21, "Kurakin et al. 2017"),
        ),
        "mi-fgsm": Entry(
            {"epsilon": 8 / 255, "step_size": 0.8 / 255, "steps": 10, "momentum": 1.0},
            _mi_fgsm,
            Facts("linf", "gradients", 21, "Dong et al. 2018"),
        ),
        "pgd": Entry(
            {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10},
            _pgd,
            Facts("linf", "gradients", 21, "Madry et al. 2018"),
        ),
        "deepfool": Entry(
            {"steps": 50, "overshoot": 0.02}, _deepfool, Facts("l2", "gradients", 902, "Moosavi-Dezfooli et al. 2016")
        ),
        "cw": Entry(
            {"searches": 5, "steps": 200, "confidence": 0.0, "step_size": 0.01, "initial_const": 1e-3},
            _cw,
            Facts("l2", "gradients", 2001, "Carlini and Wagner 2017"),
        ),
        "boundary": Entry({"steps": 5000}, _boundary, Facts("l2", "labels", 5653, "Brendel et al. 2018")),
        "pwa": Entry({"steps": 200}, _pwa, Facts("l0", "labels", 4000, "Schott et al. 2019")),
        "auna": Entry({"epsilon": 32 / 255, "repeats": 100}, _auna, Facts("linf", "labels", 102, "Rauber et al. 2017")),
    }
)
"""FGSM, BIM, MI-FGSM and PGD in an L-infinity ball, DeepFool and C&W; boundary, pointwise and additive uniform noise.

DeepFool, C&W and the boundary attack look for the least L2 distance and end on the classifier's boundary: after
rounding to 8 bits few of their examples still fool it. C&W ends a search early once a whole batch makes no progress,
and the boundary attack's directions are a batch's, so that their examples depend a little on which images share a
batch. How often the pointwise attack asks depends on the image: on CIFAR-10 about 2,000 times, without a bound.
"""

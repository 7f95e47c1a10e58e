"""The attacks that the Adversarial Robustness Toolbox (ART) runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run
from defenses.attacks.isolation import frozen, seeded


class ParameterUnsuitable(ValueError):
    """An attack's parameter is a number, but none that it can be run with."""

    def __init__(self, parameter: str, value: float, expected: str) -> None:
        self.parameter, self.value, self.expected = parameter, value, expected
        super().__init__(f"Expected {parameter} {expected}, got {value:g}.")


def jsma(model: nn.Module, x: Tensor, y: Tensor, *, theta: float, gamma: float) -> Tensor:
    """Return x with its most salient values raised until the model answers with a random class (Papernot et al. 2016).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. Each step adds ``theta`` to two values of an image, up to 1, and
    ends at the target or once more than a share ``gamma`` of the values has changed. ART takes the two values whose
    derivative of the target's logit is highest, without regard to the other classes' as the paper's map has it.
    """
    x_adv = x.clone()
    with _estimated(model, x) as estimator:
        from art.attacks.evasion import SaliencyMapMethod

        target = (y + torch.randint(1, estimator.nb_classes, y.shape).to(y)) % estimator.nb_classes
        for c in target.unique():  # one class at a time: ART goes backward once for each class among the targets
            rows = target == c
            attack = SaliencyMapMethod(estimator, theta=theta, gamma=gamma, batch_size=int(rows.sum()), verbose=False)
            x_adv[rows] = _tensor(attack.generate(_array(x[rows]), target[rows].cpu().numpy()), x)
        return x_adv


def universal(
    model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, max_iter: int, delta: float, overshoot: float
) -> Tensor:
    """Return x plus one perturbation, the same for all, in an L-infinity ball (Moosavi-Dezfooli et al. 2017).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. It is found on these very N images, so that another batch
    has another. Up to ``max_iter`` times it goes through them, in random order, and adds what DeepFool
    finds for one that is still recognised; it ends once a share of 1 - ``delta`` is misclassified. DeepFool has the
    authors' 10 steps, and goes the share ``overshoot`` further than it must: with their 0.02 the images found first lie
    so near the boundary that what is added for the next ones brings them back.
    """
    with _estimated(model, x) as estimator:
        from art.attacks.evasion import UniversalPerturbation

        attack = UniversalPerturbation(
            estimator,
            attacker="deepfool",
            attacker_params={"max_iter": 10, "epsilon": overshoot, "verbose": False},
            delta=delta,
            max_iter=max_iter,
            eps=epsilon,
            norm="inf",
            batch_size=len(x),
            verbose=False,
        )
        return _tensor(attack.generate(_array(x), y.cpu().numpy()), x)


def few_pixels(model: nn.Module, x: Tensor, y: Tensor, *, pixels: int, max_iter: int) -> Tensor:
    """Return x with at most ``pixels`` pixels set to other 8-bit colours (Su et al. 2019).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. Differential evolution, about 400 candidates through up to
    ``max_iter`` generations, makes the true class less likely, and ends at the first generation whose best candidate is
    misclassified. An image for which it finds none comes back unchanged.
    """
    with _estimated(model, x, log_probabilities=True) as estimator:
        from art.attacks.evasion import PixelAttack

        estimator.nb_classes = max(3, estimator.nb_classes)  # of two, ART takes it that there is but one output
        attack = PixelAttack(estimator, th=pixels, es=1, max_iter=max_iter, verbose=False)
        with np.errstate(divide="ignore", invalid="ignore"):  # candidates that are all alike have no spread
            images = attack.generate(_array(x), F.one_hot(y, estimator.nb_classes).cpu().numpy())
    x_adv = _tensor(images, x)
    changed = ((x_adv - x).abs() > 1e-4).any(1, keepdim=True)  # the others only went to 255 and back
    return torch.where(changed, x_adv, x)


class Estimated(nn.Module):
    """Answer float64 images, which ART passes on under numpy 2, with logits or ``log_probabilities`` (N, K)."""

    def __init__(self, model: nn.Module, log_probabilities: bool) -> None:
        super().__init__()
        self.model = model
        self.log_probabilities = log_probabilities

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.float())
        # in float64, in which those of a class that the model is sure of do not all round to 0
        return logits.double().log_softmax(1) if self.log_probabilities else logits


@contextmanager
def _estimated(model: nn.Module, x: Tensor, *, log_probabilities: bool = False) -> Iterator[Any]:
    """Yield ART's view of a model on the images' device, with gradients and with random states of its own."""
    from art.estimators.classification import PyTorchClassifier

    with frozen(model), seeded(x.device), torch.enable_grad():
        yield PyTorchClassifier(
            Estimated(model, log_probabilities),
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=model(x[:1]).shape[1],
            clip_values=(0.0, 1.0),
            device_type="gpu" if x.is_cuda else "cpu",
        )


def _array(x: Tensor) -> Any:
    return x.detach().cpu().numpy()


def _tensor(images: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(images).to(like).clamp(0, 1)


def _jsma(parameters: Mapping[str, float]) -> Run:
    theta, gamma = parameters["theta"], parameters["gamma"]
    if theta <= 0:
        raise ParameterUnsuitable("theta", theta, "above 0")
    if not 0 < gamma <= 1:
        raise ParameterUnsuitable("gamma", gamma, "above 0 and at most 1")
    return lambda model, x, y: jsma(model, x, y, theta=theta, gamma=gamma)


def _uap(parameters: Mapping[str, float]) -> Run:
    epsilon, max_iter, delta = parameters["epsilon"], int(parameters["max_iter"]), parameters["delta"]
    if epsilon <= 0:
        raise ParameterUnsuitable("epsilon", epsilon, "above 0")
    if delta >= 1:
        raise ParameterUnsuitable("delta", delta, "below 1")
    options = {"epsilon": epsilon, "delta": delta, "overshoot": parameters["overshoot"]}
    return lambda model, x, y: universal(model, x, y, max_iter=max_iter, **options)


def _one_pixel(parameters: Mapping[str, float]) -> Run:
    pixels, max_iter = int(parameters["pixels"]), int(parameters["max_iter"])
    return lambda model, x, y: few_pixels(model, x, y, pixels=pixels, max_iter=max_iter)


FROM_ART: Mapping[str, Entry] = MappingProxyType(
    {
        "jsma": Entry(
            {"theta": 1.0, "gamma": 1.0}, _jsma, Facts("l0", "gradients", 4611, "Papernot et al. 2016", targeted=True)
        ),
        "uap": Entry(
            {"epsilon": 10 / 255, "max_iter": 5, "delta": 0.2, "overshoot": 1.0},
            _uap,
            Facts("linf", "gradients", 676, "Moosavi-Dezfooli et al. 2017"),
        ),
        "one-pixel": Entry({"pixels": 1, "max_iter": 10}, _one_pixel, Facts("l0", "scores", 4412, "Su et al. 2019")),
    }
)
"""JSMA, a universal perturbation and the one-pixel attack, of images of 3x32x32 and 10 classes where it matters.

ART is slow to import, and makes a folder ``.art`` in the user's home.
"""

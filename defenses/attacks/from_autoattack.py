"""AutoAttack and its parts."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from defenses.attacks.attack import Entry, Facts, Run
from defenses.attacks.isolation import frozen, seeded


class ClassesTooFew(ValueError):
    """A classifier has fewer classes than an attack's loss compares."""

    def __init__(self, attack: str, needed: int, classes: int) -> None:
        self.attack, self.needed, self.classes = attack, needed, classes
        super().__init__(f"Expected a classifier of at least {needed} classes for {attack}, got one of {classes}.")


def autoattack(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """Return x changed by the standard AutoAttack in an L-infinity ball of ``epsilon`` (Croce and Hein 2020).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. APGD on the cross-entropy, targeted APGD, targeted FAB and Square
    with 5,000 queries follow one another, each on what the ones before it left recognised; an image that all leave so
    comes back unchanged. With fewer than 10 classes there are as many targets as other classes.
    Raises ``ClassesTooFew`` below the 4 classes that the targeted loss compares.
    """
    return _autoattack(model, x, y, epsilon, "standard", 4)


def autoattack_rand(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, samples: int) -> Tensor:
    """Return x changed by AutoAttack for noisy defenses, in an L-infinity ball of ``epsilon`` (Croce and Hein 2020).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. APGD on the cross-entropy and APGD on the difference of logits
    ratio, both with gradients averaged over ``samples`` calls of the model (EOT; the authors take 20).
    Raises ``ClassesTooFew`` below the 3 classes that the second loss compares.
    """
    return _autoattack(model, x, y, epsilon, "rand", 3, samples)


def square(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, queries: int) -> Tensor:
    """Return x changed by the Square attack in an L-infinity ball of ``epsilon`` (Andriushchenko et al. 2020).

    ``x`` is (N, C, H, W) in [0, 1], ``y`` (N,) int64. The squares shrink over the ``queries`` as the paper's do over
    10,000. An image that is recognised in the end comes back unchanged.
    """
    from pyautoattack.square import SquareAttack

    with frozen(model), seeded(x.device) as seed:
        attack = SquareAttack(model, norm="Linf", n_queries=queries, eps=epsilon, seed=seed, device=x.device)
        x_adv: Tensor = attack.perturb(x, y)
    return x_adv


def _autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    version: Literal["standard", "rand"],
    needed: int,
    samples: int = 1,
) -> Tensor:
    from pyautoattack import AutoAttack

    with frozen(model), seeded(x.device) as seed, _trace_kept():
        attack = AutoAttack(model, norm="Linf", eps=epsilon, version=version, seed=seed, device=x.device)
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        if classes < needed:
            raise ClassesTooFew(f"AutoAttack {version}", needed, classes)
        attack.verbose = False
        attack.apgd.eot_iter = samples
        attack.fab.n_target_classes = attack.apgd_targeted.n_target_classes = min(9, classes - 1)
        x_adv: Tensor = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return x_adv


@contextmanager
def _trace_kept() -> Iterator[None]:
    """Put back the trace function, which the library's look at the model takes away from a debugger."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)


def _standard(parameters: Mapping[str, float]) -> Run:
    return lambda model, x, y: autoattack(model, x, y, epsilon=parameters["epsilon"])


def _rand(parameters: Mapping[str, float]) -> Run:
    epsilon, samples = parameters["epsilon"], int(parameters["samples"])
    return lambda model, x, y: autoattack_rand(model, x, y, epsilon=epsilon, samples=samples)


def _square(parameters: Mapping[str, float]) -> Run:
    epsilon, queries = parameters["epsilon"], int(parameters["queries"])
    return lambda model, x, y: square(model, x, y, epsilon=epsilon, queries=queries)


FROM_AUTOATTACK: Mapping[str, Entry] = MappingProxyType(
    {
        "autoattack": Entry({"epsilon": 8 / 255}, _standard, Facts("linf", "gradients", 9775, "Croce and Hein 2020")),
        "autoattack-rand": Entry(
            {"epsilon": 8 / 255, "samples": 20}, _rand, Facts("linf", "gradients", 8088, "Croce and Hein 2020")
        ),
        "square": Entry(
            {"epsilon": 8 / 255, "queries": 5000}, _square, Facts("linf", "scores", 5003, "Andriushchenko et al. 2020")
        ),
    }
)
"""AutoAttack standard and rand, and the Square attack by itself, which is also the last of the standard's four.

Warnings of the library's, that a model seems to be random or has no gradient, go to the logger ``auto-attack``.
"""

"""How a CoopHANCE defense is fitted, from the attacks to the threshold."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from defenses.classifier import Layer
from defenses.coophance.augmentation import Augmentation
from defenses.coophance.inspector import InspectorConfig, pool_within
from defenses.coophance.regulator import RegulatorConfig
from defenses.coophance.trainer import TrainingPlan
from defenses.precision import has_bfloat16


@dataclass(frozen=True)
class RegulatorPlan:
    """Say how a Regulator is built and trained.

    ``channels`` to ``alpha`` are those of ``RegulatorConfig``, ``learning_rate`` to ``precision`` those of
    ``TrainingPlan``. ``confusion`` says where the confusion layers act: in training and at inference (``on``), only in
    ``training``, or nowhere (``off``). ``precision`` is bfloat16 for ``auto`` where the device multiplies in it itself.
    ``epochs`` of the fitting images are trained, unless ``minutes`` are given.
    ``stop`` is chosen among a few points of the training by validation, or is the last one.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    skip_channels: tuple[int, ...] = (4, 8, 16, 32)
    batch_norm: bool = True
    output: Literal["image", "residual"] = "residual"
    dropout: float = 0.5
    training_noise: float = 15 / 255
    inference_noise: float = 15 / 255
    confusion: Literal["on", "training", "off"] = "on"
    alpha: float = 1.0
    epochs: float = 20.0
    minutes: float | None = None
    batch_size: int = 128
    learning_rate: float = 3e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    averaging: float = 0.99
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    flip: bool = True
    stop: Literal["validated", "last"] = "validated"

    def __post_init__(self) -> None:
        _above_zero(self, "epochs", "minutes", "batch_size", "learning_rate")
        _not_below_zero(self, "alpha", "dropout", "training_noise", "inference_noise", "averaging")
        if not (self.dropout < 1 and self.averaging < 1):
            raise ValueError(f"Expected dropout and averaging below 1, got {self.dropout} and {self.averaging}.")

    def config(self, image_shape: tuple[int, int, int]) -> RegulatorConfig:
        """Return the structure for images (C, H, W); raises ``ValueError`` where there is none."""
        return RegulatorConfig(
            image_shape,
            channels=self.channels,
            skip_channels=self.skip_channels,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            output=self.output,
            training_noise=self.training_noise,
            inference_noise=self.inference_noise,
            confusion=self.confusion == "on",
            alpha=self.alpha,
        )

    def training(self, images: int, seed: int, device: torch.device) -> TrainingPlan:
        """Return the training on that many images, its length by ``epochs``, its precision settled.

        A batch is of all images where there are fewer than ``batch_size``.
        """
        batch_size = min(self.batch_size, images)
        return TrainingPlan(
            steps=max(5, round(self.epochs * images / batch_size)),
            batch_size=batch_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            averaging=self.averaging,
            precision=self.precision_on(device),
            confusion=self.confusion != "off",
            augmentation=Augmentation(flip=self.flip),
            seed=seed,
        )

    def precision_on(self, device: torch.device) -> Literal["float32", "bfloat16"]:
        """Return what a device trains in."""
        if self.precision == "auto":
            return "bfloat16" if has_bfloat16(device) else "float32"
        return self.precision

    def settled(self, device: torch.device) -> Self:
        """Return the plan with the precision that a device trains in, so that it says the same on every machine."""
        return replace(self, precision=self.precision_on(device))


@dataclass(frozen=True)
class InspectorPlan:
    """Say what an Inspector looks at and how it is fitted.

    ``inspects`` and ``layer`` say where, the layer being found by itself when None; maps wider than ``most_features``
    are pooled. ``negatives`` is how many benign images each class contributes at most. ``inverse_penalty`` is the C of
    the regressions, chosen by validation when None. ``surviving`` says whether it is fitted to the attacks that the
    Regulator leaves, or to all; ``fusion`` whether the score also weighs what the two answers, raw and purified, say of
    each other. ``thresholds`` is one for the ``model`` or one for each ``class``.
    """

    inspects: Literal["raw", "purified"] = "raw"
    layer: str | None = None
    most_features: int = 16384
    negatives: int = 2000
    inverse_penalty: float | None = None
    surviving: bool = True
    fusion: bool = True
    thresholds: Literal["model", "class"] = "model"

    def __post_init__(self) -> None:
        _above_zero(self, "most_features", "negatives", "inverse_penalty")

    def config(self, layer: Layer, classes: int) -> InspectorConfig:
        """Return what an Inspector of that layer looks at, for a classifier of so many classes."""
        pool = pool_within(layer.shape, self.most_features)
        return InspectorConfig(layer.name, layer.shape, classes, self.inspects, pool, self.fusion)


@dataclass(frozen=True)
class FitPlan:
    """Say how a CoopHANCE defense is fitted.

    ``examples`` is how many images each attack is run on to fit, ``validation_examples`` how many to choose by, and
    ``test_examples`` how many to measure on. ``budget`` is the false-positive rate that the threshold is calibrated
    to, ``accuracy_loss`` the share of clean validation images that the Regulator may cost at most, which settles its
    ``strength`` unless that is given.
    """

    attacks: tuple[str, ...] = ("fgsm", "pgd-stop", "pgd", "deepfool")
    examples: int = 2000
    validation_examples: int = 400
    test_examples: int = 300
    budget: float = 0.05
    accuracy_loss: float = 0.04
    strength: float | None = None
    regulator: RegulatorPlan = field(default_factory=RegulatorPlan)
    inspector: InspectorPlan = field(default_factory=InspectorPlan)
    seed: int = 0

    @classmethod
    def paper(cls) -> Self:
        """Return the plan of the paper and its program for CIFAR-10, which wants 200 epochs."""
        regulator = RegulatorPlan(
            skip_channels=(0, 2, 4, 8),
            batch_norm=False,
            output="image",
            training_noise=10 / 255,
            inference_noise=10 / 255,
            epochs=200,
            learning_rate=1e-3,
            schedule="constant",
            averaging=0,
            precision="float32",
            stop="last",
        )
        inspector = InspectorPlan(most_features=2**31, inverse_penalty=10, surviving=False, fusion=False)
        return cls(attacks=("fgsm",), strength=1.0, regulator=regulator, inspector=inspector)

    def chosen_by_attacks(self, *, reused: bool) -> list[str]:
        """Return what attacked validation images are needed for; ``reused`` says whether a Regulator is used again."""
        wanted = {
            "the stopping point": not reused and self.regulator.stop == "validated",
            "the strength": self.strength is None,
            "the inverse penalty": self.inspector.inverse_penalty is None,
            "the weights of the fusion": self.inspector.fusion,
        }
        return [what for what, open_ in wanted.items() if open_]

    def __post_init__(self) -> None:
        _above_zero(self, "examples", "validation_examples", "test_examples")
        _not_below_zero(self, "accuracy_loss")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"Expected a strength above 0 and at most 1, got {self.strength}.")
        if not self.attacks:
            raise ValueError("Expected at least one attack to fit on, got none.")


def _above_zero(plan: Any, *names: str) -> None:
    for name in names:
        value = getattr(plan, name)
        if value is not None and not value > 0:
            raise ValueError(f"Expected {name} above 0, got {value}.")


def _not_below_zero(plan: Any, *names: str) -> None:
    for name in names:
        if not getattr(plan, name) >= 0:
            raise ValueError(f"Expected {name} of 0 or more, got {getattr(plan, name)}.")

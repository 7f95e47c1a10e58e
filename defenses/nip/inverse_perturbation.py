"""The inverse perturbation: an image is moved by the candidate whose similarity is nearest (NIP, section 4.4)."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.classifier import Classifier, Layer
from defenses.nip.head import AutogradHead, Head
from defenses.nip.influence import log_odds_influence
from defenses.nip.neurons import index_similarity, select_neurons
from defenses.nip.plan import NipPlan, Precision
from defenses.purifier import Purifier, PurifierNotExportable

Control = Literal["random", "gaussian"]
"""Directions that a nearest candidate is measured against: that of any candidate, and Gaussian noise."""

FAR = 4.0
"""More than two similarities are ever apart."""


@dataclass(frozen=True)
class InversePerturbationConfig:
    """Say what an inverse perturbation looks at, and how large its pool is.

    ``layer`` is the layer's name and ``shape`` that of one image's activations there, (D,) or (D, H, W);
    ``image_shape`` is (C, H, W). ``template_sizes`` are the lengths of the template's rows, one for all classes or one
    for each. The rest is as in ``NipPlan``; ``candidates`` is how many there are.
    """

    layer: str
    shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    classes: int
    candidates: int
    k1: int = 5
    k2: int = 5
    template_sizes: tuple[int, ...] = (0,)
    similarity: Literal["index", "influence"] = "index"
    search: Literal["all", "class"] = "all"
    precision: Precision = "float32"
    amplitude: float = 1.0

    @property
    def remaining(self) -> int:
        """How many neurons are neither front nor tail."""
        return self.shape[0] - self.k1 - self.k2

    @property
    def pool_bytes(self) -> int:
        """The bytes of the pool."""
        keys = 1 if self.similarity == "index" else self.shape[0]
        each = math.prod(self.image_shape) * _dtype(self.precision).itemsize + 4 * keys + 8
        return self.candidates * each + 4 * len(self.template_sizes) * self.remaining

    @classmethod
    def planned(cls, plan: NipPlan, classifier: Classifier, layer: Layer, candidates: int) -> Self:
        """Return what a plan makes of a classifier's layer with so many candidates; its template is still empty."""
        return cls(
            layer=layer.name,
            shape=layer.shape,
            image_shape=classifier.image_shape,
            classes=classifier.classes,
            candidates=candidates,
            k1=plan.k1,
            k2=plan.k2,
            template_sizes=(0,) * (classifier.classes if plan.template == "class" else 1),
            similarity=plan.similarity,
            search=plan.search,
            precision=plan.precision,
            amplitude=plan.amplitude,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the configuration that ``as_json`` described."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)


class Pool(NamedTuple):
    """M candidates and the template that their similarities were measured with.

    ``perturbations`` (M, C, H, W), float16 or float32, are gradients divided by their maximum less their minimum
    (equation 8). ``keys`` are their similarities (M,), or their images' influence vectors (M, D) of length 1; float32.
    ``classes`` int64 (M,) are their images' classes, ``template`` float32 (rows, D - k1 - k2) the padded sequences.
    """

    perturbations: Tensor
    keys: Tensor
    classes: Tensor
    template: Tensor


def moved(x: Tensor, direction: Tensor, amplitude: float) -> Tensor:
    """Return x moved by a direction (N, C, H, W) times each image's mean and the amplitude, within [0, 1]."""
    return (x + amplitude * x.mean((1, 2, 3), keepdim=True) * direction).clamp(0, 1)


class InversePerturbation(Purifier):
    """Map x to clip(x + amplitude * Mean(x) * rho / (Max(rho) - Min(rho)), 0, 1) (equation 8).

    rho is the candidate of the pool whose similarity is nearest to that of x, the first of equally near ones. With
    ``search`` by class those of another class than the predicted one come after all of its own. There is no noise in
    it. A ``control`` replaces the direction alone, for measurement: by that of a random candidate, or by Gaussian
    noise, each of the L2 norm of the nearest candidate, drawn from torch's global generator whatever the noise scale.
    """

    def __init__(self, config: InversePerturbationConfig, head: Head) -> None:
        super().__init__(config.layer)
        self.config = config
        self.head = head
        self.control: Control | None = None
        count = config.candidates
        keys = (count,) if config.similarity == "index" else (count, config.shape[0])
        self.register_buffer("perturbations", torch.zeros(count, *config.image_shape, dtype=_dtype(config.precision)))
        self.register_buffer("keys", torch.zeros(keys))
        self.register_buffer("classes", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("template", torch.zeros(len(config.template_sizes), config.remaining))

    @property
    def pool(self) -> Pool:
        """The candidates; zeros where none were set."""
        return Pool(*(getattr(self, name) for name in Pool._fields))

    def set_pool(self, pool: Pool) -> None:
        """Take candidates of the shapes that the configuration says; raises ``ValueError`` for others."""
        for name, own, given in zip(Pool._fields, self.pool, pool, strict=True):
            if own.shape != given.shape or own.dtype != given.dtype:
                raise ValueError(
                    f"Expected {name} of shape {tuple(own.shape)} in {own.dtype}, "
                    f"got {tuple(given.shape)} in {given.dtype}."
                )
        for name, given in zip(Pool._fields, pool, strict=True):
            setattr(self, name, given)

    def set_amplitude(self, amplitude: float) -> None:
        """Set the factor of the perturbation, above 0."""
        self.config = replace(self.config, amplitude=amplitude)

    def check_exportable(self) -> None:
        """Raise ``HeadUnsuitable`` for a head that needs autograd, ``PurifierNotExportable`` for a control."""
        if isinstance(self.head, AutogradHead):
            raise self.head.reason
        if self.control is not None:
            raise PurifierNotExportable(
                f"A control direction is there to be measured and not to be served, got {self.control!r}."
            )

    def forward(self, x: Tensor, noise_scale: Tensor, activations: Tensor, undefended_logits: Tensor) -> Tensor:
        """Return the moved images; ``activations`` and ``undefended_logits`` are those of x, ``noise_scale`` unused."""
        direction = self.direction(x, activations, undefended_logits)
        return moved(x, direction, self.config.amplitude)

    def direction(self, x: Tensor, activations: Tensor, logits: Tensor) -> Tensor:
        """Return (N, C, H, W) the normalised perturbation of each image's candidate, or the control's direction."""
        chosen = self.nearest(x, activations, logits)
        rho = self.pool.perturbations.index_select(0, chosen).to(x.dtype)
        if self.control is None:
            return rho
        if self.control == "random":
            drawn = torch.randint(self.config.candidates, (len(x),), device=x.device)
            other = self.pool.perturbations.index_select(0, drawn).to(x.dtype)
        else:
            other = torch.randn_like(rho)
        norms = [each.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for each in (rho, other)]
        scaled: Tensor = other * (norms[0] / norms[1])
        return scaled

    def nearest(self, x: Tensor, activations: Tensor, logits: Tensor) -> Tensor:
        """Return (N,) which candidate's similarity is nearest; the first of equally near ones."""
        config, pool = self.config, self.pool
        influence = log_odds_influence(self.head, x, activations, logits)
        predicted = logits.argmax(1)
        if config.similarity == "index":
            neurons = select_neurons(influence, config.k1, config.k2)
            similarity = index_similarity(neurons.remaining, pool.template, predicted)
            distance = (similarity.unsqueeze(1) - pool.keys).abs()
        else:
            distance = 1 - F.normalize(influence, dim=1) @ pool.keys.T
        if config.search == "class":
            distance = distance + FAR * (pool.classes != predicted.unsqueeze(1)).to(distance.dtype)
        return distance.argmin(1)


def _dtype(precision: Precision) -> torch.dtype:
    return torch.float16 if precision == "float16" else torch.float32

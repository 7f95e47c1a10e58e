"""Reclassification by response: a push says which class the logits hide, where noise and benign images do not."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from defenses.judge import Judge
from defenses.nip.push import InversePush, Push, Smoothing
from defenses.purifier import Purifier

PushKind = Literal["smoothing", "inverse"]

NEVER = -1e9
"""What no response and no logit comes down to."""


@dataclass(frozen=True)
class ResponseConfig:
    """Say how images are pushed: blurred with a ``weight``, or along their class' mean inverse perturbation.

    ``layer`` is the layer whose neurons the inverse perturbations were made of, None where there are none; ``size`` is
    the root mean square that they change a pixel's values by. ``image_shape`` is (C, H, W).
    """

    push: PushKind
    image_shape: tuple[int, int, int]
    classes: int
    weight: float
    size: float
    layer: str | None = None

    def made(self) -> Push:
        """Return the push; the directions of an inverse one are still zero."""
        if self.push == "smoothing":
            return Smoothing(self.image_shape[0], self.weight)
        return InversePush(self.classes, self.image_shape, self.size)

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the configuration that ``as_json`` described."""
        return cls(**{**values, "image_shape": tuple(values["image_shape"])})


class Pushing(Purifier):
    """Map each image to itself as pushed. There is no noise in it."""

    def __init__(self, config: ResponseConfig) -> None:
        super().__init__(config.layer)
        self.config = config
        self.push = config.made()

    def forward(
        self,
        x: Tensor,
        noise_scale: Tensor,
        activations: Tensor | None = None,
        undefended_logits: Tensor | None = None,
    ) -> Tensor:
        """Return the pushed images; the bare logits, where they are given, say which class is predicted."""
        logits = x.new_zeros(len(x), self.config.classes) if undefended_logits is None else undefended_logits
        pushed: Tensor = self.push(x, logits)
        return pushed


class Response(NamedTuple):
    """How much further the class that rises most has come than is usual, (N,), and which that is (N,)."""

    rise: Tensor
    risen: Tensor


class ResponseJudge(Judge):
    """Answer from the bare logits and from what a push makes of them.

    A logit's rise is what the push adds to it beyond what it adds to that of the predicted class, in standard
    deviations from what benign images of that prediction show (``mean`` and ``scale``, (K, K)). The class that rises
    most is answered where it rises above ``gate``; the second class where the two highest bare logits are less than
    ``margin`` apart; elsewhere the highest in the mean of the bare logits and the pushed image's, which count ``vote``.
    A class that is answered against the mean changes places in it with the highest. Before anything is fitted the bare
    answer is given.
    """

    mean: Tensor
    scale: Tensor
    gate: Tensor
    margin: Tensor
    vote: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(classes, classes))
        self.register_buffer("scale", torch.ones(classes, classes))
        self.register_buffer("gate", torch.tensor(-NEVER))
        self.register_buffer("margin", torch.zeros(()))
        self.register_buffer("vote", torch.zeros(()))

    def forward(self, undefended_logits: Tensor, logits: Tensor, alerts: Tensor) -> Tensor:
        response = self.response(undefended_logits, logits)
        summed = (undefended_logits + self.vote * logits) / (1 + self.vote)
        highest = undefended_logits.topk(2, dim=1)
        near = highest.values[:, 0] - highest.values[:, 1] < self.margin
        answered = torch.where(near, highest.indices[:, 1], summed.argmax(1))
        answered = torch.where(response.rise > self.gate, response.risen, answered)
        return exchanged(summed, answered)

    def response(self, undefended_logits: Tensor, logits: Tensor) -> Response:
        """Return the ``Response`` of images with these bare logits and those after the push, each (N, K)."""
        predicted = undefended_logits.argmax(1)
        rises = rises_of(undefended_logits, logits)
        usual = (rises - self.mean.index_select(0, predicted)) / self.scale.index_select(0, predicted)
        own = _one_hot(predicted, usual)
        highest = (usual * (1 - own) + NEVER * own).max(1)
        return Response(highest.values, highest.indices)


def rises_of(undefended_logits: Tensor, logits: Tensor) -> Tensor:
    """Return (N, K) what the push adds to each logit beyond what it adds to that of the predicted class."""
    change = logits - undefended_logits
    return change - change.gather(1, undefended_logits.argmax(1, keepdim=True))


def exchanged(logits: Tensor, answered: Tensor) -> Tensor:
    """Return logits (N, K) in which the highest has changed places with that of the class answered (N,)."""
    highest = logits.max(1, keepdim=True)
    given = _one_hot(answered, logits)
    most = _one_hot(highest.indices.squeeze(1), logits)
    difference = highest.values - logits.gather(1, answered.unsqueeze(1))
    return logits + (given - most) * difference


def _one_hot(classes: Tensor, like: Tensor) -> Tensor:
    return (torch.arange(like.shape[1], device=like.device) == classes.unsqueeze(1)).to(like.dtype)

"""Measuring a protected classifier."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from defenses.pixels import to_float
from defenses.protected import ProtectedClassifier

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the work done and the work in all."""


class Answers(NamedTuple):
    """What a protected classifier says of N images: its ``Output`` without the purified images, on the CPU.

    Of 10,000 photographs at 224x224 those alone would take 6 GB.
    """

    logits: Tensor
    scores: Tensor
    alerts: Tensor
    undefended_logits: Tensor


@torch.no_grad()
def run_batched(
    protected: ProtectedClassifier,
    images: Tensor,
    device: torch.device,
    batch_size: int = 128,
    *,
    noise_scale: float = 1.0,
) -> Answers:
    """Return the ``Answers`` for one or more images, uint8 or float in [0, 1] (N, C, H, W).

    ``noise_scale`` multiplies all noise of the defense, 0 switching it off.
    """
    scale = torch.tensor(noise_scale, device=device)
    parts = []
    for batch in images.split(batch_size):
        output = protected(to_float(batch.to(device)), scale)
        kept = Answers(output.logits, output.scores, output.alerts, output.undefended_logits)
        parts.append([column.cpu() for column in kept])
    return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))


def resisted(answers: Answers, y: Tensor) -> Tensor:
    """Return (N,) which adversarial examples are resisted: alerted, or answered with the true class (section 4.1.1)."""
    return answers.alerts | (answers.logits.argmax(1) == y)

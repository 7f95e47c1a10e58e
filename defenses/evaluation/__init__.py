"""Measuring a protected classifier."""

from collections.abc import Callable

import torch
from torch import Tensor

from defenses.protected import Output, ProtectedClassifier

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the work done and the work in all."""


@torch.no_grad()
def run_batched(protected: ProtectedClassifier, images: Tensor, device: torch.device, batch_size: int = 128) -> Output:
    """Return the ``Output`` for many images, uint8 or float in [0, 1] (N, C, H, W), gathered on the CPU."""
    outputs = []
    for batch in images.split(batch_size):
        x = batch.to(device)
        output = protected(x.float() / 255 if x.dtype == torch.uint8 else x)
        outputs.append([column.cpu() for column in output])
    return Output(*(torch.cat(column) for column in zip(*outputs, strict=True)))


def resisted(output: Output, y: Tensor) -> Tensor:
    """Return (N,) which adversarial examples are resisted: alerted, or answered with the true class (section 4.1.1)."""
    return output.alerts | (output.logits.argmax(1) == y)

"""The buffers through which one batch passes on its way to a device and back."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PIXEL_VALUES = 255.0


class Slot:
    """Hold one batch's images and answers, on the host and on the device, at places that never change.

    ``shape`` is an image's (C, H, W), ``examples`` are the outputs for one image on the device, ``most`` the largest
    batch. On a GPU the host's side is pinned, so that copies run beside computation; ``images`` (most, C, H, W) float32
    in [0, 1], channels last, is what the device computes from.
    """

    def __init__(
        self, shape: tuple[int, int, int], examples: Sequence[Tensor], most: int, device: torch.device
    ) -> None:
        pinned = device.type == "cuda"
        self.images = torch.zeros(most, *shape, device=device).contiguous(memory_format=torch.channels_last)
        self._pixels = torch.zeros(most, *shape, dtype=torch.uint8, device=device)
        self._host = {
            dtype: torch.zeros(most, *shape, dtype=dtype, pin_memory=pinned) for dtype in (torch.uint8, torch.float32)
        }
        # A divisor on the device, since one on the host is multiplied by its reciprocal, which rounds otherwise.
        self._white = torch.tensor(PIXEL_VALUES, device=device)
        self._outputs = [torch.zeros(most, *one.shape[1:], dtype=one.dtype, device=device) for one in examples]
        self._answers = [torch.zeros(one.shape, dtype=one.dtype, pin_memory=pinned) for one in self._outputs]

    def send(self, images: np.ndarray, size: int) -> None:
        """Bring images (N, C, H, W), uint8 or float32, to the device, and zeros to the rows from N to ``size``.

        What is left to the device goes to the current stream.
        """
        count = len(images)
        host = self._host[torch.uint8 if images.dtype == np.uint8 else torch.float32][:count]
        np.copyto(host.numpy(), images)
        if images.dtype == np.uint8:
            self._pixels[:count].copy_(host, non_blocking=True)
            torch.div(self._pixels[:count], self._white, out=self.images[:count])
        else:
            self.images[:count].copy_(host, non_blocking=True)
        self.images[count:size].zero_()

    def keep(self, outputs: Sequence[Tensor]) -> None:
        """Put the outputs of a batch where they are fetched from."""
        for place, values in zip(self._outputs, outputs, strict=True):
            place[: len(values)].copy_(values)

    def fetch(self, count: int) -> None:
        """Bring the answers of the first rows to the host, on the current stream."""
        for place, values in zip(self._answers, self._outputs, strict=True):
            place[:count].copy_(values[:count], non_blocking=True)

    def answers(self, count: int) -> list[np.ndarray]:
        """Return the answers of the first rows, once they were brought."""
        return [values[:count].numpy().copy() for values in self._answers]

"""Arithmetic: exact where a boundary is at stake, fast where a network is trained."""

from contextlib import AbstractContextManager

import torch


def full_precision() -> AbstractContextManager[None]:
    """Return a context in which convolutions on a GPU are computed in float32 throughout, not in TF32.

    Adversarial examples of least distance lie on the boundary, where ten bits of mantissa decide otherwise.
    """
    exact: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=False, allow_tf32=False
    )
    return exact


def has_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies in bfloat16 itself, so that training in it is faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

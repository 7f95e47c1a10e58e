"""What keeps a library's attack from touching more than the images: the parameters, and the global random states."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no gradient reach a model's parameters: libraries go backward with them, and leave what they add up there."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def seeded(device: torch.device) -> Iterator[int]:
    """Seed torch, numpy and Python from torch's generator; yield the seed, from 0 to 2^31 - 1.

    Afterwards all are as they were, but for that one draw. Meanwhile a CUDA ``device`` is the current one.
    """
    seed = int(torch.randint(2**31, ()))
    python, numpy = random.getstate(), np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.cuda.device(device) if cuda else nullcontext():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield seed
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

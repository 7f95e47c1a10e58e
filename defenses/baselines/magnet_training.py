"""Training MagNet's autoencoder, from the epoch where it was left."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.baselines.magnet import Reformer
from defenses.noise import gaussian_like
from defenses.pixels import to_float
from defenses.seeds import derived_seed
from defenses.stages import Kept, Stages

LEARNING_RATE = 1e-3

STAGE = "autoencoder"


def train_reformer(
    reformer: Reformer,
    images: Tensor,
    *,
    epochs: int,
    sigma: float,
    batch_size: int,
    seed: int,
    stages: Stages,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> float:
    """Train an autoencoder on ``device`` to take noise away from benign images; return its last epoch's mean loss.

    ``images`` is uint8 (N, C, H, W). The loss is the mean squared error between the images and what is made of them
    with noise of N(0, ``sigma``^2) added, minimised by Adam (MagNet, section 5). Each epoch is kept in ``stages``, and
    is the same whether or not the one before it was killed. Sets torch's global seed.
    """
    optimizer = torch.optim.Adam(reformer.parameters(), lr=LEARNING_RATE)
    kept = stages.load(STAGE)
    done, loss, before = 0, float("nan"), 0.0
    if kept is not None:
        _restore(reformer, optimizer, kept)
        done, loss, before = kept.values["epochs"], kept.values["loss"], kept.values["seconds"]
    start = time.perf_counter()
    for epoch in range(done, epochs):
        torch.manual_seed(derived_seed(seed, epoch))
        loss = _epoch(reformer, optimizer, images, sigma, batch_size, device)
        progress(epoch + 1, epochs)
        values = {"epochs": epoch + 1, "loss": loss, "seconds": before + time.perf_counter() - start}
        stages.save(STAGE, _state(reformer, optimizer), values)
    return loss


def _epoch(
    reformer: Reformer,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    sigma: float,
    batch_size: int,
    device: torch.device,
) -> float:
    quiet, total = torch.ones((), device=device), 0.0
    reformer.train()
    for rows in torch.randperm(len(images)).split(batch_size):
        x = to_float(images[rows].to(device))
        loss = F.mse_loss(reformer((x + sigma * gaussian_like(x)).clamp(0, 1), quiet), x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(rows)
    reformer.eval()
    return total / len(images)


def _state(reformer: Reformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = optimizer.state_dict()["state"]
    return {f"model.{name}": value for name, value in reformer.state_dict().items()} | {
        f"optimizer.{place}.{name}": value for place, each in moments.items() for name, value in each.items()
    }


def _restore(reformer: Reformer, optimizer: torch.optim.Optimizer, kept: Kept) -> None:
    model: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in kept.tensors.items():
        part, _, name = key.partition(".")
        if part == "model":
            model[name] = value
        else:
            place, _, moment = name.partition(".")
            moments.setdefault(int(place), {})[moment] = value
    reformer.load_state_dict(model)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})

"""Adversarial examples made in shards: each made once, kept whole, and shared by all who need it."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

import defenses
from defenses.attacks.attack import Attack
from defenses.pixels import to_float
from defenses.precision import full_precision
from defenses.seeds import derived_seed
from defenses.stages import Stages

SHARD = 25
"""Images in a shard. Attacks that look at a whole batch see these and no others, so that it is part of a result."""

_EXAMPLES = "examples"
_WAIT_SECONDS = 0.5
_LIBRARIES = ("torch", "foolbox", "adversarial-robustness-toolbox", "pyautoattack")


@dataclass(frozen=True)
class Crafting:
    """Say what is crafted: an attack, run on a model, on images.

    ``model`` is in evaluation mode on ``device``, and ``victim`` names it, its defense, and how it
    is asked, for good. ``images`` is uint8 (N, C, H, W), ``targets`` (N,) int64; all of them are attacked, each shard
    from a seed of its own that is drawn from ``seed``.
    """

    attack: Attack
    model: nn.Module
    victim: str
    images: Tensor
    targets: Tensor
    seed: int
    device: torch.device

    @property
    def shards(self) -> list["Shard"]:
        """The work in pieces."""
        return [Shard(self, index) for index in range(-(-len(self.targets) // SHARD))]

    @property
    def on(self) -> str:
        """What a progress bar is called."""
        return f"{self.attack.name} on {self.victim}"


@dataclass(frozen=True)
class Shard:
    """One piece of a crafting."""

    crafting: Crafting
    index: int

    @property
    def rows(self) -> slice:
        """Which of the crafting's images it is."""
        return slice(self.index * SHARD, (self.index + 1) * SHARD)

    @property
    def key(self) -> str:
        """The SHA-256 over all that the examples depend on: victim, attack, seed, images, kind of device, this code."""
        crafting = self.crafting
        facts = {
            "victim": crafting.victim,
            "attack": crafting.attack.family,
            "parameters": dict(crafting.attack.parameters),
            "seed": self.seed,
            "images": digest_of(crafting.images[self.rows], crafting.targets[self.rows]),
            "device": crafting.device.type,
            "code": code_version(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def seed(self) -> int:
        """The seed of this shard alone."""
        return derived_seed(self.crafting.seed, self.index)

    def craft(self) -> Tensor:
        """Return the examples, float32 (N, C, H, W) in [0, 1] on the CPU; the global random state is left as it was."""
        crafting, device = self.crafting, self.crafting.device
        x, y = to_float(crafting.images[self.rows]).to(device), crafting.targets[self.rows].to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), full_precision():
            torch.manual_seed(self.seed)
            return crafting.attack.run(crafting.model, x, y).detach().clamp(0, 1).cpu()


@dataclass(frozen=True)
class Crafted:
    """Hold what was made of a crafting's images, as far as it was made.

    ``rows`` int64 (M,) says which of the images ``x_adv`` float32 (M, C, H, W) are made of, ``seconds`` how long that
    took whoever made them.
    """

    rows: Tensor
    x_adv: Tensor
    seconds: float


class ExampleCache:
    """Keep shards in a folder, which any number of processes may share.

    A shard is there whole or not at all. Whoever makes one holds its lock meanwhile, which ends with the process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, shard: Shard) -> tuple[Tensor, float] | None:
        """Return a shard's examples and the seconds that they took, or None where it is not kept."""
        kept = self._stages(shard).load(_EXAMPLES)
        return None if kept is None else (kept.tensors["x_adv"], float(kept.values["seconds"]))

    def save(self, shard: Shard, x_adv: Tensor, seconds: float) -> None:
        """Keep a shard; raises ``StageNotKept`` where the disk does not take it."""
        self._stages(shard).save(_EXAMPLES, {"x_adv": x_adv}, {"seconds": seconds})

    def claimed(self, shard: Shard) -> AbstractContextManager[bool]:
        """Return a context that says whether the shard is this process's to make (see ``claimed``)."""
        return claimed(self._stages(shard).folder)

    def _stages(self, shard: Shard) -> Stages:
        key = shard.key
        return Stages(self.folder / key[:2] / key)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Yield whether a folder is this process's to write into; it is not while another holds its lock."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def craft_shards(
    craftings: Sequence[Crafting],
    kept: ExampleCache,
    *,
    deadline: float = float("inf"),
    progress: Callable[[str, int, int], None],
) -> list[Crafted]:
    """Craft what is not kept yet, and return all there is of each crafting, in order.

    Shards are begun in turn, the first of each crafting before the second of any, until ``time.monotonic()`` passes
    ``deadline``: what then lacks is left out, and may be made another time. One that another process is at is waited
    for. Raises what the attacks raise, and ``StageNotKept``.
    """
    done = [0] * len(craftings)
    position = {id(crafting): index for index, crafting in enumerate(craftings)}

    def advance(shard: Shard) -> None:
        index = position[id(shard.crafting)]
        done[index] += 1
        progress(shard.crafting.on, done[index], len(shard.crafting.shards))

    turns = zip_longest(*(crafting.shards for crafting in craftings))
    waiting = [shard for turn in turns for shard in turn if shard is not None]
    while waiting:
        busy = []
        for shard in waiting:
            if _made(shard, kept, deadline):
                advance(shard)
            elif time.monotonic() < deadline:
                busy.append(shard)
        waiting = busy
        if waiting:
            time.sleep(_WAIT_SECONDS)
    return [_gathered(crafting, kept) for crafting in craftings]


def _made(shard: Shard, kept: ExampleCache, deadline: float) -> bool:
    """Make a shard unless it is kept; return whether it is there now."""
    if kept.load(shard) is not None:
        return True
    if time.monotonic() >= deadline:
        return False
    with kept.claimed(shard) as mine:
        if not mine:
            return False
        if kept.load(shard) is None:
            start = time.perf_counter()
            x_adv = shard.craft()
            kept.save(shard, x_adv, time.perf_counter() - start)
        return True


def _gathered(crafting: Crafting, kept: ExampleCache) -> Crafted:
    parts = [(shard, found) for shard in crafting.shards if (found := kept.load(shard)) is not None]
    every = torch.arange(len(crafting.targets))
    rows = torch.cat([every[:0], *(every[shard.rows] for shard, _ in parts)])
    nothing = torch.empty(0, *crafting.images.shape[1:])
    return Crafted(
        rows, torch.cat([nothing, *(x_adv for _, (x_adv, _) in parts)]), sum(seconds for _, (_, seconds) in parts)
    )


@cache
def code_version() -> str:
    """Return a digest of all code that examples depend on: this package's but for the evaluation, and libraries'."""
    folder = Path(defenses.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if "evaluation" not in path.relative_to(folder).parts:
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    for name in _LIBRARIES:
        digest.update(f"{name} {_version(name)}".encode())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def digest_of(*tensors: Tensor) -> str:
    """Return the SHA-256 over tensors on the CPU: their types, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()

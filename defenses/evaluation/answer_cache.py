"""What a defense answered, kept: no process measures again what another one has."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import defenses.evaluation
from defenses.attacks.shards import claimed, code_version, digest_of
from defenses.stages import Stages

_ANSWERS = "answers"
_WAIT_SECONDS = 0.2


class AnswerCache:
    """Keep what one defense answers on one kind of device in a folder, which any number of processes may share.

    ``victim`` names the defense, and what is switched on in it, for good. Answers are there whole or not at all.
    Whoever asks for them holds their lock meanwhile, which ends with the process.
    """

    def __init__(self, folder: Path, victim: str, device: torch.device) -> None:
        self.folder, self.victim, self.device = folder, victim, device

    def once(
        self, images: Tensor, how: Mapping[str, int | float], ask: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what is kept of some images, asked about in some way, or ``ask`` and keep it.

        Where another process is asking the same, it is waited for. Raises what ``ask`` raises, and ``StageNotKept``.
        """
        key = self._key(images, how)
        stages = Stages(self.folder / key[:2] / key)
        while (kept := stages.load(_ANSWERS)) is None:
            with claimed(stages.folder) as mine:
                if mine and stages.load(_ANSWERS) is None:
                    stages.save(_ANSWERS, ask())
            if not mine:
                time.sleep(_WAIT_SECONDS)
        return kept.tensors

    def _key(self, images: Tensor, how: Mapping[str, int | float]) -> str:
        facts = {
            "victim": self.victim,
            "images": digest_of(images),
            "how": dict(how),
            "device": self.device.type,
            "code": _code(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    """Return a digest of all code that answers depend on: that of examples, and how a defense is asked."""
    asking = Path(defenses.evaluation.__file__).read_bytes()
    return hashlib.sha256(code_version().encode() + asking).hexdigest()

"""Classifiers that learn what defenses answer, for an attacker who has nothing else to craft on."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import Tensor

from defenses.attacks.shards import claimed, code_version
from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.evaluation.defense import Defense
from defenses.evaluation.plan import EvaluationPlan
from defenses.evaluation.rows import SubstituteResult
from defenses.nip.substitute import Substitute, distil
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier
from defenses.seeds import derived_seed
from defenses.stages import Kept, Stages

SUBSTITUTE = "substitute"
_WAIT_SECONDS = 0.5


class QueryImages(NamedTuple):
    """What an attacker asks a defense about, and what agreement is measured on: uint8 (N, C, H, W), none attacked."""

    training: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class StandIn:
    """A substitute of a defense, on the device of the attacks; ``key`` names it for good."""

    key: str
    classifier: Classifier
    result: SubstituteResult


@dataclass(frozen=True)
class Substitutes:
    """Train substitutes of defenses on the labels that they answer with, each in a folder that processes may share.

    What is finished of one is kept there, so that a run that was killed goes on; whoever trains it holds its lock,
    which ends with the process.
    """

    folder: Path
    plan: EvaluationPlan
    images: QueryImages
    device: torch.device
    progress: Progress

    def train(self, defenses: tuple[Defense, ...], deadline: float) -> dict[str, StandIn]:
        """Return those kept, or begun before ``deadline`` in ``time.monotonic()``; raises what ``distil`` does."""
        made: dict[str, StandIn] = {}
        waiting = list(defenses)
        while waiting:
            busy = []
            for defense in waiting:
                folder = self._folder(defense)
                with claimed(folder) as mine:
                    in_time = time.monotonic() < deadline
                    if mine and (in_time or SUBSTITUTE in Stages(folder).names()):
                        made[defense.name] = self._kept(defense, folder)
                    elif in_time:
                        busy.append(defense)
            if waiting := busy:
                time.sleep(_WAIT_SECONDS)
        return made

    def _kept(self, defense: Defense, folder: Path) -> StandIn:
        stages = Stages(folder)
        kept = stages.load(SUBSTITUTE)
        if kept is None:
            found = self._distilled(defense.protected, stages)
            graph = torch.frombuffer(bytearray(found.classifier.model.SerializeToString()), dtype=torch.uint8)
            told = (found.training_queries, found.held_out_queries, found.agreement, found.commonest_share)
            kept = Kept({"graph": graph}, asdict(SubstituteResult(*told)))
            stages.save(SUBSTITUTE, *kept)
        classifier = Classifier(onnx.ModelProto.FromString(kept.tensors["graph"].numpy().tobytes())).eval()
        return StandIn(folder.name, classifier.to(self.device), SubstituteResult(**kept.values))

    def _distilled(self, protected: ProtectedClassifier, stages: Stages) -> Substitute:
        return distil(
            self._labels_of(protected),
            protected.classifier.image_shape,
            protected.classifier.classes,
            *self.images,
            self.plan.substitute,
            stages=stages,
            device=self.device,
            progress=self.progress,
        )

    def _labels_of(self, protected: ProtectedClassifier) -> Callable[[Tensor], Tensor]:
        """Return what answers images on the CPU with the labels that one submission of each is told, alerted or not."""
        scale = torch.tensor(float(self.plan.noise), device=self.device)

        def answer(x: Tensor) -> Tensor:
            # Noise that depends on the images alone: who takes the work up again is told the same.
            drawn = int.from_bytes(hashlib.sha256(x.contiguous().numpy().tobytes()).digest()[:4], "little")
            with torch.random.fork_rng(devices=[self.device] if scale.is_cuda else []), full_precision():
                torch.manual_seed(derived_seed(self.plan.seed, drawn))
                labels: Tensor = protected(x.to(self.device), scale).logits.argmax(1)
            return labels

        return answer

    def _folder(self, defense: Defense) -> Path:
        """Return where all is kept that depends on the defense, its switches, the plan, the images and this code."""
        facts = {
            "victim": f"{defense.digest}, {self.plan.switches}",
            "substitute": asdict(self.plan.substitute),
            "images": [hashlib.sha256(each.contiguous().numpy().tobytes()).hexdigest() for each in self.images],
            "code": code_version(),
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / key[:2] / key

"""What an evaluation has to craft, before anything is measured."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import Tensor, nn

from defenses.attacks import Attack, attack
from defenses.attacks.shards import SHARD, Crafting, code_version
from defenses.attacks.transfer import transferred
from defenses.attacks.victim import Victim
from defenses.classifier import Classifier
from defenses.evaluation import Progress
from defenses.evaluation.plan import EFFORT, SAMPLES, EvaluationPlan, Scenario, distinct, doubled, suits
from defenses.evaluation.rows import SubstituteResult
from defenses.nip.substitute import Substitute, distil
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier
from defenses.seeds import derived_seed
from defenses.stages import Kept, Stages

CHECKED = 50
"""Images that the sanity checks of an attack take."""

ANOTHER_IMAGE = "other-image"
"""The attack without any bound, which must succeed."""

SUBSTITUTE = "substitute"
_WAIT_SECONDS = 0.5

RESULT, UNDEFENDED, REPEATED, NOISES = "result", "undefended", "repeated", "noises"
"""What a crafting is for: a row, an attack without a defense, that once more, or more noises for each gradient."""


@dataclass(frozen=True)
class Defense:
    """Hold what is evaluated: a name, a digest that names it for good, and the protected classifier on its device.

    ``noisy`` says whether one image is answered differently from time to time.
    """

    name: str
    digest: str
    protected: ProtectedClassifier
    noisy: bool


@dataclass(frozen=True)
class Work:
    """Name one crafting: what it is for, in which scenario, by which attack, on which defense (None: on none).

    For a check that an attack with more effort does no better, ``purpose`` is the parameter that is doubled.
    """

    purpose: str
    scenario: Scenario
    attack: str
    defense: str | None


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
                with _claimed(folder) as mine:
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


class Workshop:
    """Plan the craftings of an evaluation, on images that the bare classifier gets right.

    ``x`` is uint8 (N, C, H, W) with classes ``y`` (N,); ``classifier`` and the defenses are on the device of the
    attacks, and ``digest`` names the classifier for good. ``undefended`` is the classifier behind no defense.
    """

    def __init__(
        self,
        classifier: Classifier,
        digest: str,
        undefended: ProtectedClassifier,
        defenses: tuple[Defense, ...],
        plan: EvaluationPlan,
        x: Tensor,
        y: Tensor,
    ) -> None:
        self.classifier, self.digest, self.undefended = classifier, digest, undefended
        self.defenses, self.plan = defenses, plan
        self.x, self.y = x, y
        attacks, self.sweeps = plan.parsed()
        self.attacks = distinct(attacks)
        swept = [each for sweep in self.sweeps for each in sweep.attacks]
        self.crafted = distinct([*attacks, *swept])

    @property
    def wants_substitutes(self) -> bool:
        """Whether anything is crafted on substitutes of the defenses."""
        return "transfer" in self.plan.scenarios and any(suits(each, "transfer") for each in self.crafted)

    def works(self, substitutes: Mapping[str, StandIn]) -> dict[Work, Crafting]:
        """Return all that has to be crafted; what comes twice is crafted once, since it is kept by its content.

        ``substitutes`` are those of the defenses by name; where one lacks, so does what is crafted on it.
        """
        works = dict(self._measured())
        for each in self.crafted:
            for name, substitute in substitutes.items() if suits(each, "transfer") else ():
                works[Work(RESULT, "transfer", each.name, name)] = self._on_substitute(each, substitute)
        if self.plan.checks:
            works |= self._checked()
        return works

    def _measured(self) -> Iterator[tuple[Work, Crafting]]:
        for each in self.crafted:
            count = self.plan.images_for(each)
            if "A" in self.plan.scenarios and suits(each, "A"):
                yield Work(RESULT, "A", each.name, None), self._on_classifier(each, count)
            for defense in self.defenses if "B" in self.plan.scenarios and suits(each, "B") else ():
                yield Work(RESULT, "B", each.name, defense.name), self._on_defense(each, defense, count)

    def _checked(self) -> Iterator[tuple[Work, Crafting]]:
        for each in self.crafted:
            yield Work(UNDEFENDED, "A", each.name, None), self._on_nothing(each, CHECKED)
            yield Work(REPEATED, "A", each.name, None), self._on_nothing(each, SHARD, repeated=True)
        if "B" not in self.plan.scenarios:
            return
        for defense in self.defenses:
            yield (
                Work(RESULT, "B", ANOTHER_IMAGE, defense.name),
                self._on_defense(attack(ANOTHER_IMAGE), defense, CHECKED),
            )
            for each in self.attacks:
                if suits(each, "B") and each.facts.white_box:
                    yield from self._with_more_effort(each, defense)

    def _with_more_effort(self, each: Attack, defense: Defense) -> Iterator[tuple[Work, Crafting]]:
        """Yield an attack on a defense with each of what says how long it tries doubled, in turn."""
        for parameter in EFFORT:
            if parameter in each.parameters:
                longer = self._on_defense(doubled(each, parameter), defense, CHECKED)
                yield Work(parameter, "B", each.name, defense.name), longer
        if defense.noisy and SAMPLES not in each.parameters:
            more = self._on_defense(each, defense, CHECKED, 2 * self.plan.samples)
            yield Work(NOISES, "B", each.name, defense.name), more

    def _on_classifier(self, each: Attack, count: int) -> Crafting:
        return self._crafting(each, self.classifier, f"{self.digest}, bare", count)

    def _on_nothing(self, each: Attack, count: int, *, repeated: bool = False) -> Crafting:
        """Return an attack on the undefended classifier, in the form that the attack is made for."""
        count = min(count, self.plan.images_for(each))
        again = ", again" if repeated else ""
        if suits(each, "A"):
            return self._crafting(each, self.classifier, f"{self.digest}, bare{again}", count)
        return self._crafting(each, Victim(self.undefended), f"{self.digest}, undefended{again}", count)

    def _on_defense(self, each: Attack, defense: Defense, count: int, samples: int | None = None) -> Crafting:
        # An attack that samples the noise itself is given one at a time.
        asked = (samples or self.plan.samples) if defense.noisy and SAMPLES not in each.parameters else 1
        return self._crafting(
            each,
            Victim(defense.protected, asked, noise_scale=float(self.plan.noise)),
            f"{defense.digest}, {asked} samples, {self.plan.switches}",
            count,
        )

    def _on_substitute(self, each: Attack, substitute: StandIn) -> Crafting:
        # The attack keeps its name, under which it is set beside the same in the other scenarios.
        blind = replace(transferred(each, substitute.classifier), name=each.name)
        return self._crafting(blind, substitute.classifier, f"substitute {substitute.key}", self.plan.images_for(each))

    def _crafting(self, each: Attack, model: nn.Module, victim: str, count: int) -> Crafting:
        return Crafting(each, model, victim, self.x[:count], self.y[:count], self.plan.seed)


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Yield whether a folder is this process's to write into; it is not while another holds it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield True
    except Timeout:
        yield False


def first_right(classifier: nn.Module, images: Tensor, targets: Tensor, limit: int, device: torch.device) -> Tensor:
    """Return (M,) the first rows, at most ``limit``, that a classifier gets right, of images uint8 (N, C, H, W)."""
    found: list[Tensor] = []
    count = 0
    for rows in torch.arange(len(images)).split(128):
        with torch.no_grad():
            answers = classifier(images[rows].to(device).float() / 255).argmax(1).cpu()
        right = rows[answers == targets[rows]]
        found.append(right)
        count += len(right)
        if count >= limit:
            break
    return torch.cat(found)[:limit] if found else torch.arange(0)

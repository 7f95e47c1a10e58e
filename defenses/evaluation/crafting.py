"""What an evaluation has to craft, before anything is measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from defenses.attacks import Attack, attack
from defenses.attacks.shards import SHARD, Crafting
from defenses.attacks.transfer import transferred
from defenses.attacks.victim import Victim
from defenses.classifier import Classifier
from defenses.evaluation.defense import Defense
from defenses.evaluation.plan import SAMPLES, EvaluationPlan, Scenario, distinct, doubled, efforts_of, suits
from defenses.evaluation.substitutes import StandIn
from defenses.protected import ProtectedClassifier

CHECKED = 50
"""Images that the sanity checks of an attack take."""

ANOTHER_IMAGE = "other-image"
"""The attack without any bound, which must succeed."""

RESULT, UNDEFENDED, REPEATED, NOISES = "result", "undefended", "repeated", "noises"
"""What a crafting is for: a row, an attack without a defense, that once more, or more noises for each gradient."""


@dataclass(frozen=True)
class Work:
    """Name one crafting: what it is for, in which scenario, by which attack, on which defense (None: on none).

    For a check that an attack with more effort does no better, ``purpose`` is the parameter that is doubled.
    """

    purpose: str
    scenario: Scenario
    attack: str
    defense: str | None


class Workshop:
    """Plan the craftings of an evaluation, on images that the bare classifier gets right.

    ``x`` is uint8 (N, C, H, W) with classes ``y`` (N,); ``classifier`` and the defenses are on ``device``, and
    ``digest`` names the classifier for good. ``undefended`` is the classifier behind no defense.
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
        device: torch.device,
    ) -> None:
        self.classifier, self.digest, self.undefended = classifier, digest, undefended
        self.defenses, self.plan = defenses, plan
        self.x, self.y, self.device = x, y, device
        attacks, self.sweeps = plan.parsed()
        self.attacks = distinct(attacks)
        swept = [each for sweep in self.sweeps for each in sweep.attacks]
        self.crafted = distinct([*attacks, *swept])
        self._victims: dict[tuple[str, int], Victim] = {}

    @property
    def wants_substitutes(self) -> bool:
        """Whether anything is crafted on substitutes of the defenses."""
        return "transfer" in self.plan.scenarios and any(suits(each, "transfer") for each in self.crafted)

    @property
    def must_break(self) -> frozenset[str]:
        """The names of what must turn a bare classifier's answers: all but the smaller budgets of a sweep."""
        smaller = {each.name for sweep in self.sweeps if sweep.parameter == "epsilon" for each in sweep.attacks[:-1]}
        asked = {each.name for each in self.attacks}
        return frozenset(each.name for each in self.crafted if each.name in asked or each.name not in smaller)

    def works(self, substitutes: Mapping[str, StandIn]) -> dict[Work, Crafting]:
        """Return all that has to be crafted; what comes twice is crafted once, since it is kept by its content.

        ``substitutes`` are those of the defenses by name; where one lacks, so does what is crafted on it.
        """
        works = dict(self._measured())
        for each in self.crafted:
            for name, substitute in substitutes.items() if suits(each, "transfer") else ():
                works[Work(RESULT, "transfer", each.name, name)] = self._on_substitute(each, substitute)
        for work, crafting in self._checked() if self.plan.checks else ():
            works.setdefault(work, crafting)
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
        if "B" not in self.plan.scenarios or not self.crafted:
            return
        for defense in self.defenses:
            yield (
                Work(RESULT, "B", ANOTHER_IMAGE, defense.name),
                self._on_defense(attack(ANOTHER_IMAGE), defense, CHECKED),
            )
            for each in self.crafted:
                if suits(each, "B"):
                    yield from self._with_more_effort(each, defense)

    def _with_more_effort(self, each: Attack, defense: Defense) -> Iterator[tuple[Work, Crafting]]:
        """Yield an attack on a defense with each of what says how long it tries doubled, in turn."""
        for parameter in efforts_of(each):
            longer = self._on_defense(doubled(each, parameter), defense, CHECKED)
            yield Work(parameter, "B", each.name, defense.name), longer
        if each.facts.white_box and defense.noisy and SAMPLES not in each.parameters:
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
        # Each is a copy of the whole defense.
        if (defense.name, asked) not in self._victims:
            victim = Victim(defense.protected, asked, noise_scale=float(self.plan.noise))
            self._victims[defense.name, asked] = victim
        victim = self._victims[defense.name, asked]
        return self._crafting(each, victim, f"{defense.digest}, {asked} samples, {self.plan.switches}", count)

    def _on_substitute(self, each: Attack, substitute: StandIn) -> Crafting:
        # The attack keeps its name, under which it is set beside the same in the other scenarios.
        blind = replace(transferred(each, substitute.classifier), name=each.name)
        return self._crafting(blind, substitute.classifier, f"substitute {substitute.key}", self.plan.images_for(each))

    def _crafting(self, each: Attack, model: nn.Module, victim: str, count: int) -> Crafting:
        return Crafting(each, model, victim, self.x[:count], self.y[:count], self.plan.seed, self.device)


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

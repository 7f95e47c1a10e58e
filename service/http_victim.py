"""A gateway as an attacker sees it who is told its answers and nothing else."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.attacks import Attack
from defenses.evaluation import Progress
from defenses.pixels import to_8_bits, to_float
from defenses.seeds import derived_seed
from service.client import Client

BLIND = ("labels", "nothing")
"""What an attack may need of a gateway."""


class GradientWithheld(RuntimeError):
    """A gateway's answers have no derivatives, and an attack asked for one."""

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(
            f"Expected images whose answers no gradient is wanted of, got some that require one: "
            f"the gateway answers for {model} with labels alone."
        )


class AnswerBeyondClasses(ValueError):
    """A gateway told a class that the attacker does not know of."""

    def __init__(self, model: str, classes: int, found: int) -> None:
        self.model, self.classes, self.found = model, classes, found
        super().__init__(f"Expected the gateway to answer for {model} with classes below {classes}, got {found}.")


class AttackSeesTooMuch(ValueError):
    """An attack needs more of a model than its labels."""

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        super().__init__(
            f"Expected an attack that sees labels alone, or nothing, got {attack.name}, which sees {attack.facts.sees}."
        )


class HttpVictim(nn.Module):
    """Answer with the labels that a gateway tells of a model of ``classes`` classes, over HTTP.

    Each image is sent rounded to 8 bits, as a file would hold it, ``batch_size`` at most in a request. The logits
    (N, ``classes`` + 1) are 1 for the class told and 0 for the others; the last stands for no answer: the class was
    withheld, or the image alerted. To an attack that looks for another class than
    the true one this last one would be just that: see ``facing``. ``queries`` counts the images sent.
    """

    def __init__(self, client: Client, model: str, classes: int, *, batch_size: int = 32) -> None:
        super().__init__()
        self.client, self.model, self.classes = client, model, classes
        self.batch_size = batch_size
        self.queries = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, ``classes`` + 1) for images (N, C, H, W) in [0, 1].

        Raises ``GradientWithheld``, ``AnswerBeyondClasses``, and the client's errors: ``GatewayRefused``, with 429
        where the gateway is busy or limits the client, and ``GatewayUnreachable``.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise GradientWithheld(self.model)
        images = to_8_bits(x.detach().clamp(0, 1)).cpu().numpy()
        told = self.client.classify(self.model, images, self.batch_size)
        self.queries += len(images)
        index = torch.from_numpy(told.class_index)
        if (index >= self.classes).any():
            raise AnswerBeyondClasses(self.model, self.classes, int(index.max()))
        silent = (index < 0) | torch.from_numpy(told.alerted)
        answered = index.masked_fill(silent, self.classes)
        return F.one_hot(answered, self.classes + 1).to(x.device, x.dtype)

    def facing(self, y: Tensor) -> "Facing":
        """Return the same gateway to an attacker of images of the true classes y (N,), or (1,) for one image."""
        return Facing(self, y)


class Facing(nn.Module):
    """Answer as a gateway does, and where it gives no answer with the true class: that has fooled nobody.

    ``y`` int64 (N,) are the classes of the images that are asked about, in their order; of one image (1,) any number of
    forms may be asked about at once.
    """

    def __init__(self, victim: HttpVictim, y: Tensor) -> None:
        super().__init__()
        self.victim, self.y = victim, y
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, K) for images (N, C, H, W) in [0, 1]: 1 for the class told, 0 for the others.

        Raises ``ValueError`` for another number of images, and what ``HttpVictim`` raises.
        """
        if len(self.y) not in (1, len(x)):
            raise ValueError(f"Expected {len(self.y)} images, one of each true class in order, got {len(x)}.")
        logits: Tensor = self.victim(x)
        true = F.one_hot(self.y.to(x.device), self.victim.classes).to(x.dtype).expand(len(x), -1)
        return logits[:, :-1] + logits[:, -1:] * true


@dataclass(frozen=True)
class HttpExamples:
    """Hold what an attack made of N images that a gateway did not misclassify, as they were sent.

    ``x`` and ``x_adv`` are uint8 (N, C, H, W), ``y`` int64 (N,) the true classes, ``rows`` int64 (N,) which of the
    given images were attacked. ``fooled`` bool (N,) says whether the gateway gave a wrong answer when it was sent the
    example once more, ``queries`` int64 (N,) how many images the attack had it answer before.
    """

    attack: Attack
    x: Tensor
    x_adv: Tensor
    y: Tensor
    rows: Tensor
    fooled: Tensor
    queries: Tensor


def attack_through(
    attack: Attack, victim: HttpVictim, images: Tensor, targets: Tensor, *, limit: int, seed: int, progress: Progress
) -> HttpExamples:
    """Attack the first ``limit`` images that a gateway does not misclassify, one after the other.

    ``images`` is uint8 (N, C, H, W), ``targets`` int64 (N,). Each image is attacked by itself, from a seed of its own,
    so that what it comes to and costs depends on no other. The global random state is left as it was. Raises
    ``AttackSeesTooMuch`` before anything is sent, what ``HttpVictim`` raises, and ``ValueError`` where the gateway
    misclassifies every image.
    """
    if attack.facts.sees not in BLIND:
        raise AttackSeesTooMuch(attack)
    parts: list[tuple[Tensor, ...]] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for row in range(len(images)):
            if len(parts) == limit:
                break
            torch.manual_seed(derived_seed(seed, row))
            x, y = images[row : row + 1], targets[row : row + 1]
            facing = victim.facing(y)
            if _fools(facing, x, y):
                continue
            before = victim.queries
            x_adv = to_8_bits(attack.run(facing, to_float(x), y).detach().clamp(0, 1))
            queries = torch.tensor([victim.queries - before])
            parts.append((x, x_adv, y, torch.tensor([row]), _fools(facing, x_adv, y), queries))
            progress(attack.name, len(parts), limit)
    if not parts:
        raise ValueError(f"The gateway misclassifies all of the {len(images)} images, so there is nothing to attack.")
    return HttpExamples(attack, *(torch.cat(column) for column in zip(*parts, strict=True)))


def _fools(facing: Facing, images: Tensor, y: Tensor) -> Tensor:
    """Return (N,) bool whether the gateway gives images uint8 (N, C, H, W) another class than y."""
    wrong: Tensor = facing(to_float(images)).argmax(1) != y
    return wrong

"""How much of a noisy defense's answer is luck."""

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.evaluation import run_batched
from defenses.evaluation.answer_cache import AnswerCache
from defenses.pixels import to_float
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier

SUBMISSIONS = 16
"""How often a clean image is submitted."""

TRIES = (1, 10, 100)
"""After how many submissions an attack's success is counted."""


@dataclass(frozen=True)
class Lottery:
    """The share of ``images`` clean images whose label, or verdict, is not the same over 16 submissions."""

    images: int
    submissions: int
    labels_change: float
    verdicts_change: float


@dataclass(frozen=True)
class Draws:
    """Submit images again and again to a protected classifier in evaluation mode on ``device``.

    The noise is drawn from ``seed``, and the global random state left as it was. ``noise_scale`` multiplies it. With a
    ``cache``, which is that of this defense, nothing is asked twice.
    """

    protected: ProtectedClassifier
    device: torch.device
    seed: int
    noise_scale: float = 1.0
    cache: AnswerCache | None = None

    @torch.no_grad()
    def noisy(self, images: Tensor) -> bool:
        """Say whether anything that is said of some images, uint8 (N, C, H, W), differs from one submission to another.

        That is the purified image and the score too: an answer may hang on noise only where an image is alerted.
        """
        x = to_float(images).to(self.device)
        scale = torch.tensor(self.noise_scale, device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), full_precision():
            torch.manual_seed(self.seed)
            first, second = self.protected(x, scale), self.protected(x, scale)
        return not all(torch.equal(*pair) for pair in zip(first, second, strict=True))

    def lottery(self, images: Tensor) -> Lottery:
        """Return how clean images (N, C, H, W), one or more, fare over 16 submissions."""
        answered = self._answered(images, SUBMISSIONS)
        changed = [float((each != each[0]).any(0).float().mean()) for each in answered]
        return Lottery(len(images), SUBMISSIONS, *changed)

    def success_within(self, x_adv: Tensor, y: Tensor) -> dict[int, float]:
        """Return the share of images (N, C, H, W), of classes y (N,), that succeed within 1, 10 and 100 submissions.

        An attack succeeds at a submission that is answered with another class and not alerted.
        """
        won = torch.zeros(len(y), dtype=torch.bool)
        shares = {}
        for number, (labels, alerts) in enumerate(zip(*self._answered(x_adv, TRIES[-1]), strict=True), 1):
            won |= (labels != y) & ~alerts
            if number in TRIES:
                shares[number] = float(won.float().mean())
        return shares

    def _answered(self, images: Tensor, times: int) -> tuple[Tensor, Tensor]:
        """Return the labels (times, N), and the alerts (times, N), of several submissions of images (N, C, H, W)."""
        if self.cache is None:
            kept = self._asked(images, times)
        else:
            how = {"seed": self.seed, "submissions": times}
            kept = self.cache.once(images, how, lambda: self._asked(images, times))
        return kept["labels"].long(), kept["alerts"]

    def _asked(self, images: Tensor, times: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), full_precision():
            torch.manual_seed(self.seed)
            answers = [
                run_batched(self.protected, images, self.device, noise_scale=self.noise_scale) for _ in range(times)
            ]
        labels = torch.stack([each.logits.argmax(1) for each in answers])
        return {"labels": labels.to(torch.int16), "alerts": torch.stack([each.alerts for each in answers])}

"""A protected classifier as an attacker sees it who knows all of it (CoopHANCE, section 2.3, scenario B)."""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defenses.protected import Output, Pass, ProtectedClassifier
from defenses.purifier import Purifier


class DefenseOpaque(TypeError):
    """A model's defense cannot be looked into, since it is no ``Victim``; ``looked_at`` says what was wanted."""

    def __init__(self, model: nn.Module, looked_at: str) -> None:
        self.model, self.looked_at = model, looked_at
        name = type(model).__name__
        super().__init__(f"Expected a Victim, whose {looked_at} the attack looks at, got a model of type {name}.")


class Seen(NamedTuple):
    """What N images come to under S noises: ``margin`` and ``excess``, each (N, S).

    ``margin`` is the highest logit of another class less that of the true one: above 0 the image is misclassified.
    ``excess`` is the detector's score less the threshold: above 0 the image is alerted; it is minus infinity where
    there is no detector. A margin or an excess that is not a number counts as neither misclassified nor unalerted.
    """

    margin: Tensor
    excess: Tensor

    @property
    def wrong(self) -> Tensor:
        """Which images are misclassified under which noises, bool (N, S)."""
        return self.margin > 0

    @property
    def evaded(self) -> Tensor:
        """Which images are misclassified and not alerted under which noises, bool (N, S)."""
        return self.wrong & (self.excess <= 0)


class Victim(nn.Module):
    """Answer with logits that gradients go through, over the purifier's noise and what stands in its way.

    Each call draws ``samples`` fresh noises for every image and answers with the logarithm of the mean of the
    probabilities, so that its gradient is that of the expectation over the noise (EOT, Athalye et al. 2018); 1 will do
    for a defense without noise. A purifier that has no useful derivative is passed backward as if it gave back its
    input (BPDA). ``noise_scale`` multiplies the noise. The protected classifier given is copied, and the copy is in
    evaluation mode.
    """

    def __init__(self, protected: ProtectedClassifier, samples: int = 1, *, noise_scale: float = 1.0) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"Expected at least 1 sample of the noise, got {samples}.")
        self.protected = copy.deepcopy(protected).eval().requires_grad_(False)
        if not self.protected.purifier.differentiable:
            self.protected.purifier = StraightThrough(self.protected.purifier)
        self.samples = samples
        self.noise_scale = noise_scale
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, K) for images (N, C, H, W) in [0, 1]."""
        log_probabilities: Tensor = self.output(x).logits.log_softmax(1).unflatten(0, (-1, self.samples))
        return log_probabilities.logsumexp(1) - math.log(self.samples)

    def output(self, x: Tensor) -> Output:
        """Return the ``Output`` of each image under each noise: rows (N * samples, ...), an image's together."""
        if self.protected.corrector is None:
            return self._uncorrected(x)
        scale = torch.tensor(self.noise_scale, device=x.device)
        output: Output = self.protected(x.repeat_interleave(self.samples, 0), scale)
        return output

    def seen(self, x: Tensor, y: Tensor) -> Seen:
        """Return what images (N, C, H, W) of the classes y (N,) come to under each noise, none of them corrected.

        What a corrector makes of an alerted image is left out, since an image that is alerted has not got through.
        """
        output = self._uncorrected(x)
        threshold = self.protected.threshold
        if threshold.ndim:
            threshold = threshold[output.logits.argmax(1)]
        margin = margins(output.logits, y.repeat_interleave(self.samples))
        return Seen(*(each.unflatten(0, (-1, self.samples)) for each in (margin, output.scores - threshold)))

    def activations(self, x: Tensor) -> Tensor:
        """Return what the detector is shown of images, under each noise: (N, S, ...).

        S is ``samples``, or 1 where the detector looks at the raw pass, which no noise reaches. Where it looks at no
        layer the values are none, (N, 1, 0).
        """
        noises = self.samples if self.protected.detector.inspects == "purified" else 1
        scale = torch.tensor(self.noise_scale, device=x.device)
        repeated: Tensor = self.protected.activations(x.repeat_interleave(noises, 0), scale)
        activations: Tensor = repeated.unflatten(0, (-1, noises))
        return activations

    def _uncorrected(self, x: Tensor) -> Output:
        """Return the ``Output`` under ``samples`` noises from one raw pass of each image, before any corrector."""
        raw, layer = self.protected.raw_pass(x), self.protected.purifier.layer
        noises = self.samples
        x = x.repeat_interleave(noises, 0)
        activations = {name: value.repeat_interleave(noises, 0) for name, value in raw.activations.items()}
        repeated = Pass(raw.logits.repeat_interleave(noises, 0), activations)
        shown = () if layer is None else (activations[layer], repeated.logits)
        purified = self.protected.purifier(x, torch.tensor(self.noise_scale, device=x.device), *shown)
        return self.protected.answer(x, purified, repeated)


def as_victim(model: nn.Module, looked_at: str) -> Victim:
    """Return the model as the ``Victim`` that it is. Raises ``DefenseOpaque``, saying what the attack looks at."""
    if not isinstance(model, Victim):
        raise DefenseOpaque(model, looked_at)
    return model


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Return (N,) the highest of an image's logits (N, K) for another class less that for its true class y (N,)."""
    true = y.unsqueeze(1)
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true).squeeze(1)


class StraightThrough(Purifier):
    """Purify as another does, and hand gradients back as if nothing had been done (BPDA, Athalye et al. 2018)."""

    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.purifier = purifier
        self.layer = purifier.layer

    def forward(self, x: Tensor, noise_scale: Tensor, *shown: Tensor) -> Tensor:
        with torch.no_grad():
            purified: Tensor = self.purifier(x, noise_scale, *shown)
        return x + (purified - x).detach()

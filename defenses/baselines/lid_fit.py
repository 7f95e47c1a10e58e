"""Fitting the regression over local intrinsic dimensionalities (Ma et al. 2018, algorithm 1)."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from defenses.attacks import AdversarialExamples
from defenses.baselines.lid import LidDetector
from defenses.noise import gaussian_like
from defenses.pixels import to_float

FEWEST_EXAMPLES = 10
"""The least images that fool the classifier, from which a regression is fitted."""


def fit_lid(
    detector: LidDetector,
    activations_of: Callable[[Tensor], Tensor],
    references: Tensor,
    examples: Sequence[AdversarialExamples],
    *,
    batch_size: int,
    device: torch.device,
) -> None:
    """Set a detector's references from benign images, and its regression by what attacks made of others.

    ``activations_of`` turns images, float in [0, 1] and on ``device``, into what the detector is shown; ``references``
    is uint8 (R, C, H, W). Positive are the examples that fool the classifier; negative are the clean images that they
    were made of, and the same under Gaussian noise of the same L2 norm. Raises ``ValueError`` where fewer than ten
    examples fool the classifier.
    """
    from sklearn.linear_model import LogisticRegression

    fooling = sum(int(each.fooled.sum()) for each in examples)
    if fooling < FEWEST_EXAMPLES:
        raise ValueError(f"LID needs at least {FEWEST_EXAMPLES} images that fool the classifier, got {fooling}.")

    @torch.no_grad()
    def shown(images: Tensor) -> Iterator[Tensor]:
        for batch in images.split(batch_size):
            yield activations_of(to_float(batch.to(device)))

    def dimensionalities(images: Tensor) -> Tensor:
        return torch.cat([detector.dimensionalities(each).cpu() for each in shown(images)])

    features = zip(*(detector.features(each) for each in shown(references)), strict=True)
    for known, parts in zip(detector.references, features, strict=True):
        known.copy_(torch.cat(parts))
    x_adv = torch.cat([each.x_adv[each.fooled] for each in examples])
    x = to_float(torch.cat([each.x[each.fooled] for each in examples]))
    positive = dimensionalities(x_adv)
    negative = torch.cat([dimensionalities(x), dimensionalities(_noisy(x, x_adv))])
    seen = torch.cat([negative, positive])
    labels = torch.cat([torch.zeros(len(negative)), torch.ones(len(positive))])
    detector.mean.copy_(seen.mean(0))
    detector.scale.copy_(seen.std(0).clamp_min(1e-6))
    standard = ((seen - detector.mean.cpu()) / detector.scale.cpu()).numpy()
    regression = LogisticRegression(class_weight="balanced", max_iter=1000).fit(standard, labels.numpy())
    detector.weight.copy_(torch.from_numpy(regression.coef_[0]))
    detector.bias.copy_(torch.tensor(float(regression.intercept_[0])))


def _noisy(x: Tensor, x_adv: Tensor) -> Tensor:
    """Return images under Gaussian noise as far from them as the examples are, in L2."""
    noise = gaussian_like(x)
    wanted = (x_adv - x).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    noisy: Tensor = (x + wanted.reshape(-1, 1, 1, 1) * noise).clamp(0, 1)
    return noisy

"""The regressions of an Inspector, one a class, for each strength of regularisation that is tried."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from defenses.stages import Stages

FEWEST_EXAMPLES = 10
"""Below so many examples of either kind a class shares the regression fitted on all classes together."""

MOST_SHARED = 2000
"""How many examples of each kind the regression of all classes together is fitted on at most."""


class Watched(NamedTuple):
    """Images, uint8 or float in [0, 1] (N, C, H, W), and the class (N,) that the protected classifier gives each.

    ``corrected`` bool (N,) says where that is the true class.
    """

    images: Tensor
    predicted: Tensor
    corrected: Tensor


class Regressions(NamedTuple):
    """The regressions of K classes over D features, for each of G inverse penalties.

    ``weights`` (G, K, D) and ``biases`` (G, K); how many ``negatives`` and ``positives`` each class had, which classes
    share the regression of all classes, and what each fit took in seconds.
    """

    weights: Tensor
    biases: Tensor
    negatives: tuple[int, ...]
    positives: tuple[int, ...]
    shared: tuple[int, ...]
    seconds: tuple[float, ...]


def fit_regressions(
    features_of: Callable[[Tensor], Tensor],
    benign: Watched,
    adversarial: Watched,
    classes: int,
    inverse_penalties: Sequence[float],
    *,
    surviving: bool,
    stages: Stages,
    progress: Callable[[int, int], None],
) -> Regressions:
    """Fit a logistic regression for each class, on what the protected classifier gives that class (section 3.2).

    ``features_of`` turns images into features (N, D); of the ``adversarial`` images
    a class takes, where ``surviving`` says so and there are ten, only those that the Regulator left
    wrong. Each regression is L2-penalised with inverse strength C, one fit for each of ``inverse_penalties``, and
    weighs the two kinds inversely to their frequency. A class with fewer than ten examples of either kind takes the
    regression fitted on all classes together. Each class is kept in ``stages`` when it is done.
    Raises ``ValueError`` when there are too few examples altogether.
    """
    for kind, watched in (("benign", benign), ("adversarial", adversarial)):
        if len(watched.images) < FEWEST_EXAMPLES:
            raise ValueError(f"An Inspector needs at least {FEWEST_EXAMPLES} {kind} images, got {len(watched.images)}.")
    benign_rows = [(benign.predicted == c).nonzero().flatten() for c in range(classes)]
    attacked_rows = [_attacked(adversarial, c, surviving) for c in range(classes)]
    shared = [c for c in range(classes) if min(len(benign_rows[c]), len(attacked_rows[c])) < FEWEST_EXAMPLES]
    jobs = [(f"class {c}", [c], benign_rows[c], attacked_rows[c]) for c in range(classes) if c not in shared]
    if shared:
        jobs.append(("all classes", shared, _thinned(len(benign.images)), _thinned(len(adversarial.images))))
    fits = []
    for done, (name, _, rows, attacked) in enumerate(jobs, 1):
        if (kept := stages.load(f"inspector, {name}")) is None:
            start = time.perf_counter()
            features = features_of(benign.images[rows]), features_of(adversarial.images[attacked])
            weights, biases = _regress(*features, inverse_penalties)
            seconds = time.perf_counter() - start
            stages.save(f"inspector, {name}", {"weights": weights, "biases": biases}, {"seconds": seconds})
            fits.append((weights, biases, seconds))
        else:
            fits.append((kept.tensors["weights"], kept.tensors["biases"], kept.values["seconds"]))
        progress(done, len(jobs))
    where = {c: index for index, (_, own, _, _) in enumerate(jobs) for c in own}
    return Regressions(
        torch.stack([fits[where[c]][0] for c in range(classes)], 1),
        torch.stack([fits[where[c]][1] for c in range(classes)], 1),
        tuple(map(len, benign_rows)),
        tuple(map(len, attacked_rows)),
        tuple(shared),
        tuple(seconds for _, _, seconds in fits),
    )


def _attacked(adversarial: Watched, c: int, surviving: bool) -> Tensor:
    given = adversarial.predicted == c
    left = (given & ~adversarial.corrected).nonzero().flatten()
    return left if surviving and len(left) >= FEWEST_EXAMPLES else given.nonzero().flatten()


def _thinned(count: int) -> Tensor:
    """Return at most ``MOST_SHARED`` of so many rows, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, MOST_SHARED)).round().long()


def _regress(negatives: Tensor, positives: Tensor, inverse_penalties: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the weights (G, D) and the biases (G,) of one class."""
    from sklearn.linear_model import LogisticRegression

    features = torch.cat([negatives, positives]).numpy()
    adversarial = torch.cat([torch.zeros(len(negatives)), torch.ones(len(positives))]).numpy()
    # The same optimum as the paper's liblinear, which needs over a thousand passes over so many features. Each fit
    # begins where the one before it, of a stronger penalty, ended.
    regression = LogisticRegression(class_weight="balanced", max_iter=1000, warm_start=True)
    fitted = {}
    for inverse_penalty in sorted(inverse_penalties):
        regression.set_params(C=inverse_penalty).fit(features, adversarial)
        fitted[inverse_penalty] = (regression.coef_[0].copy(), regression.intercept_[0])
    weights = torch.stack([torch.from_numpy(fitted[penalty][0]).float() for penalty in inverse_penalties])
    return weights, torch.tensor([fitted[penalty][1] for penalty in inverse_penalties]).float()

"""The candidates: inverse perturbations of benign images, each with its similarity (NIP, algorithm 2)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.classifier import Classifier, Layer
from defenses.evaluation import Progress
from defenses.nip.head import Head, head_behind
from defenses.nip.influence import check_layer, log_odds_influence, neuron_outputs
from defenses.nip.inverse_perturbation import InversePerturbation, InversePerturbationConfig, Pool
from defenses.nip.neurons import Neurons, build_template, count_remaining, index_similarity, select_neurons
from defenses.nip.plan import NipPlan, Sign
from defenses.onnx_import import LOGITS
from defenses.pixels import to_float

LARGEST_POOL = 2**31 - 2**28
"""The bytes of a pool that leave room for a classifier in one ONNX graph, which ends at 2 GiB."""


class PoolTooLarge(ValueError):
    """A pool would not fit into one ONNX graph."""

    def __init__(self, config: InversePerturbationConfig) -> None:
        self.needed = config.pool_bytes
        self.candidates = config.candidates
        most = LARGEST_POOL // (config.pool_bytes // config.candidates + 1)
        super().__init__(
            f"{config.candidates} candidates of shape {config.image_shape} in {config.precision} take "
            f"{self.needed / 2**30:.2f} GiB, and one ONNX graph holds {LARGEST_POOL / 2**30:.2f} GiB of them: "
            f"about {most} candidates."
        )


class Gradients(NamedTuple):
    """Inverse perturbations of N images, and what they were made of.

    ``rho`` (N, C, H, W) is the gradient divided by its maximum less its minimum; ``usable`` bool (N,) says where these
    differ, elsewhere rho is 0. ``neurons`` are those selected, by the ``influence`` (N, D) on the log odds of the
    predicted class; ``logits`` (N, K).
    """

    rho: Tensor
    usable: Tensor
    neurons: Neurons
    influence: Tensor
    logits: Tensor


@dataclass(frozen=True)
class BuiltPool:
    """A pool, the configuration it belongs to, and how many benign examples gave no gradient and were left out."""

    pool: Pool
    config: InversePerturbationConfig
    left_out: int


def inverse_perturbations(
    classifier: Classifier, layer: str, head: Head, x: Tensor, *, k1: int, k2: int, sign: Sign
) -> Gradients:
    """Return the gradient of the tail's outputs less the front's by the images x (N, C, H, W) (equations 5, 6 and 8).

    With ``front-tail`` it is that of the reverse. The classifier is in evaluation mode: no image sees the others.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        activations, logits = classifier.graph(x, (layer, LOGITS))
        outputs = neuron_outputs(activations)
        seen = (x.detach(), activations.detach(), logits.detach())
        influence = log_odds_influence(head, *seen)
        neurons = select_neurons(influence, k1, k2)
        loss = outputs.gather(1, neurons.tail).sum() - outputs.gather(1, neurons.front).sum()
        (rho,) = torch.autograd.grad(loss if sign == "tail-front" else -loss, x)
    low, high = rho.flatten(1).aminmax(dim=1)
    spread = high - low
    usable = (spread > 0) & spread.isfinite()
    normalised = rho / torch.where(usable, spread, 1).reshape(-1, 1, 1, 1)
    rho = torch.where(usable.reshape(-1, 1, 1, 1), normalised, 0)
    return Gradients(rho, usable, neurons, influence, logits.detach())


def choose_examples(
    classifier: Classifier,
    images: Tensor,
    targets: Tensor,
    count: int,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Tensor:
    """Return which images, uint8 (N, C, H, W), become candidates: at most ``count`` that are classified correctly.

    One of each class comes first, where any of its images is right, even if those are more than ``count``; then others
    in an order drawn from ``seed``. Raises ``ValueError`` for a classifier that gets nothing right.
    """

    @torch.no_grad()
    def right(rows: Tensor) -> Tensor:
        parts = [classifier(to_float(images[part].to(device))).argmax(1).cpu() for part in rows.split(batch_size)]
        return torch.cat(parts) == targets[rows]

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = [_one_of_each(order, targets, right, batch_size)]
    found = len(chosen[0])
    if not found:
        raise ValueError(f"The classifier gets none of the {len(images)} images right, so that there is no candidate.")
    progress(min(found, count), count)
    for rows in order[~torch.isin(order, chosen[0])].split(batch_size):
        if found >= count:
            break
        chosen.append(rows[right(rows)][: count - found])
        found += len(chosen[-1])
        progress(found, count)
    return torch.cat(chosen)


def _one_of_each(order: Tensor, targets: Tensor, right: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
    """Return the first row of each class that is right, looking at more of those classes where none is yet."""
    waiting = {int(c): order[targets[order] == c] for c in targets.unique()}
    chosen: list[int] = []
    size = 1
    while waiting:
        heads = {c: rows[:size] for c, rows in waiting.items()}
        answered = right(torch.cat(list(heads.values()))).split([len(rows) for rows in heads.values()])
        for (c, rows), hits in zip(heads.items(), answered, strict=True):
            waiting[c] = waiting[c][size:]
            if hits.any():
                chosen.append(int(rows[hits][0]))
            if hits.any() or not len(waiting[c]):
                del waiting[c]
        size = min(2 * size, batch_size)
    return torch.tensor(chosen, dtype=torch.int64)


def build_pool(
    classifier: Classifier,
    layer: Layer,
    images: Tensor,
    targets: Tensor,
    plan: NipPlan,
    *,
    device: torch.device,
    progress: Progress,
) -> BuiltPool:
    """Make one candidate of each of a plan's number of benign images, uint8 (N, C, H, W) (algorithm 2).

    The template is that of the same images. Beside the pool itself one batch of ``plan.batch_size`` is in memory. The
    same plan gives the same pool. The classifier is in evaluation mode on ``device``. Raises ``LayerUnsuitable``,
    ``PoolTooLarge``, and ``ValueError`` where nothing is classified correctly or no image gives a gradient.
    """
    width = check_layer(layer, plan.k1, plan.k2)
    check_size(InversePerturbationConfig.planned(plan, classifier, layer, min(plan.pool_size, len(images))))
    head = head_behind(classifier, layer).to(device)
    rows = choose_examples(
        classifier,
        images,
        targets,
        plan.pool_size,
        seed=plan.seed,
        batch_size=plan.batch_size,
        device=device,
        progress=lambda done, total: progress("benign examples", done, total),
    )

    def batches(stage: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images of the candidates and their classes."""
        for part in rows.split(plan.batch_size):
            yield to_float(images[part].to(device)), targets[part]
            done[stage] = done.get(stage, 0) + len(part)
            progress(stage, done[stage], len(rows))

    done: dict[str, int] = {}

    @torch.no_grad()
    def remaining() -> Iterator[tuple[Tensor, Tensor]]:
        for x, predicted in batches("template"):
            logits, activations = classifier.logits_and_features(x, layer.name)
            influence = log_odds_influence(head, x, activations, logits)
            yield select_neurons(influence, plan.k1, plan.k2).remaining, predicted

    remained = count_remaining(remaining(), classifier.classes, width)
    template = build_template(plan.template, remained, width - plan.k1 - plan.k2, plan.template_share)
    config = InversePerturbationConfig.planned(plan, classifier, layer, len(rows))
    config = replace(config, template_sizes=template.sizes)
    pool = InversePerturbation(config, head).pool
    kept = 0
    for x, classes in batches("candidates"):
        made = inverse_perturbations(classifier, layer.name, head, x, k1=plan.k1, k2=plan.k2, sign=plan.sign)
        usable = made.usable.cpu()
        end = kept + int(usable.sum())
        pool.perturbations[kept:end] = made.rho.cpu()[usable]
        pool.keys[kept:end] = _keys(plan, made, template.sequences.to(device)).cpu()[usable]
        pool.classes[kept:end] = classes[usable]
        kept = end
    if not kept:
        raise ValueError(f"None of the {len(rows)} benign images gives a gradient of the layer {layer.name!r}.")
    trimmed = Pool(pool.perturbations[:kept], pool.keys[:kept], pool.classes[:kept], template.sequences)
    return BuiltPool(trimmed, replace(config, candidates=kept), len(rows) - kept)


def check_size(config: InversePerturbationConfig) -> None:
    """Raise ``PoolTooLarge`` for a pool that leaves a classifier no room in one ONNX graph."""
    if config.pool_bytes > LARGEST_POOL:
        raise PoolTooLarge(config)


def _keys(plan: NipPlan, made: Gradients, template: Tensor) -> Tensor:
    """Return what images are compared with: similarities (N,), or influence vectors of length 1 (N, D)."""
    if plan.similarity == "influence":
        return F.normalize(made.influence, dim=1)
    return index_similarity(made.neurons.remaining, template, made.logits.argmax(1))

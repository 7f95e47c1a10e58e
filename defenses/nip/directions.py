"""The mean inverse perturbation of each class."""

import torch
from torch import Tensor

from defenses.classifier import Classifier, Layer
from defenses.evaluation import Progress
from defenses.nip.head import head_behind
from defenses.nip.influence import check_layer
from defenses.nip.pool import choose_examples, inverse_perturbations
from defenses.nip.push import unit
from defenses.pixels import to_float


def mean_directions(
    classifier: Classifier,
    layer: Layer,
    images: Tensor,
    targets: Tensor,
    *,
    k1: int,
    k2: int,
    count: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Tensor:
    """Return (K, C, H, W) of L2 norm 1: the mean over benign images of each class of their inverse perturbations.

    They are made as printed, tail less front (equations 5 and 6), of at most ``count`` of the images, uint8
    (N, C, H, W), that are classified correctly; each counts the same whatever its gradient's size. A class of which
    there is none takes the mean over all. The classifier is in evaluation mode on ``device``. Raises
    ``LayerUnsuitable``, and ``ValueError`` where nothing is classified correctly or no image gives a gradient.
    """
    check_layer(layer, k1, k2)
    head = head_behind(classifier, layer).to(device)
    rows = choose_examples(
        classifier,
        images,
        targets,
        count,
        seed=seed,
        batch_size=batch_size,
        device=device,
        progress=lambda done, total: progress("benign examples", done, total),
    )
    sums = torch.zeros(classifier.classes, *classifier.image_shape)
    done = 0
    for part in rows.split(batch_size):
        x = to_float(images[part].to(device))
        made = inverse_perturbations(classifier, layer.name, head, x, k1=k1, k2=k2, sign="tail-front")
        sums.index_add_(0, targets[part], unit(made.rho).cpu())
        done += len(part)
        progress("directions", done, len(rows))
    if not sums.any():
        raise ValueError(f"None of the {len(rows)} benign images gives a gradient of the layer {layer.name!r}.")
    missing = ~sums.flatten(1).any(1)
    sums[missing] = sums.sum(0)
    return unit(sums)

"""Front, remaining and tail neurons, the template of benign ones, and the similarity to it (NIP, 4.1 and 4.2)."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TemplateKind = Literal["global", "class", "frequency"]


class Neurons(NamedTuple):
    """A layer's neurons by influence, descending: front (N, k1), remaining (N, D - k1 - k2) and tail (N, k2), int64."""

    front: Tensor
    remaining: Tensor
    tail: Tensor


def select_neurons(influence: Tensor, k1: int, k2: int) -> Neurons:
    """Return the neurons (0 to D - 1) sorted by their influence (N, D), D at least k1 + k2 (algorithm 1).

    Of equal influences the lower index comes first.
    """
    order = _descending(influence)
    end = influence.shape[1] - k2
    return Neurons(order[:, :k1], order[:, k1:end], order[:, end:])


def _descending(influence: Tensor) -> Tensor:
    # ONNX says of TopK that the lower of equal ones comes first; torch says so of a stable sort alone, which its
    # exporter does not know.
    if torch.compiler.is_exporting():
        return influence.topk(influence.shape[1], dim=1).indices
    return influence.sort(dim=1, descending=True, stable=True).indices


class Template(NamedTuple):
    """Sequences of neurons that remain in benign examples, float32 (rows, D - k1 - k2), each ascending, then zeros.

    There is one row for every predicted class, or one for all. ``sizes`` are their lengths without the zeros.
    """

    sequences: Tensor
    sizes: tuple[int, ...]


class Remained(NamedTuple):
    """How often each neuron remained in benign examples of each predicted class, (K, D), of so many examples (K,)."""

    counts: Tensor
    examples: Tensor


def count_remaining(batches: Iterable[tuple[Tensor, Tensor]], classes: int, width: int) -> Remained:
    """Count over batches of remaining neurons (N, R) and predicted classes (N,), int64."""
    counts = torch.zeros(classes, width, dtype=torch.int64)
    examples = torch.zeros(classes, dtype=torch.int64)
    for remaining, predicted in batches:
        member = torch.zeros(len(remaining), width, dtype=torch.int64).scatter_(1, remaining.cpu(), 1)
        counts.index_add_(0, predicted.cpu(), member)
        examples += predicted.cpu().bincount(minlength=classes)
    return Remained(counts, examples)


def build_template(kind: TemplateKind, remained: Remained, length: int, share: float) -> Template:
    """Return the template of benign examples (equation 3), each row padded with zeros to ``length``.

    ``global`` is the intersection over all examples, as printed, ``class`` that over the examples of each predicted
    class, and ``frequency`` what remains in at least a ``share`` of all; of more than ``length`` of these the most
    frequent are taken, of equal ones the lower. A class without examples has an empty row.
    """
    counts, examples = remained
    if kind == "class":
        rows = [_common(counts[c], int(examples[c]), 1.0, length) for c in range(len(counts))]
    else:
        rows = [_common(counts.sum(0), int(examples.sum()), share if kind == "frequency" else 1.0, length)]
    sequences = torch.zeros(len(rows), length)
    for row, neurons in zip(sequences, rows, strict=True):
        row[: len(neurons)] = neurons.float()
    return Template(sequences, tuple(len(neurons) for neurons in rows))


def _common(counts: Tensor, examples: int, share: float, length: int) -> Tensor:
    """Return the neurons that remain in a share of the examples, ascending, the most frequent ``length`` of them."""
    if not examples:
        return counts.new_zeros(0)
    order = counts.sort(descending=True, stable=True).indices
    return order[counts[order] >= share * examples][:length].sort().values


def index_similarity(remaining: Tensor, template: Tensor, predicted: Tensor) -> Tensor:
    """Return (N,) the cosine between the indices of remaining neurons (N, R) and the template (rows, R) (equation 4).

    The neurons stand in the order of their influence, as printed, and are numbered from 0. With more than one row the
    row of the predicted class (N,) is taken. An empty template gives 0.
    """
    indices = remaining.to(template.dtype)
    rows = template.index_select(0, predicted) if len(template) > 1 else template
    # Norms of whole numbers are 0 or at least 1.
    norms: Tensor = indices.norm(dim=1) * rows.norm(dim=1)
    return (indices * rows).sum(1) / norms.clamp(min=1)

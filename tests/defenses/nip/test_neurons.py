"""Selection, template and similarity, by examples that were worked out by hand."""

import pytest
import torch

from defenses.nip import Template, build_template, count_remaining, index_similarity, select_neurons

INFLUENCE = torch.tensor([[0.1, 0.9, -0.5, 0.3, 0.0, -0.2], [0.4, 0.3, 0.2, 0.1, 0.0, -0.1]])


def template(kind: str, *, share: float = 1.0, classes: int = 2) -> Template:
    """The template of the two examples, the first predicted as class 1, the second as class 0; k1 = 2, k2 = 1."""
    neurons = select_neurons(INFLUENCE, 2, 1)
    remained = count_remaining([(neurons.remaining, torch.tensor([1, 0]))], classes, 6)
    return build_template(kind, remained, 3, share)


def test_neurons_are_sorted_by_influence():
    neurons = select_neurons(INFLUENCE, 2, 1)
    assert neurons.front.tolist() == [[1, 3], [0, 1]]
    assert neurons.remaining.tolist() == [[0, 4, 5], [2, 3, 4]]
    assert neurons.tail.tolist() == [[2], [5]]


@pytest.mark.parametrize(("k1", "k2", "widths"), [(0, 2, (0, 4, 2)), (2, 0, (2, 4, 0)), (3, 3, (3, 0, 3))])
def test_either_end_may_be_left_out(k1, k2, widths):
    neurons = select_neurons(INFLUENCE, k1, k2)
    assert tuple(part.shape[1] for part in neurons) == widths
    assert torch.cat(list(neurons), 1)[0].tolist() == [1, 3, 0, 4, 5, 2]


def test_of_equal_influences_the_lower_index_comes_first():
    influence = torch.tensor([[0.0, 1.0, -0.0, 0.0, 1.0, -1.0]])
    neurons = select_neurons(influence, 2, 2)
    assert torch.cat(list(neurons), 1)[0].tolist() == [1, 4, 0, 2, 3, 5]


def test_the_template_is_the_intersection_and_padded_with_zeros():
    printed = template("global")
    assert printed.sequences.tolist() == [[4, 0, 0]]
    assert printed.sizes == (1,)


def test_a_template_for_each_class_has_a_row_for_each_and_none_for_a_class_without_examples():
    by_class = template("class", classes=3)
    assert by_class.sequences.tolist() == [[2, 3, 4], [0, 4, 5], [0, 0, 0]]
    assert by_class.sizes == (3, 3, 0)


def test_a_template_of_frequency_takes_what_remains_often_and_no_more_than_fits():
    # 4 remains twice, 0, 2, 3 and 5 once each: of these the lowest two have room.
    often = template("frequency", share=0.5)
    assert often.sequences.tolist() == [[0, 2, 4]]
    assert template("frequency", share=0.6).sequences.tolist() == [[4, 0, 0]]


def test_counts_add_up_over_batches():
    neurons = select_neurons(INFLUENCE, 2, 1)
    predicted = torch.tensor([1, 0])
    whole = count_remaining([(neurons.remaining, predicted)], 2, 6)
    rows = [(neurons.remaining[place : place + 1], predicted[place : place + 1]) for place in range(2)]
    parts = count_remaining(iter(rows), 2, 6)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.tolist() == [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 1, 1]]
    assert parts.examples.tolist() == [1, 1]


def test_similarity_is_the_cosine_of_index_sequences():
    remaining = torch.tensor([[3, 4, 5], [5, 4, 3]])
    rows = torch.tensor([[4.0, 0.0, 0.0]])
    found = index_similarity(remaining, rows, torch.tensor([0, 1]))
    norm = (9 + 16 + 25) ** 0.5
    assert found.tolist() == pytest.approx([3 / norm, 5 / norm])


def test_similarity_takes_the_template_of_the_predicted_class():
    remaining = torch.tensor([[3, 4, 5], [3, 4, 5]])
    rows = torch.tensor([[3.0, 4.0, 5.0], [5.0, 0.0, 0.0]])
    assert index_similarity(remaining, rows, torch.tensor([0, 1])).tolist() == pytest.approx([1, 3 / 50**0.5])


@pytest.mark.parametrize("remaining", [[[0, 0, 0]], [[3, 4, 5]], [[]]])
def test_an_empty_template_has_similarity_zero(remaining):
    indices = torch.tensor(remaining, dtype=torch.int64)
    found = index_similarity(indices, torch.zeros(1, indices.shape[1]), torch.tensor([0]))
    assert found.tolist() == [0]

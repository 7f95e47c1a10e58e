"""Neuron influence beside what autograd makes of equation 2, and which layers and heads it can be had of."""

import pytest
import torch
from torch import Tensor, nn

from defenses.classifier import Classifier, Layer
from defenses.nip import (
    AutogradHead,
    ChainHead,
    HeadUnsuitable,
    LayerUnsuitable,
    head_behind,
    influence,
    log_odds_influence,
    neuron_outputs,
    select_neurons,
)
from defenses.nip.influence import check_layer
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier


def by_autograd(head: nn.Module, activations: Tensor) -> Tensor:
    """Equation 2 as it stands, in double precision; of maps (N, C, H, W) by a shift of the whole map."""
    outputs = neuron_outputs(activations.double())
    shift = torch.zeros_like(outputs, requires_grad=True)
    spread = shift[:, :, None, None] if activations.ndim == 4 else shift
    y = head(activations.double() + spread).softmax(1)
    (derivative,) = torch.autograd.grad(y.amax(1).sum(), shift)
    return derivative * outputs


@pytest.mark.parametrize("form", ["linear", "dropout", "product", "deep", "maps"])
def test_forward_operations_give_what_autograd_gives(network, classifier, layer_of, splits, form):
    before, behind = network(form)
    subject = classifier(form)
    head = head_behind(subject, subject.resolve_layer(layer_of(form)))
    assert isinstance(head, ChainHead)
    assert head.linear == (form != "deep")
    x = splits.test.images[:40].float() / 255
    with torch.no_grad():
        activations = before(x).double()
        behind = behind.double()
        logits = behind(activations)
        found = influence(head.double(), x, activations, logits)
    expected = by_autograd(behind, activations)
    behind.float()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("form", ["deep", "smooth"])
def test_autograd_on_the_graph_gives_the_same_for_a_head_of_any_form(network, classifier, layer_of, splits, form):
    subject, (_, behind) = classifier(form), network(form)
    layer = layer_of(form)
    reason = HeadUnsuitable(layer, "it is asked for")
    x = splits.test.images[:20].float() / 255
    with torch.no_grad():
        logits, activations = subject.logits_and_features(x, layer)
        found = influence(AutogradHead(subject, layer, reason), x, activations, logits)
    expected = by_autograd(behind.double(), activations)
    behind.float()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-7)


def test_a_closed_form_is_found_behind_a_linear_head_alone(network, classifier, layer_of, splits):
    subject, (_, behind) = classifier("linear"), network("linear")
    x = splits.test.images[:20].float() / 255
    logits, activations = subject.logits_and_features(x, layer_of("linear"))
    y, weight = logits.softmax(1), behind[0].weight
    c = logits.argmax(1)
    expected = y.gather(1, c[:, None]) * (weight[c] - y @ weight) * activations
    head = head_behind(subject, subject.head_layer)
    torch.testing.assert_close(influence(head, x, activations, logits), expected, rtol=1e-3, atol=1e-5)


def test_the_order_of_the_neurons_survives_a_classifier_that_is_sure(network, classifier, layer_of, splits):
    subject, (_, behind) = classifier("linear"), network("linear")
    x = splits.test.images[:40].float() / 255
    _, activations = subject.logits_and_features(x, layer_of("linear"))
    head = head_behind(subject, subject.head_layer)
    surest = 0
    for factor in (1, 2, 4, 8):
        outputs = factor * activations
        logits = behind(outputs).detach()
        exact = by_autograd(behind.double(), outputs)
        left = 1 - behind(outputs.double()).softmax(1).amax(1)
        behind.float()
        # Single precision rounds these softmaxes to 1, double precision has digits of their complement left.
        rows = (logits.softmax(1).amax(1) == 1) & (left > 1e-12)
        surest += int(rows.sum())
        exact, found = exact[rows], log_odds_influence(head, x, outputs, logits)[rows].double()
        exact, found = (each / each.abs().amax(1, keepdim=True) for each in (exact, found))
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
    assert surest > 10


def test_dead_neurons_have_no_influence_and_ties_go_to_the_lower_index(classifier, layer_of, splits):
    subject = classifier("linear")
    x = splits.test.images[:5].float() / 255
    logits, activations = subject.logits_and_features(x, layer_of("linear"))
    activations = activations.clone()
    activations[:, 4:] = 0
    found = log_odds_influence(head_behind(subject, subject.head_layer), x, activations, logits)
    assert (found[:, 4:] == 0).all()
    neurons = select_neurons(found, 5, 5)
    order = torch.cat(list(neurons), 1)
    for row in order.tolist():
        assert [index for index in row if index >= 4] == list(range(4, 32))


def test_a_head_that_is_no_chain_is_left_to_autograd_and_says_why(classifier, layer_of):
    subject = classifier("smooth")
    head = head_behind(subject, subject.resolve_layer(layer_of("smooth")))
    assert isinstance(head, AutogradHead)
    assert "Sigmoid" in str(head.reason)
    assert "cannot be served as one graph" in str(head.reason)


class Bypassed(nn.Module):
    """A classifier whose logits depend on the image directly too."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.head = nn.Linear(64, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.side(x.flatten(1))) + x.flatten(1)[:, :10]


def test_a_layer_that_the_logits_pass_by_has_no_chain():
    subject = Classifier(canonicalise(export_classifier(Bypassed().eval(), (1, 8, 8))))
    head = head_behind(subject, subject.resolve_layer("side"))
    assert isinstance(head, AutogradHead)
    assert "past that layer" in str(head.reason)


@pytest.mark.parametrize("shape", [(9,), (9, 4, 4)])
def test_a_layer_of_fewer_neurons_than_are_taken_is_refused(shape):
    layer = Layer("pooled", "", "Relu", shape)
    assert check_layer(layer, 5, 4) == 9
    with pytest.raises(LayerUnsuitable, match=r"at least 10 in all, but the layer 'pooled' has shape \(9"):
        check_layer(layer, 5, 5)


def test_a_layer_of_tokens_is_refused():
    with pytest.raises(LayerUnsuitable, match="a vector"):
        check_layer(Layer("tokens", "", "Add", (196, 192)), 5, 5)

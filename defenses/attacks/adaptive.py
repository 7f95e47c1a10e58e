"""Attacks that know of NIP: S-ALA and R-ALA, crafted on the bare classifier (NIP, section 7.1)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.classifier import Classifier, Layer
from defenses.nip.influence import LayerUnsuitable, check_layer, neuron_outputs
from defenses.nip.neurons import select_neurons


class ClassifierOpaque(TypeError):
    """A model's neurons cannot be looked at, since it is no ``Classifier``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        name = type(model).__name__
        super().__init__(f"Expected a Classifier, whose neurons S-ALA and R-ALA look at, got a model of type {name}.")


def smooth_adaptive(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    weight: float,
    log_odds: bool,
) -> Tensor:
    """Return x changed until it is misclassified with influences like those of x: S-ALA (equation 11).

    What falls is MSE(influences of x, influences of x_adv) - ``weight`` * J, over all neurons of the layer found for
    NIP, each image's for the class that it is itself predicted as; J is the cross-entropy of x_adv and y. ``x`` is
    (N, C, H, W) in [0, 1], ``y`` (N,) int64. Each of ``steps`` from x goes ``step_size`` along the gradient's sign and
    back into the range and into an L-infinity ball of ``epsilon``, of which the paper says nothing; the last images are
    returned. With a ``weight`` of 0 those are x, where the MSE is least.

    The influences on the confidence, as printed, vanish where the classifier is sure: the MSE is then nothing beside J,
    and with a ``weight`` of 1 this comes to PGD. With ``log_odds`` those on the log odds are compared: they order the
    neurons alike, do not vanish, and their MSE is of J's size.

    Raises ``ClassifierOpaque``, and ``LayerNotFound`` and ``LayerUnsuitable`` for a classifier that NIP cannot look at.
    """
    classifier, layer = _looked_at(model)
    check_layer(layer, 0, 0)
    clean = influence_by_autograd(classifier, layer, x, log_odds=log_odds)[0].detach()

    def gain(x_adv: Tensor) -> Tensor:
        influence, logits = influence_by_autograd(classifier, layer, x_adv, log_odds=log_odds)
        return weight * F.cross_entropy(logits, y, reduction="sum") - _squared_error(influence, clean)

    return _climbed(gain, x, epsilon, step_size, steps)


def remaining_adaptive(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    weight: float,
    log_odds: bool,
    k1: int,
    k2: int,
) -> Tensor:
    """Return x changed until it is misclassified with remaining neurons unlike those of x: R-ALA (equation 12).

    What rises is MSE(influences of x, influences of x_adv) + ``weight`` * J, over the neurons that are neither among
    the ``k1`` front nor the ``k2`` tail neurons of x. All else is as for ``smooth_adaptive``, and a layer in which no
    neuron remains is ``LayerUnsuitable`` too.
    """
    classifier, layer = _looked_at(model)
    if check_layer(layer, k1, k2) == k1 + k2:
        raise LayerUnsuitable(layer, f"neurons that remain beside {k1} front and {k2} tail neurons")
    by_odds = influence_by_autograd(classifier, layer, x, log_odds=True)[0].detach()
    remaining = select_neurons(by_odds, k1, k2).remaining
    clean = influence_by_autograd(classifier, layer, x, log_odds=log_odds)[0].detach().gather(1, remaining)

    def gain(x_adv: Tensor) -> Tensor:
        influence, logits = influence_by_autograd(classifier, layer, x_adv, log_odds=log_odds)
        unlike = _squared_error(influence.gather(1, remaining), clean)
        return unlike + weight * F.cross_entropy(logits, y, reduction="sum")

    return _climbed(gain, x, epsilon, step_size, steps)


@torch.enable_grad()
def influence_by_autograd(classifier: Classifier, layer: Layer, x: Tensor, *, log_odds: bool) -> tuple[Tensor, Tensor]:
    """Return the influences (N, D) on each image's own predicted class, and the logits (N, K).

    They are those on its confidence (equation 2), or on its ``log_odds``, for a head of any form, and can be
    differentiated by the images x (N, C, H, W).
    """
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    logits, activations = classifier.logits_and_features(x, layer.name)
    c = logits.argmax(1, keepdim=True)
    odds = logits.gather(1, c).squeeze(1) - logits.scatter(1, c, -torch.inf).logsumexp(1)
    # y_c - 1 has the derivatives of y_c, and does not round to a constant where the classifier is sure.
    explained = odds if log_odds else -(-odds).sigmoid()
    (derivative,) = torch.autograd.grad(explained.sum(), activations, create_graph=True)
    if derivative.ndim == 4:
        derivative = derivative.sum((2, 3))
    return derivative * neuron_outputs(activations), logits


def _looked_at(model: nn.Module) -> tuple[Classifier, Layer]:
    if not isinstance(model, Classifier):
        raise ClassifierOpaque(model)
    return model, model.head_layer


def _squared_error(influence: Tensor, clean: Tensor) -> Tensor:
    """Return the mean over an image's neurons (N, D) of the squared difference, summed over the images."""
    return (influence - clean).square().mean(1).sum()


def _climbed(gain: Callable[[Tensor], Tensor], x: Tensor, epsilon: float, step_size: float, steps: int) -> Tensor:
    """Return x after signed steps up a gain, each image within its own ball: the gain is a sum over the images."""
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    x_adv = x.detach()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(gain(x_adv), x_adv)
        x_adv = (x_adv.detach() + step_size * gradient.sign()).clamp(low, high)
    return x_adv

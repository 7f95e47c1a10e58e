"""Neuron influence: what each neuron contributes to the predicted class (NIP, equations 1 and 2)."""

import torch
from torch import Tensor

from defenses.classifier import Layer
from defenses.nip.head import Head


class LayerUnsuitable(ValueError):
    """A layer's neurons are not what NIP can look at."""

    def __init__(self, layer: Layer, expected: str) -> None:
        self.layer = layer
        super().__init__(f"NIP looks at {expected}, but the layer {layer.name!r} has shape {layer.shape}.")


def check_layer(layer: Layer, k1: int, k2: int) -> int:
    """Return how many neurons a layer has.

    Raises ``LayerUnsuitable`` for a layer that is neither a vector nor maps, and for one of fewer than k1 + k2 neurons.
    """
    if len(layer.shape) not in (1, 3):
        raise LayerUnsuitable(layer, "a vector (D,) or maps (C, H, W) per image")
    width = layer.shape[0]
    if width < k1 + k2:
        raise LayerUnsuitable(layer, f"{k1} front and {k2} tail neurons, at least {k1 + k2} in all")
    return width


def neuron_outputs(activations: Tensor) -> Tensor:
    """Return the neurons' outputs (N, D) of activations (N, D), or (N, D, H, W) averaged over the map (equation 1)."""
    return activations.mean((2, 3)) if activations.ndim == 4 else activations


def influence(head: Head, x: Tensor, activations: Tensor, logits: Tensor) -> Tensor:
    """Return the influence (N, D) of each neuron on the predicted class c: d y_c / d phi times phi (equation 2).

    y is the softmax of the logits (N, K), ``activations`` (N, D) or (N, D, H, W) are those of the images x. Of a map
    phi is the mean, and the derivative that with respect to the mean: a shift of the whole map, so that it is the sum
    of the derivatives over the map.
    """
    others = logits.masked_fill(_one_hot(logits, logits.argmax(1)), -torch.inf).logsumexp(1, keepdim=True)
    total = logits.logsumexp(1, keepdim=True)
    # y_c (1 - y_c), without the difference, of which nothing is left where y_c rounds to 1.
    slope = (logits.amax(1, keepdim=True) - total).exp() * (others - total).exp()
    return slope * log_odds_influence(head, x, activations, logits)


def log_odds_influence(
    head: Head, x: Tensor, activations: Tensor, logits: Tensor, classes: Tensor | None = None
) -> Tensor:
    """Return the influence (N, D) on the log odds of the predicted class, ln(y_c / (1 - y_c)), or of ``classes`` (N,).

    It is that of equation 2 divided by y_c (1 - y_c), which is one positive factor per image: the order of the neurons
    and every cosine are the same, and nothing is lost to rounding where the classifier is sure. Behind a linear head,
    with q the softmax over the other classes, it is (W_c - sum_k q_k W_k) phi.
    """
    derivative = head.derivative(x, activations, log_odds_gradient(logits, classes))
    if derivative.ndim == 4:
        derivative = derivative.sum((2, 3))
    return derivative * neuron_outputs(activations)


def log_odds_gradient(logits: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return the gradient (N, K) of ln(y_c / (1 - y_c)) by the logits: 1 at c, minus the softmax over the others.

    c is the predicted class, of equal ones the first, unless ``classes`` (N,) say otherwise.
    """
    own = _one_hot(logits, logits.argmax(1) if classes is None else classes)
    return own.to(logits.dtype) - logits.masked_fill(own, -torch.inf).softmax(1)


def _one_hot(logits: Tensor, classes: Tensor) -> Tensor:
    """Return (N, K) bool which of the logits (N, K) are those of the classes (N,)."""
    return torch.arange(logits.shape[1], device=logits.device) == classes.unsqueeze(1)

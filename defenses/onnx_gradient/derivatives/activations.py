"""Activation functions: the gradient times the slope at each element, at a kink torch's."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from defenses.onnx_gradient.step import Derivative, Step

SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def relu(step: Step) -> str:
    """Relu, 0 at 0; by its output, so that a runtime may fuse it with the convolution before it."""
    return step.mask("Greater", step.output, 0.0)


def leaky_relu(step: Step) -> str:
    """LeakyRelu."""
    return step.write("Where", step.write("Greater", step.input(), 0.0), 1.0, step.node.get("alpha", 0.01))


def prelu(step: Step) -> str:
    """PRelu by its input."""
    return step.write("Where", step.write("Greater", step.input(), 0.0), 1.0, step.input(1))


def clip(step: Step) -> str:
    """Clip, 1 at the bounds."""
    low = step.mask("GreaterOrEqual", step.input(), step.input(1)) if step.has(1) else ""
    high = step.mask("LessOrEqual", step.input(), step.input(2)) if step.has(2) else ""
    if low and high:
        return step.write("Mul", low, high)
    return low or high or step.constant(1.0)


def sigmoid(step: Step) -> str:
    """Sigmoid."""
    return step.write("Mul", step.output, step.write("Sub", 1.0, step.output))


def hard_sigmoid(step: Step) -> str:
    """HardSigmoid, 0 where it touches its bounds."""
    above, below = step.mask("Greater", step.output, 0.0), step.mask("Less", step.output, 1.0)
    return step.write("Mul", step.write("Mul", above, below), step.node.get("alpha", 0.2))


def hard_swish(step: Step) -> str:
    """HardSwish."""
    x = step.input()
    between = step.write("Add", step.write("Div", x, 3.0), 0.5)
    below_three = step.write("Where", step.write("Less", x, 3.0), between, 1.0)
    return step.write("Where", step.write("LessOrEqual", x, -3.0), 0.0, below_three)


def tanh(step: Step) -> str:
    """Tanh."""
    return step.write("Sub", 1.0, step.write("Mul", step.output, step.output))


def elu(step: Step) -> str:
    """Elu."""
    return _exponential_below(step, step.node.get("alpha", 1.0), 1.0)


def selu(step: Step) -> str:
    """Selu."""
    gamma = step.node.get("gamma", SELU_GAMMA)
    return _exponential_below(step, gamma * step.node.get("alpha", SELU_ALPHA), gamma)


def _exponential_below(step: Step, depth: float, slope: float) -> str:
    below = step.write("Add", step.output, depth)
    return step.write("Where", step.write("Greater", step.input(), 0.0), slope, below)


def softplus(step: Step) -> str:
    """Softplus."""
    return step.write("Sigmoid", step.input())


def softsign(step: Step) -> str:
    """Softsign."""
    size = step.write("Add", step.write("Abs", step.input()), 1.0)
    return step.write("Reciprocal", step.write("Mul", size, size))


def mish(step: Step) -> str:
    """Mish: with t the tanh of the softplus, t + x sigmoid(x) (1 - t^2)."""
    t = step.write("Tanh", step.write("Softplus", step.input()))
    turned = step.write("Mul", step.input(), step.write("Sigmoid", step.input()))
    flat = step.write("Sub", 1.0, step.write("Mul", t, t))
    return step.write("Add", t, step.write("Mul", turned, flat))


def gelu(step: Step) -> str:
    """Gelu: Phi(x) + x phi(x), or the derivative of its approximation by a tanh."""
    if step.node.get("approximate", "none") == "tanh":
        return _gelu_by_tanh(step)
    x = step.input()
    share = step.write("Add", step.write("Erf", step.write("Mul", x, math.sqrt(0.5))), 1.0)
    bell = step.write("Exp", step.write("Mul", step.write("Mul", x, x), -0.5))
    density = step.write("Mul", bell, 1 / math.sqrt(2 * math.pi))
    return step.write("Add", step.write("Mul", share, 0.5), step.write("Mul", x, density))


def _gelu_by_tanh(step: Step) -> str:
    x, scale, cubic = step.input(), math.sqrt(2 / math.pi), 0.044715
    square = step.write("Mul", x, x)
    bend = step.write("Add", step.write("Mul", square, scale * cubic), scale)
    t = step.write("Tanh", step.write("Mul", x, bend))
    share = step.write("Mul", step.write("Add", t, 1.0), 0.5)
    slope = step.write("Add", step.write("Mul", square, 3 * scale * cubic), scale)
    flat = step.write("Sub", 1.0, step.write("Mul", t, t))
    turned = step.write("Mul", step.write("Mul", step.write("Mul", x, 0.5), flat), slope)
    return step.write("Add", share, turned)


def _by_slope(slope: Callable[[Step], str]) -> Derivative:
    return Derivative(lambda step, place: step.write("Mul", step.gradient, slope(step)))


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        "Clip": _by_slope(clip),
        "Elu": _by_slope(elu),
        "Gelu": _by_slope(gelu),
        "HardSigmoid": _by_slope(hard_sigmoid),
        "HardSwish": _by_slope(hard_swish),
        "LeakyRelu": _by_slope(leaky_relu),
        "Mish": _by_slope(mish),
        "PRelu": _by_slope(prelu),
        "Relu": _by_slope(relu),
        "Selu": _by_slope(selu),
        "Sigmoid": _by_slope(sigmoid),
        "Softplus": _by_slope(softplus),
        "Softsign": _by_slope(softsign),
        "Tanh": _by_slope(tanh),
    }
)

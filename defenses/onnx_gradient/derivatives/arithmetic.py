"""Arithmetic of one value, or of several that broadcast: what was broadcast is summed back."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from defenses.onnx_gradient.step import Derivative, Step


def add(step: Step, place: int) -> str:
    """Add and Sum."""
    return step.summed(step.gradient, place)


def mean(step: Step, place: int) -> str:
    """Mean of several values."""
    return step.summed(step.write("Mul", step.gradient, 1 / len(step.node.inputs)), place)


def subtract(step: Step, place: int) -> str:
    """Sub."""
    return step.summed(step.write("Neg", step.gradient) if place else step.gradient, place)


def multiply(step: Step, place: int) -> str:
    """Mul."""
    return step.summed(step.write("Mul", step.gradient, step.input(1 - place)), place)


def divide(step: Step, place: int) -> str:
    """Div: by the divisor it is -y / b."""
    quotient = step.write("Div", step.gradient, step.input(1))
    if place:
        quotient = step.write("Neg", step.write("Mul", quotient, step.output))
    return step.summed(quotient, place)


def power(step: Step, place: int) -> str:
    """Pow with a constant exponent."""
    exponent = step.fixed(1)
    assert exponent is not None
    if exponent.numel() == 1 and exponent.item() == 2:
        slope = step.write("Mul", step.input(), 2.0)
    else:
        raised = step.write("Pow", step.input(), step.constant(exponent.numpy() - 1))
        slope = step.write("Mul", raised, step.constant(exponent.numpy()))
    return step.summed(step.write("Mul", step.gradient, slope), place)


def select(step: Step, place: int) -> str:
    """Where."""
    chosen = (step.gradient, 0.0) if place == 1 else (0.0, step.gradient)
    return step.summed(step.write("Where", step.input(0), *chosen), place)


def negate(step: Step, place: int) -> str:
    """Neg."""
    return step.write("Neg", step.gradient)


def absolute(step: Step, place: int) -> str:
    """Abs, 0 at 0."""
    return step.write("Mul", step.gradient, step.write("Sign", step.input()))


def exponential(step: Step, place: int) -> str:
    """Exp."""
    return step.write("Mul", step.gradient, step.output)


def logarithm(step: Step, place: int) -> str:
    """Log."""
    return step.write("Div", step.gradient, step.input())


def square_root(step: Step, place: int) -> str:
    """Sqrt."""
    return step.write("Div", step.write("Mul", step.gradient, 0.5), step.output)


def reciprocal(step: Step, place: int) -> str:
    """Reciprocal."""
    squared = step.write("Mul", step.output, step.output)
    return step.write("Neg", step.write("Mul", step.gradient, squared))


def error_function(step: Step, place: int) -> str:
    """Erf."""
    bell = step.write("Exp", step.write("Neg", step.write("Mul", step.input(), step.input())))
    return step.write("Mul", step.gradient, step.write("Mul", bell, 2 / math.sqrt(math.pi)))


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        "Abs": Derivative(absolute),
        "Add": Derivative(add, None),
        "Div": Derivative(divide, None),
        "Erf": Derivative(error_function),
        "Exp": Derivative(exponential),
        "Log": Derivative(logarithm),
        "Mean": Derivative(mean, None),
        "Mul": Derivative(multiply, None),
        "Neg": Derivative(negate),
        "Pow": Derivative(power),
        "Reciprocal": Derivative(reciprocal),
        "Sqrt": Derivative(square_root),
        "Sub": Derivative(subtract, None),
        "Sum": Derivative(add, None),
        "Where": Derivative(select, (1, 2)),
    }
)

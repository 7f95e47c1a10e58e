"""The derivative of each operator alone, on ONNX Runtime, against torch's through the interpreter."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from defenses.classifier import Classifier
from defenses.onnx_gradient import DERIVATIVES, GradientUnsupported, gradient_graph
from defenses.onnx_import import canonicalise

Array = NDArray[Any]


def noise(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


CONSTANTS: Mapping[str, Array] = {
    "half": np.array(0.5, np.float32),
    "four": np.array(4, np.float32),
    "cube": np.array(3, np.float32),
    "two": np.array(2, np.float32),
    "roots": np.array([[0.5], [2], [1.5]], np.float32)[..., None],
    "channel": noise(3, 1, 1),
    "row": noise(6),
    "bias": noise(4),
    "w": noise(4, 3, 3, 3),
    "wide": noise(4, 3, 3, 2),
    "dot": noise(4, 3, 1, 1),
    "depthwise": noise(6, 1, 3, 3),
    "own": noise(3, 1, 3, 3),
    "grouped": noise(6, 2, 3, 3),
    "w1": noise(4, 3, 3),
    "w3": noise(2, 3, 2, 2, 2),
    "square": noise(126, 5),
    "turned": noise(5, 126),
    "matrix": noise(6, 4),
    "stack": noise(3, 6, 4),
    "left": noise(5, 7),
    "positive": np.abs(noise(3)) + 0.5,
    "scale": noise(3),
    "shift": noise(3) * 2,
    "scale6": noise(6),
    "scale_2": noise(7, 6),
    "low": np.array(-0.7, np.float32),
    "high": np.array(0.9, np.float32),
    "i0": np.array(0, np.int64),
    "im2": np.array(-2, np.int64),
    "picks": ints(2, 0, -3, 2),
    "a2": ints(2),
    "a3": ints(3),
    "a23": ints(2, 3),
    "am1": ints(-1),
    "to": ints(-1, 21, 6),
    "to5": ints(0, 1, 3, 7, 6),
    "grown": ints(2, 1, 3, 7, 6),
    "parts": ints(1, 4, 2),
    "one": ints(1),
    "starts": ints(1, 5),
    "ends": ints(6, -100),
    "beyond": ints(6, 100),
    "steps": ints(2, -2),
    "pads": ints(0, 1, 0, 2, 0, 0, 3, -1),
    "pads_of_axes": ints(1, -1, 0, 2),
}

WINDOWS = [
    "y = Conv <pads = [1, 1, 1, 1]> (x, w, bias)",
    "y = Conv (x, w, bias)",
    "y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w)",
    "y = Conv <pads = [0, 2, 1, 0], strides = [2, 1]> (x, wide)",
    "y = Conv <pads = [0, 1, 2, 0]> (x, wide)",
    "y = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (x, w)",
    "y = Conv <pads = [2, 0, 0, 1], dilations = [2, 1], strides = [3, 2]> (x, w)",
    "y = Conv <pads = [3, 3, 3, 3]> (x, w)",
    "y = Conv <pads = [1, 0, 0, 1]> (x, dot)",
    "y = Conv (x, dot)",
    "y = Conv <strides = [2, 2]> (x, dot)",
    "y = Conv <strides = [4, 3]> (x, dot)",
    'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, wide)',
    'y = Conv <auto_pad = "SAME_LOWER"> (x, wide)',
    'y = Conv <auto_pad = "VALID", strides = [2, 2]> (x, wide)',
    "y = Conv <group = 3, pads = [1, 1, 1, 1]> (x, own)",
    "y = Conv <group = 3, pads = [1, 1, 1, 1]> (x, depthwise)",
    "y = Conv <group = 3, pads = [1, 1, 1, 1], strides = [2, 2]> (x, depthwise)",
    "z = Conv (x, dot) y = Conv <group = 2, pads = [1, 1, 1, 1]> (z, grouped)",
    "z = Conv (x, dot) y = Conv <group = 2, pads = [1, 1, 1, 1], strides = [2, 1]> (z, grouped)",
    "z = Reshape (x, flat_rows) y = Conv <pads = [1, 0], strides = [2]> (z, w1)",
    "z = Unsqueeze (x, a2) y = Conv <pads = [1, 0, 1, 1, 0, 0]> (z, w3)",
    "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)",
    "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)",
    "y = MaxPool <kernel_shape = [3, 2], pads = [0, 0, 1, 1]> (x)",
    "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)",
    "y = MaxPool <kernel_shape = [2, 2], dilations = [2, 3]> (x)",
    "y = MaxPool <kernel_shape = [2, 2], strides = [3, 4]> (x)",
    'y = MaxPool <kernel_shape = [3, 3], auto_pad = "SAME_UPPER", strides = [2, 2]> (x)',
    "z = Reshape (x, flat_rows) y = MaxPool <kernel_shape = [3], strides = [2]> (z)",
    "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)",
    "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)",
    "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1> (x)",
    "y = AveragePool <kernel_shape = [3, 2], strides = [2, 3], ceil_mode = 1> (x)",
    "y = AveragePool <kernel_shape = [2, 3], dilations = [2, 2], pads = [1, 0, 0, 1]> (x)",
    'y = AveragePool <kernel_shape = [2, 2], auto_pad = "SAME_UPPER"> (x)',
    "y = GlobalAveragePool (x)",
    "y = GlobalMaxPool (x)",
]

ARITHMETIC = [
    "y = Add (x, channel)",
    "y = Add (row, x)",
    "z = GlobalAveragePool (x) y = Add (z, x)",
    "y = Add (x, x)",
    "y = Sub (x, channel)",
    "z = ReduceMean (x, a3) y = Sub (z, x)",
    "y = Mul (x, channel)",
    "y = Mul (x, x)",
    "z = GlobalAveragePool (x) y = Mul (x, z)",
    "z = Reshape (x, to5) t = Mul (z, grown_row) u = ReduceSum (t, one) y = Mul (u, two)",
    "y = Div (x, channel)",
    "z = Add (image, half) y = Div (x, z)",
    "z = Add (image, half) t = ReduceMean (z, a23) y = Div (row, t)",
    "y = Sum (x, channel, x, row)",
    "y = Mean (x, row)",
    "y = Neg (x)",
    "y = Abs (x)",
    "y = Exp (x)",
    "z = Add (image, half) y = Log (z)",
    "z = Add (image, half) y = Sqrt (z)",
    "z = Add (image, half) y = Reciprocal (z)",
    "y = Pow (x, two)",
    "y = Pow (x, cube)",
    "z = Add (image, half) y = Pow (z, roots)",
    "y = Erf (x)",
    "b = Greater (x, row) y = Where (b, x, channel)",
    "b = Greater (x, row) z = Tanh (x) y = Where (b, row, z)",
    "b = Greater (x, row) z = ReduceMean (x, a3) y = Where (b, x, z)",
    "f = Floor (x) z = Sub (x, f) y = Mul (z, x)",
]

ACTIVATIONS = [
    *(
        f"y = {name} (x)"
        for name in ("Relu", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Tanh", "Elu", "Selu")
    ),
    *(f"y = {name} (x)" for name in ("Softplus", "Softsign", "Mish", "Gelu")),
    "y = LeakyRelu <alpha = 0.3> (x)",
    "y = HardSigmoid <alpha = 0.4, beta = 0.3> (x)",
    "y = Elu <alpha = 0.6> (x)",
    'y = Gelu <approximate = "tanh"> (x)',
    "y = PRelu (x, channel)",
    "y = Clip (x, low, high)",
    "y = Clip (x, low)",
    "y = Clip (x, , high)",
    "y = Clip (x)",
]

LINEAR = [
    "f = Flatten (x) y = Gemm (f, square, row5)",
    "f = Flatten (x) y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, turned, row5)",
    "f = Flatten (x) t = Transpose (f) y = Gemm <transA = 1> (t, square)",
    "f = Flatten (x) t = Transpose (f) z = Gemm <alpha = 2.0> (turned, t) y = Transpose (z)",
    "f = Flatten (x) t = Transpose (f) z = Gemm <transB = 1> (turned, f) y = Transpose (z)",
    "f = Flatten (x) z = Gemm <transA = 1, transB = 1> (square, f) y = Transpose (z)",
    "f = Flatten (x) t = Transpose (f) z = Gemm <transA = 1> (square, t) y = Transpose (z)",
    "f = Flatten (x) z = Gemm (f, square) t = Tanh (z) y = Gemm <beta = 3.0> (f, square, t)",
    "y = MatMul (x, matrix)",
    "y = MatMul (x, stack)",
    "y = MatMul (left, x)",
    "t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (x, t)",
    "z = ReduceMean (x, one) y = MatMul (z, stack)",
    "z = ReduceMean (x, one) y = MatMul (lefts, z)",
]

MOVES = [
    "y = Reshape (x, to)",
    "z = Flatten <axis = 2> (x) y = Reshape (z, to)",
    "z = Flatten <axis = 1> (x) y = Tanh (z)",
    "z = Unsqueeze (x, a2) y = Squeeze (z, a2)",
    "y = Transpose <perm = [0, 2, 3, 1]> (x)",
    "y = Identity (x)",
    "y = Dropout (x)",
    "z = Cast <to = 11> (x) t = Mul (z, z) y = Cast <to = 1> (t)",
    "z = Cast <to = 1> (x) y = Tanh (z)",
    "z = ReduceMean (x, a3) y = Expand (z, grown_last)",
    "t = Tanh (x) y = Concat <axis = 1> (x, t, x)",
    "t = ReduceMean (x, a3) y = Concat <axis = -1> (t, x)",
    "y = Slice (x, starts, ends, a23, steps)",
    "y = Slice (x, starts, beyond, a23)",
    "t = Slice (x, one, a3, a2) y = Slice (t, i0_, one, one)",
    "t = Transpose <perm = [0, 2, 3, 1]> (x) y = Slice (t, starts, ends, a12, steps)",
    "s = Shape (x) d = Gather (s, i2) h = Div (d, i2) u = Unsqueeze (h, i0_) y = Slice (x, i0_, u, a2)",
    "a, b, c = Split <axis = 2> (x, parts) y = Mul (b, channel)",
    "a, b, c = Split <axis = 2> (x, parts) d = Concat <axis = 2> (c, c, a) y = Tanh (d)",
    "y = Pad (x, pads)",
    "y = Pad (x, pads_of_axes, half, a23)",
    "y = Gather <axis = 2> (x, i0)",
    "y = Gather <axis = 1> (x, im2)",
    "y = Gather <axis = 3> (x, picks)",
    "y = Gather <axis = 1> (x, picks)",
    "s = Shape (x) n = Gather (s, i0) u = Unsqueeze (n, i0_) z = Concat <axis = 0> (u, whole) y = Reshape (x, z)",
]

REDUCTIONS = [
    "y = ReduceMean (x, a23)",
    "y = ReduceMean <keepdims = 0> (x, am1)",
    "y = ReduceSum <keepdims = 0> (x, a2)",
    "y = ReduceSum <noop_with_empty_axes = 1> (x)",
    "y = ReduceMax (x, a23)",
    "y = ReduceMin <keepdims = 0> (x, one)",
    "y = ReduceL2 (x, a3)",
]

NORMALISATIONS = [
    "y = BatchNormalization <epsilon = 0.01> (x, scale, shift, shift, positive)",
    "y = LayerNormalization (x, scale6, row)",
    "y = LayerNormalization <axis = 2, epsilon = 0.1> (x, scale_2)",
    "y = InstanceNormalization (x, scale, shift)",
    "y = Softmax (x)",
    "y = Softmax <axis = 1> (x)",
    "y = LogSoftmax <axis = 2> (x)",
]

MORE: Mapping[str, Array] = {
    "flat_rows": ints(-1, 3, 42),
    "grown_row": noise(2, 1, 1, 6),
    "row5": noise(5),
    "lefts": noise(3, 4, 7),
    "grown_last": ints(1, 1, 1, 4),
    "i0_": ints(0),
    "i2": np.array(2, np.int64),
    "a12": ints(1, 2),
    "whole": ints(126),
}

CASES = [*WINDOWS, *ARITHMETIC, *ACTIVATIONS, *LINEAR, *MOVES, *REDUCTIONS, *NORMALISATIONS]


def classifier(body: str, opset: int = 20) -> Classifier:
    """The steps from x, a value around 0, to y, between an image and logits."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[N, 3, 7, 6] image) => (float[N, K] logits)
        {{ centred = Sub (image, half) x = Mul (centred, four) {body} flat = Flatten (y) logits = Mul (flat, two) }}"""
    model = onnx.parser.parse_model(text)
    known = {**CONSTANTS, **MORE}
    used = {name for node in model.graph.node for name in node.input} & set(known)
    model.graph.initializer.extend(numpy_helper.from_array(known[name], name) for name in sorted(used))
    return Classifier(canonicalise(model))


def gradients(own: Classifier, x: torch.Tensor) -> tuple[Array, Array]:
    """The gradient that the graph gives, and torch's."""
    cotangent = torch.randn(len(x), own.classes, generator=torch.Generator().manual_seed(3))
    session = onnxruntime.InferenceSession(gradient_graph(own).SerializeToString(), providers=["CPUExecutionProvider"])
    logits, found = session.run(["logits", "gradient"], {"image": x.numpy(), "cotangent": cotangent.numpy()})
    leaf = x.clone().requires_grad_()
    expected = own(leaf)
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-4, atol=1e-4)
    (wanted,) = torch.autograd.grad((expected * cotangent).sum(), leaf)
    return found, wanted.numpy()


@pytest.mark.parametrize("body", CASES)
def test_an_operator_has_torchs_gradient(body: str) -> None:
    own = classifier(body)
    for batch in (1, 5):
        x = torch.rand(batch, 3, 7, 6, generator=torch.Generator().manual_seed(batch))
        found, wanted = gradients(own, x)
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_group_normalisation_has_a_scale_for_each_channel_since_opset_21() -> None:
    body = "z = Concat <axis = 1> (x, x) y = GroupNormalization <num_groups = 2> (z, scale6, row)"
    own = classifier(body, 21)
    found, wanted = gradients(own, torch.rand(5, 3, 7, 6, generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    older = own.model
    older.opset_import[0].version = 20
    older.graph.initializer.append(numpy_helper.from_array(noise(2), "pair"))
    next(node for node in older.graph.node if node.op_type == "GroupNormalization").input[1:] = ["pair", "pair"]
    with pytest.raises(GradientUnsupported, match="before opset 21"):
        gradient_graph(Classifier(older))


def test_every_derivative_is_tried() -> None:
    tried = {operator for body in CASES for operator in re.findall(r"= (\w+) (?:<[^>]*> )?\(", body)}
    assert set(DERIVATIVES) - tried == {"GroupNormalization"}


@pytest.mark.parametrize("pool", ["strides = [2, 2]", "strides = [2, 2], pads = [1, 1, 1, 1]", "strides = [1, 1]"])
def test_of_equal_cells_the_first_in_a_window_takes_the_gradient(pool: str) -> None:
    own = classifier(f"y = MaxPool <kernel_shape = [3, 3], {pool}> (x)")
    x = torch.randint(0, 2, (5, 3, 7, 6), generator=torch.Generator().manual_seed(0)) / 2
    found, wanted = gradients(own, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("operator", ["Relu", "LeakyRelu", "Abs", "HardSwish", "HardSigmoid", "GlobalMaxPool", "Clip"])
def test_a_kink_has_torchs_derivative(operator: str) -> None:
    operands = "x, low0, two" if operator == "Clip" else "x"
    own = classifier(f"low0 = Sub (half, half) y = {operator} ({operands})")
    x = torch.full((2, 3, 7, 6), 0.5)
    found, wanted = gradients(own, x)
    np.testing.assert_array_equal(found, wanted)


def test_half_precision_inside_is_followed() -> None:
    own = classifier("h = Cast <to = 10> (x) t = Tanh (h) u = Mul (t, t) r = Relu (u) y = Cast <to = 1> (r)")
    found, wanted = gradients_in_half(own)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())


def gradients_in_half(own: Classifier) -> tuple[Array, Array]:
    x = torch.rand(5, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    model = gradient_graph(own)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    cotangent = torch.ones(5, own.classes)
    (found,) = session.run(["gradient"], {"image": x.numpy(), "cotangent": cotangent.numpy()})
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(own(leaf).sum(), leaf)
    return found, wanted.numpy()

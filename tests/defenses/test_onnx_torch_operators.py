"""Each operator alone, in its odd cases, against ONNX Runtime."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from defenses.onnx_torch import OnnxModule
from defenses.onnx_torch.operators import OPERATORS

F32, I64 = np.float32, np.int64


@dataclass
class Case:
    """One node: its operator, opset, input, the constants it reads after (or around) it, and attributes."""

    operator: str
    opset: int
    x: NDArray[Any]
    constants: list[NDArray[Any] | None] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    place: int = 0
    outputs: int = 1

    def __str__(self) -> str:
        shown = {key: value for key, value in self.attributes.items() if not isinstance(value, TensorProto)}
        consts = [value.tolist() if value is not None and value.size < 9 else "..." for value in self.constants]
        return f"{self.operator}-{self.opset}-{list(self.x.shape)}-{consts}-{shown}".replace(" ", "")

    def model(self) -> ModelProto:
        names = [f"c{number}" if value is not None else "" for number, value in enumerate(self.constants)]
        names.insert(self.place, "x")
        outputs = [f"y{number}" for number in range(self.outputs)]
        graph = helper.make_graph(
            [helper.make_node(self.operator, names, outputs, "the_node", **self.attributes)],
            "one_node",
            [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(self.x.dtype), self.x.shape)],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [numpy_helper.from_array(v, f"c{number}") for number, v in enumerate(self.constants) if v is not None],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(F32)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, I64)


def scalar(value: float) -> NDArray[np.float32]:
    return np.array(value, F32)


IMAGE, WIDE = noise(2, 3, 7, 8), noise(2, 4, 9, 10)
UNIT = np.random.default_rng(5).uniform(0.1, 0.9, (2, 3, 4)).astype(F32)
LINE, VOLUME = noise(2, 3, 11), noise(1, 2, 5, 6, 4)
WHOLE = np.arange(-6, 6, dtype=I64).reshape(3, 4)
BOOLS = np.array([[True, False], [False, True]])
POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}

CONVOLUTIONS = [
    Case("Conv", 11, LINE, [noise(4, 3, 3), noise(4)], {"pads": [2, 0], "dilations": [2]}),
    Case("Conv", 11, VOLUME, [noise(3, 2, 2, 3, 2)], {"strides": [1, 2, 1], "pads": [0, 1, 1, 0, 1, 1]}),
    Case("Conv", 22, IMAGE, [noise(6, 1, 3, 3), noise(6)], {"group": 3, "pads": [1, 1, 1, 1]}),
    Case("Conv", 7, IMAGE, [noise(2, 3, 3, 3)], {"auto_pad": "VALID", "strides": [2, 1]}),
    Case("Conv", 11, IMAGE, [noise(2, 3, 3, 2)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", 11, IMAGE, [noise(2, 3, 4, 2)], {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    Case("Conv", 11, IMAGE, [noise(2, 3, 3, 3)], {"auto_pad": "VALID", "dilations": [2, 3]}),
    Case("Conv", 11, IMAGE, [noise(2, 3, 3, 3)], {"pads": [0, 1, 2, 3], "strides": [2, 2]}),
    Case("ConvTranspose", 11, LINE, [noise(3, 2, 4), noise(2)], {"strides": [2], "pads": [1, 0]}),
    Case("ConvTranspose", 11, WIDE, [noise(4, 3, 3, 3)], {"group": 2, "strides": [2, 2], "output_padding": [1, 1]}),
    Case("ConvTranspose", 11, IMAGE, [noise(3, 2, 3, 3), noise(2)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("ConvTranspose", 11, IMAGE, [noise(3, 2, 3, 3)], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    Case("ConvTranspose", 11, IMAGE, [noise(3, 2, 3, 3)], {"output_shape": [14, 17], "strides": [2, 2]}),
    Case("ConvTranspose", 11, IMAGE, [noise(3, 2, 2, 3)], {"pads": [1, 0, 0, 2], "dilations": [2, 1]}),
]

POOLS = [
    Case("MaxPool", 12, IMAGE, [], {**POOL, "pads": [1, 1, 1, 1]}),
    Case("MaxPool", 12, IMAGE - 9, [], {**POOL, "pads": [0, 2, 1, 1]}),
    Case("MaxPool", 12, IMAGE - 9, [], {**POOL, "ceil_mode": 1}),
    Case(
        "MaxPool", 22, IMAGE - 9, [], {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1, "pads": [1, 1, 1, 1]}
    ),
    Case("MaxPool", 12, IMAGE, [], {**POOL, "auto_pad": "SAME_UPPER"}),
    Case("MaxPool", 8, IMAGE, [], {"kernel_shape": [2, 4], "auto_pad": "SAME_LOWER"}),
    Case("MaxPool", 12, IMAGE, [], {"kernel_shape": [3, 3], "dilations": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("MaxPool", 12, LINE, [], {"kernel_shape": [4], "strides": [3], "auto_pad": "VALID"}),
    Case("MaxPool", 12, VOLUME, [], {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2], "ceil_mode": 1}),
    Case("AveragePool", 11, IMAGE, [], {**POOL, "pads": [1, 1, 1, 1]}),
    Case("AveragePool", 11, IMAGE, [], {**POOL, "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", 11, IMAGE, [], {**POOL, "pads": [0, 1, 2, 0], "count_include_pad": 1}),
    Case("AveragePool", 11, IMAGE, [], {**POOL, "pads": [0, 1, 2, 0]}),
    Case("AveragePool", 11, WIDE, [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case("AveragePool", 19, WIDE, [], {**POOL, "ceil_mode": 1, "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", 11, IMAGE, [], {**POOL, "auto_pad": "SAME_UPPER"}),
    Case("AveragePool", 11, IMAGE, [], {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER", "count_include_pad": 1}),
    Case("AveragePool", 19, WIDE, [], {"kernel_shape": [2, 3], "dilations": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", 7, LINE, [], {"kernel_shape": [3]}),
    Case("AveragePool", 22, VOLUME, [], {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
    Case("LpPool", 11, IMAGE, [], {**POOL, "p": 3}),
    Case("LpPool", 18, IMAGE, [], {**POOL, "pads": [1, 0, 1, 0]}),
    Case("GlobalAveragePool", 7, VOLUME),
    Case("GlobalMaxPool", 22, IMAGE),
    Case("GlobalLpPool", 7, IMAGE, [], {"p": 1}),
]

ACTIVATIONS = [
    *(Case(name, 22, IMAGE) for name in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish", "Mish")),
    *(Case(name, 13, IMAGE, [], {"alpha": 0.3}) for name in ("LeakyRelu", "Elu", "Celu", "ThresholdedRelu")),
    Case("Selu", 7, IMAGE),
    Case("Swish", 24, IMAGE, [], {"alpha": 0.7}),
    Case("HardSigmoid", 7, IMAGE),
    Case("HardSigmoid", 7, IMAGE, [], {"alpha": 1 / 6, "beta": 0.5}),
    Case("PRelu", 9, IMAGE, [noise(3, 1, 1)]),
    Case("Gelu", 20, IMAGE),
    Case("Gelu", 20, IMAGE, [], {"approximate": "tanh"}),
    Case("Softmax", 11, IMAGE),
    Case("Softmax", 11, IMAGE, [], {"axis": -2}),
    Case("Softmax", 13, IMAGE),
    Case("Softmax", 13, IMAGE, [], {"axis": 1}),
    Case("LogSoftmax", 9, IMAGE, [], {"axis": 2}),
    Case("LogSoftmax", 13, IMAGE, [], {"axis": 2}),
    Case("Clip", 7, IMAGE, [], {"min": -0.5, "max": 0.25}),
    Case("Clip", 7, IMAGE, [], {"min": 0.0}),
    Case("Clip", 13, IMAGE, [scalar(0), scalar(6)]),
    Case("Clip", 13, IMAGE, [None, scalar(0.1)]),
    Case("Clip", 13, IMAGE),
]

NORMALISATIONS = [
    Case("BatchNormalization", 9, IMAGE, [noise(3), noise(3), noise(3), noise(3) ** 2], {"epsilon": 1e-3}),
    Case("BatchNormalization", 15, LINE, [noise(3), noise(3), noise(3), noise(3) ** 2]),
    Case("InstanceNormalization", 7, IMAGE, [noise(3), noise(3)]),
    Case("GroupNormalization", 18, WIDE, [noise(2), noise(2)], {"num_groups": 2}),
    Case("GroupNormalization", 21, WIDE, [noise(4), noise(4)], {"num_groups": 2}),
    Case("LayerNormalization", 17, IMAGE, [noise(8), noise(8)]),
    Case("LayerNormalization", 17, IMAGE, [noise(3, 7, 8)], {"axis": 1}),
    Case("LayerNormalization", 17, IMAGE, [noise(8), noise(8)], {"epsilon": 1e-2}, outputs=3),
    Case("RMSNormalization", 23, IMAGE, [noise(8)]),
    Case("LRN", 7, WIDE, [], {"size": 3, "alpha": 0.1, "beta": 0.7, "bias": 1.5}),
    Case("LRN", 13, noise(1, 7, 3, 3), [], {"size": 5, "alpha": 0.5}),
    Case("LpNormalization", 7, IMAGE, [], {"axis": 1, "p": 2}),
    Case("LpNormalization", 22, IMAGE, [], {"p": 1}),
    Case("MeanVarianceNormalization", 9, IMAGE),
    Case("Dropout", 7, IMAGE, [], {"ratio": 0.4}),
    Case("Dropout", 13, IMAGE, [scalar(0.4)], outputs=2),
]

REDUCED = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare")
REDUCTIONS = [
    *(Case(name, 11, UNIT, [], {"axes": [-1, 0], "keepdims": 0}) for name in (*REDUCED, "ReduceLogSum")),
    *(Case(name, 18, UNIT, [ints(1, 2)]) for name in (*REDUCED, "ReduceLogSumExp")),
    *(Case(name, 20, UNIT) for name in (*REDUCED, "ReduceLogSum")),
    Case("ReduceSum", 13, UNIT, [], {"noop_with_empty_axes": 1}),
    Case("ReduceSum", 13, UNIT, [ints(0)], {"keepdims": 0, "noop_with_empty_axes": 1}),
    Case("ReduceMax", 11, WHOLE, [], {"axes": [0]}),
    Case("ReduceSum", 13, WHOLE, [ints(1)]),
    Case("ArgMax", 13, IMAGE, [], {"axis": 1, "keepdims": 0}),
    Case("ArgMax", 13, np.ones((2, 3), F32), [], {"axis": 1, "select_last_index": 1}),
    Case("ArgMin", 11, IMAGE, [], {"axis": -1}),
    Case("TopK", 11, IMAGE, [ints(3)], {"axis": -1}, outputs=2),
    Case("TopK", 11, IMAGE, [ints(2)], {"axis": 1, "largest": 0}, outputs=2),
    Case("TopK", 9, IMAGE, [], {"k": 2, "axis": 2}, outputs=2),
    Case("CumSum", 14, IMAGE, [np.array(2, I64)]),
    Case("CumSum", 11, IMAGE, [np.array(-1, I64)], {"exclusive": 1, "reverse": 1}),
]

SHAPES = [
    Case("Reshape", 13, IMAGE, [ints(0, -1, 4)]),
    Case("Reshape", 14, noise(0, 3, 4), [ints(3, 4, 0)], {"allowzero": 1}),
    Case("Reshape", 14, IMAGE, [ints(2, 0, 56)]),
    Case("Flatten", 13, IMAGE, [], {"axis": -2}),
    Case("Flatten", 9, IMAGE, [], {"axis": 0}),
    Case("Transpose", 13, LINE),
    Case("Transpose", 13, IMAGE, [], {"perm": [0, 2, 3, 1]}),
    Case("Squeeze", 11, noise(1, 3, 1), [], {"axes": [0]}),
    Case("Squeeze", 13, noise(1, 3, 1), [ints(-1)]),
    Case("Squeeze", 13, noise(1, 3, 1)),
    Case("Unsqueeze", 11, LINE, [], {"axes": [0, 4]}),
    Case("Unsqueeze", 13, LINE, [ints(-1, 1)]),
    Case("Concat", 13, IMAGE, [noise(2, 2, 7, 8)], {"axis": -3}),
    Case("Split", 11, WIDE, [], {"axis": 1, "split": [1, 3]}, outputs=2),
    Case("Split", 13, WIDE, [ints(4, 5)], {"axis": 2}, outputs=2),
    Case("Split", 18, WIDE, [], {"axis": 2, "num_outputs": 2}, outputs=2),
    Case("Slice", 9, IMAGE, [], {"starts": [1, -3], "ends": [9, 7], "axes": [1, 2]}),
    Case("Slice", 13, IMAGE, [ints(-1), ints(-(2**31)), ints(3), ints(-2)]),
    Case("Slice", 13, IMAGE, [ints(1, 0), ints(2**62, -1), ints(-1, 2), ints(3, 2)]),
    Case("Slice", 13, IMAGE, [ints(0, 2), ints(1, 1)]),
    Case("Expand", 13, noise(3, 1), [ints(2, 1, 4)]),
    Case("Tile", 13, noise(2, 3), [ints(2, 3)]),
    Case("Identity", 13, IMAGE),
    Case("Shape", 15, IMAGE, [], {"start": -3, "end": -1}),
    Case("Size", 13, IMAGE),
    Case("Pad", 9, IMAGE, [], {"pads": [0, 0, 1, 2, 0, 1, 0, 3], "value": 1.5}),
    Case("Pad", 11, IMAGE, [ints(0, 0, 1, 2, 0, 1, 0, 3)]),
    Case("Pad", 13, IMAGE, [ints(0, 0, -1, 2, 0, 0, 1, -3), scalar(-7)]),
    Case("Pad", 18, IMAGE, [ints(2, 1, 0, 3), None, ints(-1, 2)], {"mode": "reflect"}),
    Case("Pad", 13, IMAGE, [ints(1, 0, 2, 1, 0, 2, 1, 2)], {"mode": "edge"}),
    Case("Pad", 19, IMAGE, [ints(0, 1, 2, 1, 0, 2, 1, 2)], {"mode": "wrap"}),
    Case("DepthToSpace", 13, noise(1, 8, 2, 3), [], {"blocksize": 2}),
    Case("DepthToSpace", 13, noise(1, 8, 2, 3), [], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", 13, noise(1, 2, 4, 6), [], {"blocksize": 2}),
]

INDICES = [
    Case("Gather", 13, IMAGE, [np.array(-1, I64)], {"axis": 1}),
    Case("Gather", 13, IMAGE, [np.array([[0, -1], [2, 2]], I64)], {"axis": 2}),
    Case("Gather", 13, ints(1, -2), [noise(4, 3)], place=1),
    Case("GatherElements", 13, noise(3, 3), [np.array([[0, -1, 2]], I64)], {"axis": 0}),
    Case("GatherND", 12, noise(2, 3, 4), [np.array([[0, 1], [1, -1]], I64)]),
    Case("GatherND", 13, noise(2, 3, 4), [np.array([[0], [-1]], I64)], {"batch_dims": 1}),
    Case("ScatterND", 16, noise(4, 3), [np.array([[1], [-1]], I64), noise(2, 3)]),
    Case("ScatterND", 16, noise(4), [np.array([[1], [1]], I64), noise(2)], {"reduction": "add"}),
    Case("ScatterElements", 16, noise(3, 3), [np.array([[0, -1, 2]], I64), noise(1, 3)], {"axis": 0}),
    Case(
        "ScatterElements", 16, noise(3, 3), [np.array([[0, 0, 2]], I64), noise(1, 3)], {"axis": 1, "reduction": "add"}
    ),
    Case("Where", 16, IMAGE, [noise(7, 8) > 0, scalar(0)], place=1),
    Case("ConstantOfShape", 9, ints(2, 3)),
    Case("ConstantOfShape", 20, ints(2), [], {"value": numpy_helper.from_array(ints(7))}),
    Case("Range", 11, np.array(1, I64), [np.array(9, I64), np.array(3, I64)]),
    Case("OneHot", 11, ints(0, -1, 2), [np.array(4, I64), np.array([-1, 5], F32)]),
    Case("OneHot", 11, ints(0, -1, 2), [np.array(4, I64), np.array([-1, 5], F32)], {"axis": 0}),
    Case("NonZero", 13, noise(3, 4).clip(0)),
    Case("Trilu", 14, noise(4, 5), [np.array(1, I64)]),
    Case("Trilu", 14, noise(4, 5), [np.array(-1, I64)], {"upper": 0}),
    Case("EyeLike", 9, noise(3, 4), [], {"k": 1}),
]

ALGEBRA = [
    Case("Gemm", 13, noise(4, 3), [noise(5, 4), noise(1, 5)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", 11, noise(3, 4), [noise(4, 5)]),
    Case("Gemm", 9, noise(3, 4), [noise(4, 5), scalar(0.5)]),
    Case("MatMul", 13, noise(2, 3, 4), [noise(4)]),
    Case("MatMul", 9, noise(2, 3, 4), [noise(4, 5)]),
    Case("Einsum", 12, noise(2, 3, 4), [noise(2, 5, 4)], {"equation": "...id, ...jd -> ...ij"}),
    Case("Einsum", 12, noise(3, 3), [], {"equation": "ii"}),
    Case("Attention", 23, noise(2, 3, 5, 4), [noise(2, 3, 6, 4), noise(2, 3, 6, 2)], {"scale": 0.3}),
    Case("Attention", 23, noise(2, 5, 8), [noise(2, 5, 8), noise(2, 5, 8)], {"q_num_heads": 2, "kv_num_heads": 2}),
    Case("Attention", 23, noise(2, 2, 5, 4), [noise(2, 2, 5, 4), noise(2, 2, 5, 4)], {"is_causal": 1}),
    Case("Attention", 23, noise(2, 2, 5, 4), [noise(2, 2, 5, 4), noise(2, 2, 5, 4), noise(5, 5)]),
]

UNARY = ("Abs", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "IsNaN", "Neg", "Reciprocal", "Round", "Sign", "Sin")
ON_UNIT = ("Acos", "Asin", "Asinh", "Atan", "Atanh", "Log", "Sinh", "Sqrt", "Tan")
COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
ARITHMETIC = [
    *(Case(name, 13, IMAGE) for name in UNARY),
    *(Case(name, 13, UNIT) for name in ON_UNIT),
    Case("Acosh", 9, UNIT + 1),
    Case("Round", 11, np.array([0.5, 1.5, 2.5, -0.5, -1.5], F32)),
    Case("Not", 7, BOOLS),
    Case("IsInf", 10, np.array([np.inf, -np.inf, np.nan, 1], F32), [], {"detect_negative": 0}),
    *(Case(name, 13, IMAGE, [noise(8)]) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")),
    *(Case(name, 16, np.array([1, 2, 3], F32), [np.array([[2], [3]], F32)]) for name in COMPARED),
    *(Case(name, 7, BOOLS, [BOOLS[:1]]) for name in ("And", "Or", "Xor")),
    Case("Max", 13, IMAGE, [noise(8), noise(7, 1)]),
    Case("Div", 14, WHOLE, [ints(4)]),
    Case("Mod", 13, WHOLE, [ints(4, -3, 5, -2)]),
    Case("Mod", 13, IMAGE, [scalar(0.3)], {"fmod": 1}),
    Case("Pow", 13, UNIT, [scalar(2.5)]),
    Case("Pow", 15, WHOLE, [scalar(2)]),
    Case("Cast", 13, IMAGE * 3, [], {"to": TensorProto.INT64}),
    Case("Cast", 13, WHOLE, [], {"to": TensorProto.FLOAT}),
    Case("Cast", 13, IMAGE.round(), [], {"to": TensorProto.BOOL}),
    Case("CastLike", 19, WHOLE, [scalar(0)]),
]

HALVES, ODD = np.array([1, 1, 2, 2], F32), np.array([1, 1, 1.7, 0.6], F32)
MODES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
RESIZES = [
    Case("Upsample", 7, IMAGE, [], {"scales": [1.0, 1.0, 2.0, 3.0]}),
    Case("Upsample", 9, IMAGE, [HALVES], {"mode": "linear"}),
    Case("Resize", 10, IMAGE, [ODD]),
    *(Case("Resize", 11, IMAGE, [noise(0), ODD], {"coordinate_transformation_mode": mode}) for mode in MODES),
    *(
        Case("Resize", 13, IMAGE, [None, ODD], {"mode": "linear", "coordinate_transformation_mode": mode})
        for mode in MODES
    ),
    *(
        Case(
            "Resize", 13, IMAGE, [None, None, ints(2, 3, 5, 11)], {"mode": "cubic", "coordinate_transformation_mode": m}
        )
        for m in MODES
    ),
    *(
        Case("Resize", 13, IMAGE, [None, None, ints(2, 3, 10, 3)], {"nearest_mode": mode})
        for mode in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ),
    Case("Resize", 13, IMAGE, [None, ODD], {"mode": "cubic", "cubic_coeff_a": -0.5}),
    Case("Resize", 18, IMAGE, [None, None, ints(14, 4)], {"mode": "linear", "axes": [2, 3]}),
    Case(
        "Resize", 19, IMAGE, [None, ODD], {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"}
    ),
]

CASES = [
    *CONVOLUTIONS,
    *POOLS,
    *ACTIVATIONS,
    *NORMALISATIONS,
    *REDUCTIONS,
    *SHAPES,
    *INDICES,
    *ALGEBRA,
    *ARITHMETIC,
    *RESIZES,
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_computes_what_onnx_runtime_computes(case: Case) -> None:
    model = case.model()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": case.x})
    x = torch.from_numpy(case.x.copy())
    got = OnnxModule(model)(x.requires_grad_(x.is_floating_point()))
    assert len(got) == case.outputs
    for value, reference in zip(got, expected, strict=True):
        assert value.shape == reference.shape
        np.testing.assert_allclose(value.detach().numpy(), reference, rtol=2e-5, atol=2e-5)


def test_every_operator_is_compared() -> None:
    assert {case.operator for case in CASES} >= set(OPERATORS)

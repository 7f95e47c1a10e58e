"""The interpreter as a module: what it refuses, what it computes when asked for less, how it moves and copies."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from defenses.onnx_torch import GraphInvalid, OnnxModule, OperatorUnsupported, ValueNotFound

SMALL = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[N, 3, 8, 8] image) => (float[N, 2] logits)
<int64[2] shape = {0, -1}>
{
    before = Conv <pads = [1, 1, 1, 1]> (image, w)
    after = Relu (before)
    pooled = GlobalAveragePool (after)
    flat = Reshape (pooled, shape)
    logits = MatMul (flat, head)
}
"""


def small(opset: int = 17) -> ModelProto:
    model = onnx.parser.parse_model(SMALL.replace(": 17]", f": {opset}]"))
    generator = np.random.default_rng(0)
    for name, shape in (("w", (4, 3, 3, 3)), ("head", (4, 2))):
        value = generator.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def parsed(text: str, weights: dict[str, np.ndarray] | None = None) -> ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (weights or {}).items())
    return model


IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_asked_for_inner_values_it_returns_them_in_the_order_asked() -> None:
    module = OnnxModule(small())
    logits, after, before = module(IMAGES, ["logits", "after", "before"])
    assert torch.equal(after, before.relu())
    assert before.min() < 0
    assert torch.equal(logits, module(IMAGES)[0])
    assert module.values == ("before", "after", "pooled", "flat", "logits")


def test_only_what_the_outputs_need_is_computed() -> None:
    model = small()
    model.graph.node[-1].input[1] = "unfit"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((5, 2), np.float32), "unfit"))
    module = OnnxModule(model)
    assert module(IMAGES, ["flat"])[0].shape == (3, 4)
    with pytest.raises(RuntimeError) as caught:
        module(IMAGES)
    assert any("MatMul" in note for note in caught.value.__notes__)


def test_values_are_freed_after_their_last_use() -> None:
    chain = "\n".join(f"v{place + 1} = Sin (v{place})" for place in range(6))
    module = OnnxModule(
        parsed(f'<ir_version: 8, opset_import: ["" : 17]> g (float[N] v0) => (float[N] v6) {{ {chain} }}')
    )
    freed = [name for step in module._plan(("v6", "v2")) for name in step.last_used]
    assert sorted(freed) == ["v0", "v1", "v3", "v4", "v5"]


def test_an_unknown_value_is_named() -> None:
    with pytest.raises(ValueNotFound, match="no value named 'layer9'") as caught:
        OnnxModule(small())(IMAGES, ["layer9"])
    assert caught.value.name == "layer9"


def test_weights_are_parameters_that_want_no_gradient_and_equal_ones_are_kept_once() -> None:
    weights = {"a": np.ones((4, 4), np.float32), "b": np.ones((4, 4), np.float32)}
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y)
        { aa = Identity (a) p = MatMul (x, aa) q = MatMul (p, b) y = MatMul (q, a) }"""
    module = OnnxModule(parsed(text, weights))
    (only,) = module.parameters()
    assert not only.requires_grad
    assert torch.equal(module(torch.ones(1, 4))[0], torch.full((1, 4), 64.0))


def test_gradients_flow_from_every_output_whatever_the_mode_it_was_built_in() -> None:
    with torch.inference_mode():
        module = OnnxModule(small())
    for name in module.values:
        x = IMAGES.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(x, [name])[0].square().sum(), x)
        assert gradient.abs().sum() > 0
    assert torch.is_grad_enabled()


def test_copies_and_pickles_compute_the_same() -> None:
    module = OnnxModule(small())
    expected = module(IMAGES)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(IMAGES)[0], expected)


RESHAPING = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3, 8, 8] image) => (float[N, L, 3] y)
{
    shape = Shape (image)
    zero = Constant <value_ints = [0]> ()
    two = Constant <value_int = 2> ()
    batch = Gather (shape, zero)
    height = Gather <axis = 0> (shape, two)
    heights = Unsqueeze (height, zero)
    scale = Cast <to = 1> (heights)
    half = Constant <value_floats = [0.5]> ()
    smaller = Mul (scale, half)
    size = Cast <to = 7> (smaller)
    three = Constant <value_ints = [3]> ()
    sizes = Concat <axis = 0> (batch, three, size, size)
    maps = Resize <mode = "linear"> (image, "", "", sizes)
    rest = Constant <value_ints = [-1]> ()
    target = Concat <axis = 0> (batch, three, rest)
    tokens = Reshape (maps, target)
    y = Transpose <perm = [0, 2, 1]> (tokens)
}
"""


@pytest.mark.parametrize(
    "model", [small(), onnx.parser.parse_model(RESHAPING)], ids=["small", "shapes computed from the image's"]
)
def test_shapes_are_computed_without_reading_the_device(model: ModelProto) -> None:
    """Tensors on the meta device hold no data: reading one, as waiting for an accelerator would, raises."""
    module = OnnxModule(model).to("meta")
    (y,) = module(IMAGES.to("meta"))
    assert y.device.type == "meta"
    assert y.shape == OnnxModule(model)(IMAGES)[0].shape


def test_what_cannot_run_is_named_when_built_and_all_at_once() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.acme" : 3]> g (float[N, 4] x) => (float[N, 4] y)
        { a = com.acme.Sharpen (x) b = Det (x) c, i = MaxPool <kernel_shape = [1]> (a)
          d = Add (c, b) e = Cast <to = 1> (i) y = Add (d, e) }"""
    model = parsed(text)
    model.graph.node[0].name = "sharpen_1"
    with pytest.raises(OperatorUnsupported) as caught:
        OnnxModule(model)
    assert [(node.operator, node.domain, node.opset) for node in caught.value.nodes] == [
        ("Sharpen", "com.acme", 3),
        ("Det", "ai.onnx", 17),
        ("MaxPool", "ai.onnx", 17),
    ]
    assert "Sharpen (domain com.acme, opset 3, node 'sharpen_1')" in str(caught.value)
    assert "indices" in caught.value.nodes[2].reason


def test_a_node_that_no_output_needs_may_be_of_any_kind() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y)
        { b = Det (x) y = Relu (x) }"""
    assert OnnxModule(parsed(text))(torch.tensor([-1.0, 2.0]))[0].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ('Resize <coordinate_transformation_mode = "tf_crop_and_resize"> (x, roi, scales)', "tf_crop_and_resize"),
        ("Resize <antialias = 1> (x, roi, scales)", "antialiasing"),
        ("BatchNormalization <training_mode = 1> (x, scales, scales, scales, scales)", "evaluation mode"),
        ("Cast <to = 8> (x)", "target type"),
        ('ScatterND <reduction = "max"> (x, ids, x)', "reduction"),
    ],
)
def test_forms_of_operators_that_cannot_run_are_refused_with_the_reason(node: str, reason: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 18]> g (float[N, 3, 8, 8] x) => (y)
        <float[4] scales = {{1.0, 1.0, 2.0, 2.0}}, float[0] roi, int64[1, 1] ids = {{0}}> {{ y = {node} }}"""
    with pytest.raises(OperatorUnsupported, match=reason):
        OnnxModule(onnx.parser.parse_model(text))


@pytest.mark.parametrize("opset", [6, 27])
def test_opsets_outside_the_range_are_refused(opset: int) -> None:
    with pytest.raises(GraphInvalid, match=f"opset 7 to 26, got opset {opset}"):
        OnnxModule(small(opset))


def test_a_graph_of_two_inputs_is_refused() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] a, float[N] b) => (float[N] y) { y = Add (a, b) }'
    with pytest.raises(GraphInvalid, match="one input, got 2: a, b"):
        OnnxModule(parsed(text))


def test_weights_in_another_file_are_read_with_the_model_and_asked_for_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    expected = OnnxModule(small())(IMAGES)[0]
    onnx.save_model(small(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert torch.equal(OnnxModule(onnx.load(str(path)))(IMAGES)[0], expected)
    with pytest.raises(GraphInvalid, match="in another file"):
        OnnxModule(onnx.load(str(path), load_external_data=False))


def test_local_functions_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g (float[N] x) => (float[N] y)
        { y = local.Twice (x) }
        <opset_import: ["" : 17], domain: "local"> Twice (a) => (b) { b = Add (a, a) }"""
    assert OnnxModule(parsed(text))(torch.tensor([1.5]))[0].tolist() == [3.0]


@pytest.mark.parametrize("element_type", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_every_precision_is_computed_in_float32(element_type: int) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["a"], to=element_type),
            helper.make_node("Add", ["a", "c"], ["b"]),
            helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor("c", element_type, [1], [0.5])],
    )
    module = OnnxModule(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    inner, y = module(torch.tensor([0.1]), ["b", "y"])
    assert inner.dtype == y.dtype == torch.float32
    assert y.item() == pytest.approx(0.6, abs=1e-6)


def test_a_relu_leaves_the_value_before_it_as_it_was() -> None:
    module = OnnxModule(small())
    alone: Sequence[Tensor] = module(IMAGES, ["before"])
    assert torch.equal(module(IMAGES, ["before", "logits"])[0], alone[0])

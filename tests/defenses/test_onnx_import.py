"""Foreign graphs made canonical: what is put before, cut off and freed, and what is refused."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from defenses.onnx_import import (
    ExportFailed,
    GraphUnsuitable,
    ParityBroken,
    canonicalise,
    check_parity,
    export_classifier,
)
from defenses.onnx_torch import OnnxModule

Array = NDArray[Any]
GENERATOR = np.random.default_rng(0)
WEIGHTS: dict[str, Array] = {
    "w": GENERATOR.normal(size=(4, 3, 3, 3)).astype(np.float32) / 3,
    "head": GENERATOR.normal(size=(4, 5)).astype(np.float32),
    "bias": GENERATOR.normal(size=5).astype(np.float32),
}
IMAGES = np.random.default_rng(1).random((3, 3, 8, 8)).astype(np.float32)
BODY = """
    maps = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w)
    active = Relu (maps)
    pooled = GlobalAveragePool (active)
    flat = Flatten (pooled)
    dense = MatMul (flat, head)
    scores = Add (dense, bias)
"""


def graph(
    body: str = BODY,
    inputs: str = "float[N, 3, 8, 8] x",
    outputs: str = "float[N, 5] scores",
    weights: dict[str, Array] = WEIGHTS,
    opset: int = 17,
) -> ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> foreign ({inputs}) => ({outputs}) {{ {body} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def run(model: ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {session.get_inputs()[0].name: x})[0]
    return result


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(1, keepdims=True))
    result: Array = powers / powers.sum(1, keepdims=True)
    return result


def signature(model: ModelProto) -> list[tuple[str, int, list[str | int]]]:
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    ]


CANONICAL = [("image", 1, ["N", 3, 8, 8]), ("logits", 1, ["N", 5])]


def test_a_plain_graph_gets_the_canonical_names_and_keeps_its_answers() -> None:
    model = canonicalise(graph())
    assert signature(model) == CANONICAL
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(model, IMAGES), run(graph(), IMAGES))


def test_a_canonical_graph_comes_back_unchanged() -> None:
    model = canonicalise(graph())
    before = model.SerializeToString(deterministic=True)
    assert canonicalise(model).SerializeToString(deterministic=True) == before
    assert model.SerializeToString(deterministic=True) == before


def test_the_graph_given_is_left_alone() -> None:
    model = graph(BODY + "probabilities = Softmax (scores)", outputs="float[N, 5] probabilities")
    before = model.SerializeToString(deterministic=True)
    canonicalise(model, input_range="byte", normalisation=([1, 2, 3], [4, 5, 6]))
    assert model.SerializeToString(deterministic=True) == before


def test_normalisation_is_put_into_the_graph() -> None:
    mean, deviation = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    model = canonicalise(graph(), normalisation=(mean, deviation))
    assert signature(model) == CANONICAL
    normalised = (IMAGES - np.reshape(mean, (3, 1, 1))) / np.reshape(deviation, (3, 1, 1))
    np.testing.assert_allclose(run(model, IMAGES), run(graph(), normalised.astype(np.float32)), atol=1e-5)


def test_byte_images_are_normalised_in_bytes() -> None:
    mean, deviation = [123.7, 116.8, 103.9], [58.4, 57.1, 57.4]
    model = canonicalise(graph(), normalisation=(mean, deviation), input_range="byte")
    normalised = (IMAGES * 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(deviation, (3, 1, 1))
    np.testing.assert_allclose(run(model, IMAGES), run(graph(), normalised.astype(np.float32)), atol=1e-5)


def test_a_keras_graph_of_channels_last_bytes_and_a_softmax() -> None:
    body = """
        t = Transpose <perm = [0, 3, 1, 2]> (x)
        maps = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (t, w)
        active = Relu (maps)
        back = Transpose <perm = [0, 2, 3, 1]> (active)
        flat = ReduceMean <axes = [1, 2], keepdims = 0> (back)
        dense = MatMul (flat, head)
        scores = Add (dense, bias)
        soft = Softmax (scores)
        probabilities = Identity (soft)
    """
    foreign = graph(body, "float[N, 8, 8, 3] x", "float[N, 5] probabilities", opset=15)
    model = canonicalise(foreign, layout="NHWC", input_range="byte")
    assert signature(model) == CANONICAL
    expected = run(foreign, IMAGES.transpose(0, 2, 3, 1) * 255)
    np.testing.assert_allclose(softmax(run(model, IMAGES)), expected, atol=1e-5)
    assert not any(node.op_type == "Softmax" for node in model.graph.node)


@pytest.mark.parametrize(
    "tail",
    [
        "y = Softmax (scores)",
        "a = Softmax <axis = 1> (scores) y = Flatten (a)",
        "a = Softmax (scores) b = Identity (a) y = Cast <to = 1> (b)",
    ],
)
def test_a_trailing_softmax_is_taken_off(tail: str) -> None:
    foreign = graph(BODY + tail, outputs="float[N, 5] y")
    model = canonicalise(foreign)
    np.testing.assert_array_equal(run(model, IMAGES), run(graph(), IMAGES))


def test_a_log_softmax_stays() -> None:
    foreign = graph(BODY + "y = LogSoftmax (scores)", outputs="float[N, 5] y")
    np.testing.assert_array_equal(run(canonicalise(foreign), IMAGES), run(foreign, IMAGES))


def test_a_fixed_batch_of_one_is_freed_where_its_constants_allow() -> None:
    body = BODY.replace(
        "flat = Flatten (pooled)",
        "s = Constant <value_ints = [1, -1]> () f = Reshape (pooled, s) t = Constant <value_ints = [1, 4]> () "
        "flat = Reshape (f, t)",
    )
    foreign = graph(body, "float[1, 3, 8, 8] x", "float[1, 5] scores")
    model = canonicalise(foreign)
    assert signature(model) == CANONICAL
    np.testing.assert_allclose(
        run(model, IMAGES), np.concatenate([run(foreign, image[None]) for image in IMAGES]), atol=1e-6
    )


def test_a_fixed_batch_without_constants_needs_no_more_than_its_declaration() -> None:
    model = canonicalise(graph(inputs="float[4, 3, 8, 8] x", outputs="float[4, 5] scores"))
    assert signature(model) == CANONICAL
    assert run(model, IMAGES).shape == (3, 5)


WITH_A_TOKEN = """
    flat = Flatten (x)
    both = Concat <axis = 1> (token, flat)
    dense = MatMul (both, wide)
    scores = Add (dense, bias)
"""
ACROSS_THE_BATCH = """
    mean = ReduceMean <axes = [0, 2, 3], keepdims = 0> (x)
    shape = Constant <value_ints = [1, 3]> ()
    flat = Reshape (mean, shape)
    scores = MatMul (flat, narrow)
"""


@pytest.mark.parametrize("body", [WITH_A_TOKEN, ACROSS_THE_BATCH], ids=["a token for one image", "a mean over images"])
def test_a_fixed_batch_that_cannot_be_freed_is_refused(body: str) -> None:
    weights = {
        "token": np.ones((1, 4), np.float32),
        "wide": np.ones((196, 5), np.float32),
        "narrow": np.ones((3, 5), np.float32),
        "bias": WEIGHTS["bias"],
    }
    with pytest.raises(GraphUnsuitable, match=r"batches of 1 alone.*dynamic batch"):
        canonicalise(graph(body, "float[1, 3, 8, 8] x", "float[1, 5] scores", weights))


def test_half_precision_is_cast_within_the_graph() -> None:
    weights = {name: value.astype(np.float16) for name, value in WEIGHTS.items()}
    model = canonicalise(graph(BODY, "float16[N, 3, 8, 8] x", "float16[N, 5] scores", weights))
    assert signature(model) == CANONICAL
    logits = run(model, IMAGES)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, run(graph(), IMAGES), atol=2e-2)
    check_parity(model, OnnxModule(model))


def test_double_precision_is_cast_within_the_graph() -> None:
    foreign = graph("x = Cast <to = 1> (d)" + BODY, "double[N, 3, 8, 8] d")
    model = canonicalise(foreign)
    assert signature(model) == CANONICAL
    np.testing.assert_array_equal(run(model, IMAGES), run(graph(), IMAGES))


def test_a_graph_of_bytes_takes_unit_images_and_passes_gradients() -> None:
    opening = """
        t = Transpose <perm = [0, 3, 1, 2]> (b)
        c = Cast <to = 1> (t)
        k = Constant <value_float = 255.0> ()
        x = Div (c, k)
    """
    foreign = graph(opening + BODY, "uint8[N, 8, 8, 3] b")
    model = canonicalise(foreign, layout="NHWC")
    assert signature(model) == CANONICAL
    in_bytes = (IMAGES * 255).round().astype(np.uint8)
    expected = run(foreign, in_bytes.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(run(model, in_bytes.astype(np.float32) / 255), expected, atol=1e-5)
    x = torch.from_numpy(IMAGES).requires_grad_()
    (gradient,) = torch.autograd.grad(OnnxModule(model)(x)[0].sum(), x)
    assert gradient.abs().min() > 0


def test_a_graph_that_computes_on_bytes_is_refused() -> None:
    weights = {**WEIGHTS, "one": np.array(1, np.uint8)}
    body = "m = Max (b, one) x = Cast <to = 1> (m)" + BODY
    with pytest.raises(GraphUnsuitable, match="does not run in ONNX Runtime on FP32 images"):
        canonicalise(graph(body, "uint8[N, 3, 8, 8] b", weights=weights))


@pytest.mark.parametrize(
    "outputs",
    [
        "float[N, 4, 4, 4] active, float[N, 5] scores",
        "int64[N] label, float[N, 5] scores",
        "float[N, 5] scores, float[N, 5] soft",
    ],
)
def test_of_several_outputs_the_logits_are_chosen_and_the_rest_is_left_out(outputs: str) -> None:
    body = BODY + "label = ArgMax <axis = 1, keepdims = 0> (scores) soft = Softmax (scores)"
    model = canonicalise(graph(body, outputs=outputs))
    np.testing.assert_array_equal(run(model, IMAGES), run(graph(), IMAGES))
    assert {node.op_type for node in model.graph.node}.isdisjoint({"ArgMax", "Softmax"})


def test_an_output_named_logits_is_preferred() -> None:
    body = BODY + "logits = Identity (scores)"
    model = canonicalise(graph(body, outputs="float[N, 4] flat, float[N, 5] logits"))
    assert signature(model) == CANONICAL


def test_outputs_that_cannot_be_logits_are_listed() -> None:
    body = BODY + "label = ArgMax <axis = 1, keepdims = 0> (scores)"
    with pytest.raises(GraphUnsuitable, match=r"logits \(N, K\) in floating point, got label INT64 \(\?\)"):
        canonicalise(graph(body, outputs="int64[N] label"))


def test_maps_of_one_cell_are_flattened_to_logits() -> None:
    body = "m = Conv <strides = [2, 2]> (x, w) scores = GlobalAveragePool (m)"
    model = canonicalise(graph(body, outputs="float[N, 4, 1, 1] scores", weights={"w": WEIGHTS["w"]}))
    assert signature(model)[1] == ("logits", 1, ["N", 4])


def test_inner_values_of_the_canonical_names_make_room() -> None:
    body = BODY.replace("maps", "image").replace("active", "logits")
    model = canonicalise(graph(body), input_range="byte")
    assert signature(model) == CANONICAL
    np.testing.assert_allclose(run(model, IMAGES), run(graph(), IMAGES * 255), rtol=1e-5)


def test_weights_listed_as_inputs_and_old_versions_of_the_format_are_taken() -> None:
    foreign = graph(inputs="float[N, 3, 8, 8] x, float[4, 3, 3, 3] w, float[4, 5] head, float[5] bias", opset=9)
    foreign.ir_version = 3
    model = canonicalise(foreign)
    assert signature(model) == CANONICAL
    assert model.ir_version >= 8


def test_an_open_shape_is_taken_from_the_caller() -> None:
    open_graph = graph(inputs="float[N, 3, H, W] x")
    assert signature(canonicalise(open_graph, image_shape=(3, 8, 8))) == CANONICAL
    with pytest.raises(GraphUnsuitable, match=r"shape open, \(\?, 3, \?, \?\)"):
        canonicalise(open_graph)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (graph(), {"image_shape": (3, 9, 9)}, r"takes images of shape \(3, 8, 8\), not \(3, 9, 9\)"),
        (graph(inputs="float[N, 8, 8, 3] x"), {}, "looks like NHWC"),
        (graph("scores = Relu (x)", "float[N, 5] x"), {}, r"four axes, NCHW, got 2: \(\?, 5\)"),
        (graph(inputs="int64[N, 3, 8, 8] x"), {}, "got an input of INT64"),
        (graph(inputs="float[N, 3, 8, 8] x, float[4, 5] head", weights={}), {}, "one input, the image, got 2: x, head"),
        (graph(), {"normalisation": ([0.5], [0.5])}, "3 channels, got 1"),
        (graph(), {"normalisation": ([0.5] * 3, [0.5, 0, 1])}, "positive deviations"),
        (graph(inputs="uint8[N, 3, 8, 8] x"), {"normalisation": ([0.5] * 3, [1.0] * 3)}, "takes floating point"),
        (graph("scores = Relu (x)", outputs="float[N, 3, 8, 8] scores", weights={}), {}, r"shape \(1, 3, 8, 8\)"),
        (graph("m = ReduceMax <axes = [1, 2, 3]> (x) scores = Flatten (m)", weights={}), {}, "two classes or more"),
        (graph(BODY.replace("(x, w)", "(x, lost)")), {}, "does not run in ONNX Runtime"),
        (graph(BODY.replace("scores", "z") + "n = Sub (z, z) scores = Div (n, n)"), {}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(
    model: ModelProto, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GraphUnsuitable, match=message):
        canonicalise(model, **options)


def test_parity_says_how_far_apart_the_two_forms_are() -> None:
    model = canonicalise(graph())
    parity = check_parity(model, OnnxModule(model), samples=10)
    assert parity.batch_sizes == (1, 2, 3, 4)
    assert 0 <= parity.max_abs_difference < 1e-5
    assert parity.scale > 0.1


def test_parity_is_broken_by_a_changed_weight() -> None:
    model = canonicalise(graph())
    module = OnnxModule(model)
    with torch.no_grad():
        next(module.parameters()).mul_(1.01)
    with pytest.raises(ParityBroken, match=r"differs from ONNX Runtime by up to 0\.\d+ in logits of up to \d"):
        check_parity(model, module)
    assert check_parity(model, module, tolerance=0.1).max_abs_difference > 1e-4


def test_parity_is_broken_by_logits_that_are_not_finite_or_of_other_classes() -> None:
    model, module = canonicalise(graph()), OnnxModule(canonicalise(graph()))
    with torch.no_grad():
        for weights in module.parameters():
            weights.fill_(torch.nan)
    with pytest.raises(ParityBroken, match="not finite"):
        check_parity(model, module)
    fewer = canonicalise(graph(weights={**WEIGHTS, "head": WEIGHTS["head"][:, :4], "bias": WEIGHTS["bias"][:4]}))
    with pytest.raises(ParityBroken, match=r"shape \(1, 5\), the torch form \(1, 4\)"):
        check_parity(model, OnnxModule(fewer))


class Small(nn.Module):
    """Dropout and batch normalisation, so that the mode it is exported in can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.9)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))
        return logits


def test_a_module_is_exported_quietly_in_evaluation_mode(capfd: pytest.CaptureFixture[str]) -> None:
    module = Small().train()
    model = canonicalise(export_classifier(module, (3, 8, 8), opset=18))
    assert module.training
    assert capfd.readouterr() == ("", "")
    assert signature(model) == CANONICAL
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    with torch.no_grad():
        np.testing.assert_allclose(run(model, IMAGES), module.eval()(torch.from_numpy(IMAGES)), atol=1e-5)


def test_a_module_that_cannot_be_exported_is_named_with_the_reason(capfd: pytest.CaptureFixture[str]) -> None:
    class Wilful(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("I will not")

    with pytest.raises(ExportFailed, match=r"^Wilful cannot be exported to ONNX"):
        export_classifier(Wilful(), (3, 8, 8))
    with pytest.raises(ValueError, match="opset of 18 or newer, got 17"):
        export_classifier(Small(), (3, 8, 8), opset=17)
    assert capfd.readouterr() == ("", "")


def test_an_export_traced_on_one_image_is_freed(tmp_path: Path) -> None:
    class Viewing(Small):
        def forward(self, x: Tensor) -> Tensor:
            maps = self.bn(self.conv(x)).relu()
            logits: Tensor = self.linear(maps.view(maps.shape[0], 4, -1).mean(2))
            return logits

    module, path = Viewing().eval(), tmp_path / "traced.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.rand(1, 3, 8, 8),), path, opset_version=13, dynamo=False)
    foreign = onnx.load(str(path))
    assert signature(foreign)[0][2] == [1, 3, 8, 8]
    with torch.no_grad():
        expected = module(torch.from_numpy(IMAGES))
    np.testing.assert_allclose(run(canonicalise(foreign), IMAGES), expected, atol=1e-5)

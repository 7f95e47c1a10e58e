"""The gradient as forward operations: what the graph is, where it starts, and what is refused."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import nn

from defenses.classifier import Classifier, LayerNotFound
from defenses.onnx_gradient import GradientUnsupported, ImageNotReached, gradient_graph
from defenses.onnx_import import export_classifier

BODY = """
    maps = Conv <pads = [1, 1, 1, 1]> (image, w)
    active = Relu (maps)
    pooled = GlobalAveragePool (active)
    flat = Flatten (pooled)
    logits = MatMul (flat, head)
"""


def classifier(body: str = BODY, opset: int = 18) -> Classifier:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> '
        f"small (float[N, 3, 8, 8] image) => (float[N, 5] logits) {{ {body} }}"
    )
    generator = np.random.default_rng(0)
    weights = {"w": generator.normal(size=(4, 3, 3, 3)), "head": generator.normal(size=(4, 5))}
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items() if name in used
    )
    return Classifier(model)


def run(model: ModelProto, image: torch.Tensor, cotangent: torch.Tensor) -> dict[str, NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    results = session.run(None, {"image": image.numpy(), "cotangent": cotangent.numpy()})
    return dict(zip(names, results, strict=True))


def signature(model: ModelProto) -> list[tuple[str, int, list[str | int]]]:
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    ]


def images(batch: int = 5) -> torch.Tensor:
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def cotangents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_graph_has_the_stated_ends_and_forward_operations_alone() -> None:
    model = gradient_graph(classifier())
    assert signature(model) == [
        ("image", 1, ["N", 3, 8, 8]),
        ("cotangent", 1, ["N", 5]),
        ("logits", 1, ["N", 5]),
        ("gradient", 1, ["N", 3, 8, 8]),
    ]
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [entry.domain for entry in model.opset_import] == [""]


def test_nodes_that_nothing_needs_are_left_out_and_the_weights_stand_in_it_once() -> None:
    plain = classifier()
    beside = classifier(BODY + "idle = Tanh (active) unread = Exp (idle)")
    model = gradient_graph(beside)
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in gradient_graph(plain).graph.node]
    sizes = [int(np.prod(tensor.dims)) for tensor in model.graph.initializer]
    assert sizes.count(4 * 3 * 3 * 3) == 1


def test_the_classifier_stays_as_it_was() -> None:
    own = classifier()
    before = own.model.SerializeToString(deterministic=True)
    gradient_graph(own, "active")
    assert own.model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21, 22])
def test_opsets_outside_18_to_21_are_brought_within(opset: int) -> None:
    own = classifier(BODY, opset)
    model = gradient_graph(own)
    assert model.opset_import[0].version == min(max(opset, 18), 21)
    x, cotangent = images(), cotangents(5, 5)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((own(leaf) * cotangent).sum(), leaf)
    np.testing.assert_allclose(run(model, x, cotangent)["gradient"], expected, atol=1e-6)


def test_values_named_as_the_new_ends_keep_their_meaning() -> None:
    body = BODY.replace("maps", "gradient").replace("active", "cotangent").replace("pooled", "activations")
    own, renamed = classifier(), classifier(body)
    x, cotangent = images(), cotangents(5, 4, 8, 8)
    expected = run(gradient_graph(own, "maps"), x, cotangent)
    found = run(gradient_graph(renamed, "gradient"), x, cotangent)
    assert signature(gradient_graph(renamed))[1] == ("cotangent", 1, ["N", 5])
    for name in ("logits", "activations", "gradient"):
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(("layer", "shape"), [("maps", (4, 8, 8)), ("active", (4, 8, 8)), ("flat", (4,))])
def test_the_gradient_of_an_inner_layer(layer: str, shape: tuple[int, ...]) -> None:
    own = classifier()
    x, cotangent = images(), cotangents(5, *shape)
    found = run(gradient_graph(own, layer), x, cotangent)
    leaf = x.clone().requires_grad_()
    logits, features = own.logits_and_features(leaf, layer)
    (expected,) = torch.autograd.grad((features * cotangent).sum(), leaf)
    np.testing.assert_allclose(found["logits"], logits.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["activations"], features.detach(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["gradient"], expected, rtol=1e-5, atol=1e-5)


def test_what_reads_the_cotangent_comes_after_the_whole_classifier() -> None:
    own = classifier()
    model = gradient_graph(own, "flat")
    names = [node.output[0] for node in model.graph.node]
    first = next(place for place, node in enumerate(model.graph.node) if "cotangent" in node.input)
    assert max(names.index(node.output[0]) for node in own.model.graph.node) < first


def test_a_layer_exported_from_a_module_goes_by_the_modules_name() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    own = Classifier(export_classifier(module, (3, 8, 8)))
    x, cotangent = images(), cotangents(5, 4, 6, 6)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((module[:2](leaf) * cotangent).sum(), leaf)
    np.testing.assert_allclose(run(gradient_graph(own, "1"), x, cotangent)["gradient"], expected, atol=1e-6)


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(LayerNotFound, match="no layer named 'activ'; near to it are active"):
        gradient_graph(classifier(), "activ")


def test_every_operator_without_a_derivative_is_named() -> None:
    body = BODY.replace("active = Relu (maps)", "sums = CumSum (maps, axis) active = Sin (sums)")
    body = f"axis = Constant <value_int = 2> () {body}"
    with pytest.raises(GradientUnsupported, match=r"CumSum .*'sums'.*no derivative here; Sin .*'active'") as caught:
        gradient_graph(classifier(body))
    assert [node.operator for node in caught.value.nodes] == ["CumSum", "Sin"]
    assert isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ('pads = Constant <value_ints = [0,0,1,1,0,0,1,1]> () y = Pad <mode = "reflect"> (maps, pads)', "'reflect'"),
        ("y = Pow (two, maps)", "its gradient by 'maps' is not supported"),
        ("y = MaxPool <kernel_shape = [2, 2], storage_order = 1> (maps)", "by columns"),
        ("axes = Constant <value_ints = [0]> () y = ReduceSum (maps, axes)", "size depends on the batch"),
    ],
)
def test_forms_of_operators_without_a_derivative_are_refused_with_the_reason(step: str, reason: str) -> None:
    constants = "two = Constant <value_float = 2.0> ()"
    body = BODY.replace("active = Relu (maps)", f"{constants} {step} active = Relu (y)")
    with pytest.raises(GradientUnsupported, match=reason):
        gradient_graph(classifier(body))


def test_an_operator_beside_the_path_needs_no_derivative() -> None:
    body = BODY.replace("active = Relu (maps)", "floor = Floor (maps) cut = Sub (maps, floor) active = Relu (cut)")
    own = classifier(body)
    x, cotangent = images(), cotangents(5, 5)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((own(leaf) * cotangent).sum(), leaf)
    np.testing.assert_allclose(run(gradient_graph(own), x, cotangent)["gradient"], expected, atol=1e-6)


def test_logits_that_no_gradient_reaches_are_refused() -> None:
    with pytest.raises(ImageNotReached, match="Expected 'logits' to depend on the image"):
        gradient_graph(classifier(BODY.replace("Relu (maps)", "Sign (maps)")))

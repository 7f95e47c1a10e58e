"""Whole networks: the gradient of the graph on ONNX Runtime beside torch's, and what it costs."""

import copy
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.architectures import cifar_resnet
from defenses.classifier import Classifier
from defenses.onnx_gradient import gradient_graph
from defenses.onnx_import import canonicalise, export_classifier

Randomised = Callable[[nn.Module], nn.Module]
Exported = Callable[[str], tuple[nn.Module, Classifier]]
ScriptExport = Callable[[nn.Module, Tensor, int], ModelProto]


class Vgg(nn.Sequential):
    """Convolutions and pools of two kinds, and a dense head of two layers."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
            *(nn.Conv2d(24, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(288, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 10)),
        )


class Dense(nn.Module):
    """Layers that read all that came before them, and a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3, padding=1))
            for width in (8, 14, 20, 26)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        logits: Tensor = self.head(F.relu(self.transition(x)).mean((2, 3)))
        return logits


class Mobile(nn.Module):
    """Inverted residuals: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, stride: int, width: int = 12, expanded: int = 24) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, expanded, 1, bias=False), nn.BatchNorm2d(expanded), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(expanded, expanded, 5, stride, padding=2, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            nn.Hardswish(),
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(expanded, 8, 1), nn.ReLU(), nn.Conv2d(8, expanded, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(expanded, width, 1, bias=False), nn.BatchNorm2d(width))
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of as many channels."""
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.excite(y))
        return x + y if self.residual else y


class Attention(nn.Module):
    """A vision transformer of one block, with a class token."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 17, width) / 4)
        self.heads = heads
        self.before, self.between, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.mixed, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        q, k, v = self.mixed(self.before(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.joined((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.dense(self.between(x))
        logits: Tensor = self.head(self.after(x)[:, 0])
        return logits


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    match name:
        case "resnet":
            return cifar_resnet(20)
        case "vgg":
            return Vgg()
        case "densenet":
            return Dense()
        case "mobilenet":
            stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12), nn.Hardswish())
            return nn.Sequential(
                *(stem, Mobile(1), Mobile(2), Mobile(1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)
            )
    return Attention()


class Apart(NamedTuple):
    """How far each image's gradient is from torch's, relative to its L2 norm: by the median and at most."""

    median: float
    most: float


def compare(own: Classifier, reference: Callable[[Tensor], Tensor], batches: tuple[int, ...] = (1, 5, 11)) -> Apart:
    session = onnxruntime.InferenceSession(gradient_graph(own).SerializeToString(), providers=["CPUExecutionProvider"])
    found_in_all, wanted_in_all = list[Tensor](), list[Tensor]()
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        x, cotangent = torch.rand(batch, 3, 32, 32, generator=generator), torch.randn(batch, 10, generator=generator)
        logits, found = session.run(["logits", "gradient"], {"image": x.numpy(), "cotangent": cotangent.numpy()})
        leaf = x.clone().requires_grad_()
        expected = reference(leaf)
        scale = expected.abs().max().item()
        np.testing.assert_allclose(logits, expected.detach(), rtol=0, atol=1e-4 * scale)
        (wanted,) = torch.autograd.grad((expected * cotangent).sum(), leaf)
        assert wanted.flatten(1).norm(dim=1).min() > 1e-6
        found_in_all.append(torch.from_numpy(found))
        wanted_in_all.append(wanted)
    return distances(torch.cat(found_in_all), torch.cat(wanted_in_all))


def distances(found: Tensor, wanted: Tensor) -> Apart:
    apart = ((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).tolist()
    return Apart(statistics.median(apart), max(apart))


@pytest.fixture(scope="module")
def exported(randomised: Randomised) -> Exported:
    built: dict[str, tuple[nn.Module, Classifier]] = {}

    def export(name: str) -> tuple[nn.Module, Classifier]:
        if name not in built:
            module = randomised(build(name))
            opset = 18 if name == "mobilenet" else 20
            built[name] = module, Classifier(export_classifier(module, (3, 32, 32), opset))
        return built[name]

    return export


def near(apart: Apart) -> bool:
    """Say whether most are near and none is far: rounding may turn a ReLU or a maximum over in an image."""
    return apart.median < 1e-4 and apart.most < 5e-2


@pytest.mark.parametrize("name", ["resnet", "vgg", "densenet", "mobilenet", "attention"])
def test_a_network_of_the_dynamo_exporter_has_torchs_gradient(name: str, exported: Exported) -> None:
    module, own = exported(name)
    assert near(compare(own, own))
    exact = copy.deepcopy(module).double()
    assert near(compare(own, lambda x: exact(x.double()).float()))


@pytest.mark.parametrize(("name", "opset"), [("vgg", 17), ("vgg", 13), ("mobilenet", 13), ("attention", 17)])
def test_a_network_of_the_script_exporter_has_torchs_gradient(
    name: str, opset: int, randomised: Randomised, export_by_script: ScriptExport
) -> None:
    module = randomised(build(name))
    own = Classifier(canonicalise(export_by_script(module, torch.rand(2, 3, 32, 32), opset)))
    assert near(compare(own, own))


def test_the_gradient_of_the_front_neurons_less_the_tail_neurons_is_torchs(exported: Exported) -> None:
    _, own = exported("resnet")
    layer = own.head_layer.name
    model = gradient_graph(own, layer)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    signs = torch.zeros(9, *own.head_layer.shape)
    signs[:, :5], signs[:, -5:] = 1, -1
    activations, found = session.run(["activations", "gradient"], {"image": x.numpy(), "cotangent": signs.numpy()})
    leaf = x.clone().requires_grad_()
    features = own.features(leaf, layer)
    (wanted,) = torch.autograd.grad((features * signs).sum(), leaf)
    np.testing.assert_allclose(activations, features.detach(), rtol=0, atol=1e-4)
    assert near(distances(torch.from_numpy(found), wanted))


def multiply_adds(model: ModelProto) -> int:
    """Count those of convolutions and dense products for one image."""
    single = ModelProto()
    single.CopyFrom(model)
    for value in (*single.graph.input, *single.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    } | {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    total = 0
    for node in inferred.node:
        weights = int(np.prod(shapes[node.input[1]])) if len(node.input) > 1 else 0
        if node.op_type == "Conv":
            total += weights * int(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "ConvTranspose":
            total += weights * int(np.prod(shapes[node.input[0]][2:]))
        elif node.op_type in ("Gemm", "MatMul"):
            total += weights
    return total


def test_a_gradient_costs_as_much_again_as_the_forward_pass(exported: Exported) -> None:
    _, own = exported("resnet")
    model = gradient_graph(own)
    forward, both = multiply_adds(own.model), multiply_adds(model)
    assert forward > 40_000_000
    assert 1.9 < both / forward < 2.1
    assert len(model.SerializeToString()) < 1.2 * len(own.model.SerializeToString())

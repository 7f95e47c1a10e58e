"""Whole networks from torch's two exporters: eager torch, ONNX Runtime and the interpreter agree."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from defenses.onnx_import import export_classifier
from defenses.onnx_torch import OnnxModule

pytestmark = pytest.mark.long

Randomised = Callable[[nn.Module], nn.Module]
ScriptExport = Callable[[nn.Module, Tensor, int], onnx.ModelProto]


@pytest.fixture(scope="module")
def network(torchvision_models: ModuleType, randomised: Randomised) -> Callable[[str], nn.Module]:
    built: dict[str, nn.Module] = {}

    def build(name: str) -> nn.Module:
        if name not in built:
            torch.manual_seed(1)
            built[name] = randomised(_fresh(torchvision_models, name))
        return built[name]

    return build


def _fresh(models: ModuleType, name: str) -> nn.Module:
    match name:
        case "vit":
            module: nn.Module = models.VisionTransformer(32, 8, 3, 2, hidden_dim=16, mlp_dim=32, num_classes=10)
        case "swin":
            module = models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10)
        case "convnext":
            blocks = [models.convnext.CNBlockConfig(16, 32, 2), models.convnext.CNBlockConfig(32, None, 2)]
            module = models.ConvNeXt(blocks, num_classes=10)
        case "vgg11":  # its own dense layers hold 500 MB
            module = models.vgg11(num_classes=10)
            module.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
        case _:
            module = models.get_model(name, weights=None, num_classes=10)
    return module


def _assert_agreement(module: nn.Module, model: onnx.ModelProto, image_size: int) -> None:
    """Logits of eager torch, ONNX Runtime and the interpreter; input gradients of the first and the last."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    interpreted = OnnxModule(model)
    apart: list[float] = []
    for batch in (1, 3):
        x = torch.rand(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))
        eager_x, x = x.clone().requires_grad_(), x.requires_grad_()
        eager, (logits,) = module(eager_x), interpreted(x)
        (reference,) = session.run(None, {session.get_inputs()[0].name: x.detach().numpy()})
        scale = eager.abs().max().item()
        assert eager.std(1).min() > 1e-3
        np.testing.assert_allclose(logits.detach(), eager.detach(), rtol=0, atol=2e-5 * scale)
        np.testing.assert_allclose(logits.detach(), reference, rtol=0, atol=2e-5 * scale)
        weights = torch.linspace(-1, 1, 10)
        (expected,) = torch.autograd.grad((eager @ weights).sum(), eager_x)
        (gradient,) = torch.autograd.grad((logits @ weights).sum(), x)
        distances = (gradient - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        apart += distances.tolist()
    # The exporters fold batch normalisation into the weights: rounding may turn a ReLU over in an image.
    assert sorted(apart)[1] < 1e-4
    assert max(apart) < 5e-2


@pytest.mark.parametrize(
    ("name", "opset"),
    [("resnet18", 18), ("resnet18", 20), ("vgg11", 18), ("vit", 18), ("vit", 20), ("vit", 23)],
)
def test_a_network_of_the_dynamo_exporter_agrees(network: Callable[[str], nn.Module], name: str, opset: int) -> None:
    size = 32 if name == "vit" else 64
    module = network(name)
    _assert_agreement(module, export_classifier(module, (3, size, size), opset), size)


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        ("resnet18", 17),
        ("resnet18", 11),
        ("resnet18", 9),
        ("vit", 17),
        ("vit", 14),
        ("densenet121", 17),
        ("mobilenet_v2", 17),
        ("mobilenet_v3_small", 17),
        ("mobilenet_v3_small", 11),
        ("efficientnet_b0", 17),
        ("squeezenet1_1", 13),
        ("shufflenet_v2_x0_5", 17),
        ("googlenet", 17),
        ("convnext", 17),
        ("swin", 17),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_a_network_of_the_script_exporter_agrees(
    network: Callable[[str], nn.Module], export_by_script: ScriptExport, name: str, opset: int
) -> None:
    size = 32 if name == "vit" else 64
    module = network(name)
    _assert_agreement(module, export_by_script(module, torch.rand(2, 3, size, size), opset), size)

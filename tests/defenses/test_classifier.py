"""A classifier from its graph alone: logits, features at named layers, and the layers it finds by itself."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import onnx.parser
import pytest
import torch
from torch import Tensor, nn

from defenses.architectures import cifar_resnet, load_state
from defenses.classifier import Classifier, LayerNotFound
from defenses.onnx_import import GraphUnsuitable, canonicalise, check_parity, export_classifier

ScriptExport = Callable[[nn.Module, Tensor, int], onnx.ModelProto]
Randomised = Callable[[nn.Module], nn.Module]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def resnet(randomised: Randomised) -> nn.Module:
    return randomised(cifar_resnet(20))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["dynamo", "script"])
def classifier(request: pytest.FixtureRequest, resnet: nn.Module, export_by_script: ScriptExport) -> Classifier:
    if request.param == "dynamo":
        return Classifier(canonicalise(export_classifier(resnet, (3, 32, 32))))
    return Classifier(canonicalise(export_by_script(resnet, torch.rand(2, 3, 32, 32), 17)))


def eager_stages(resnet: nn.Module, images: Tensor) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: kept.update({name: output.detach()}))
        for name, module in resnet.named_modules()
    ]
    with torch.no_grad():
        kept["logits"] = resnet(images)
    for hook in hooks:
        hook.remove()
    return kept


def test_it_says_what_it_takes_and_gives(classifier: Classifier, images: Tensor) -> None:
    assert classifier.image_shape == (3, 32, 32)
    assert classifier.classes == 10
    assert classifier(images).shape == (4, 10)
    assert isinstance(classifier.model, onnx.ModelProto)


@pytest.mark.parametrize("scope", ["layer1", "layer2", "layer2.1", "layer3.2", "linear"])
def test_features_at_a_module_are_what_the_module_gives(
    classifier: Classifier, resnet: nn.Module, images: Tensor, scope: str
) -> None:
    expected = eager_stages(resnet, images)[scope]
    torch.testing.assert_close(classifier.features(images, scope), expected, rtol=1e-4, atol=1e-4)


def test_logits_and_features_come_from_one_pass(classifier: Classifier, images: Tensor) -> None:
    logits, features = classifier.logits_and_features(images, "layer2")
    torch.testing.assert_close(logits, classifier(images))
    torch.testing.assert_close(features, classifier.features(images, "layer2"))
    assert features.min() == 0


def test_gradients_reach_the_image_from_logits_and_features_alike(classifier: Classifier, images: Tensor) -> None:
    x = images.clone().requires_grad_()
    logits, features = classifier.logits_and_features(x, "layer2")
    for value in (logits, features):
        (gradient,) = torch.autograd.grad(value.square().sum(), x, retain_graph=True)
        assert gradient.flatten(1).norm(dim=1).min() > 0
    assert all(not parameter.requires_grad for parameter in classifier.parameters())


def test_a_layer_goes_by_its_value_name_too(classifier: Classifier) -> None:
    layer = classifier.resolve_layer("layer2")
    assert classifier.resolve_layer(layer.name) == layer
    assert layer.operator == "Relu"
    assert layer.shape == (32, 16, 16)
    assert layer.scope.startswith("layer2.2")
    assert layer in classifier.layers()


def test_layers_are_listed_in_order_with_shapes_that_count_no_batch(classifier: Classifier) -> None:
    layers = classifier.layers()
    assert [layer.operator for layer in layers].count("Conv") == 19
    assert layers[0].shape == (16, 32, 32)
    assert layers[-1].name == "logits"
    assert layers[-1].shape == (10,)


def test_the_tap_of_a_cifar_resnet_is_the_output_of_its_second_stage(classifier: Classifier) -> None:
    assert classifier.tap == classifier.resolve_layer("layer2")


def test_the_head_layer_of_a_cifar_resnet_is_its_pooled_vector(
    classifier: Classifier, resnet: nn.Module, images: Tensor
) -> None:
    assert classifier.head_layer.shape == (64,)
    pooled = eager_stages(resnet, images)["layer3"].mean((2, 3))
    torch.testing.assert_close(classifier.features(images, classifier.head_layer.name), pooled, rtol=1e-4, atol=1e-4)


def test_an_unknown_layer_is_refused_with_names_near_to_it(classifier: Classifier, images: Tensor) -> None:
    with pytest.raises(LayerNotFound, match=r"no layer named 'layr2'; near to it are .*layer2"):
        classifier.features(images, "layr2")
    with pytest.raises(KeyError):
        classifier.resolve_layer("")


def test_copies_pickles_and_files_say_the_same(classifier: Classifier, images: Tensor, tmp_path: Path) -> None:
    onnx.save(classifier.model, tmp_path / "model.onnx")
    expected = classifier(images)
    twins = (
        copy.deepcopy(classifier),
        pickle.loads(pickle.dumps(classifier)),
        Classifier.load(tmp_path / "model.onnx"),
    )
    for twin in twins:
        torch.testing.assert_close(twin(images), expected)
        assert twin.tap == classifier.tap


@pytest.mark.parametrize(
    ("name", "size", "tap", "tap_shape", "head_shape"),
    [
        ("resnet18", 64, "layer1", (64, 16, 16), (512,)),
        ("resnet50", 64, "layer1", (256, 16, 16), (2048,)),
        ("densenet121", 64, "features.transition1.conv", (128, 16, 16), (1024,)),
        ("mobilenet_v2", 64, "features.4.conv.0", (144, 16, 16), (1280,)),
        ("vgg11", 32, "features.4", (128, 16, 16), (512,)),
    ],
)
def test_layers_are_found_in_networks_of_other_families(
    torchvision_models: ModuleType,
    export_by_script: ScriptExport,
    name: str,
    size: int,
    tap: str,
    tap_shape: tuple[int, ...],
    head_shape: tuple[int, ...],
) -> None:
    module = torchvision_models.get_model(name, weights=None, num_classes=7).eval()
    if name == "vgg11":
        module.avgpool, module.classifier = (
            nn.Identity(),
            nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 7)),
        )
    classifier = Classifier(canonicalise(export_by_script(module, torch.rand(2, 3, size, size), 17)))
    assert classifier.tap == classifier.resolve_layer(tap)
    assert classifier.tap.shape == tap_shape
    assert classifier.head_layer.shape == head_shape
    layers = classifier.layers()
    dense = next(layer for layer in layers if layer.operator == "Gemm")
    assert layers.index(classifier.head_layer) == layers.index(dense) - 1


def test_the_tap_of_a_transformer_is_a_residual_sum_in_its_middle(
    torchvision_models: ModuleType, export_by_script: ScriptExport
) -> None:
    vit = torchvision_models.VisionTransformer(32, 8, 4, 2, hidden_dim=16, mlp_dim=32, num_classes=5).eval()
    classifier = Classifier(canonicalise(export_by_script(vit, torch.rand(2, 3, 32, 32), 17)))
    assert classifier.tap == classifier.resolve_layer("encoder.layers.encoder_layer_1")
    assert classifier.tap.operator == "Add"
    assert classifier.tap.shape == (17, 16)
    assert classifier.head_layer.shape == (16,)


def _dense_only() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 1, 4, 4] image) => (float[N, 16] logits)
        { logits = Flatten (image) }"""
    )


def test_where_no_layer_fits_the_caller_is_asked_to_name_one() -> None:
    classifier = Classifier(_dense_only())
    with pytest.raises(LayerNotFound, match=r"for the Inspector.*Name one\."):
        _ = classifier.tap
    with pytest.raises(LayerNotFound, match=r"for NIP.*Name one\."):
        _ = classifier.head_layer


def test_a_graph_that_is_not_canonical_is_refused() -> None:
    model = _dense_only()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "K"
    with pytest.raises(GraphUnsuitable, match=r"Expected a canonical graph.*got image \[0, 1, 4, 4\]"):
        Classifier(model)


def test_published_weights_classify_as_published(
    published_weights: Callable[[str], Path], cifar10_test: tuple[Tensor, Tensor]
) -> None:
    module = cifar_resnet(20)
    load_state(module, published_weights("resnet20-12fca82f.th"))
    model = canonicalise(export_classifier(module, (3, 32, 32)), normalisation=(MEAN, DEVIATION))
    classifier = Classifier(model)
    images, labels = cifar10_test
    with torch.no_grad():
        accuracy = (classifier(images).argmax(1) == labels).float().mean().item()
    assert accuracy > 0.88
    assert check_parity(model, classifier.graph).scale > 1

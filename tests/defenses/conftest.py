"""What the tests of classifiers share: networks with weights that are not degenerate, and the published ones."""

import io
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on one thread: as fast, the same rounding everywhere, and no waiting on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def torchvision_models() -> Iterator[ModuleType]:
    """The module ``torchvision.models``, importable beside a CPU build of torch too."""
    library = None
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    yield torchvision.models
    del library  # what it defines goes with it


@pytest.fixture(scope="session")
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Give a fresh network statistics and weights under which every layer matters, and set it to evaluation."""

    def uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    def fill(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    assert layer.running_mean is not None
                    assert layer.running_var is not None
                    layer.weight.copy_(uniform(layer.weight, 0.6, 1.4, generator))
                    layer.bias.copy_(uniform(layer.bias, -0.2, 0.2, generator))
                    layer.running_mean.copy_(uniform(layer.running_mean, -0.2, 0.2, generator))
                    layer.running_var.copy_(uniform(layer.running_var, 0.5, 1.5, generator))
                elif isinstance(layer, nn.Conv2d | nn.Linear):
                    fan_in = layer.weight[0].numel()
                    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                    if layer.bias is not None:
                        layer.bias.copy_(uniform(layer.bias, -0.2, 0.2, generator))
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def export_by_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module, Tensor, int], onnx.ModelProto]:
    """Export a module by torch's older exporter at an opset, with a dynamic batch."""

    def export(module: nn.Module, image: Tensor, opset: int) -> onnx.ModelProto:
        path = tmp_path_factory.mktemp("script") / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (image,),
                path,
                input_names=["image"],
                output_names=["logits"],
                dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
                opset_version=opset,
                dynamo=False,
            )
        return onnx.load(str(path))

    return export


@pytest.fixture(scope="session")
def published_weights() -> Callable[[str], Path]:
    """The path of published weights by name; skips where the data folder is not there."""

    def path(name: str) -> Path:
        if not (DATA / "weights" / name).exists():
            pytest.skip("The folder of real data and published weights is not here.")
        return DATA / "weights" / name

    return path


@pytest.fixture(scope="session")
def cifar10_test() -> tuple[Tensor, Tensor]:
    """300 CIFAR-10 test images (300, 3, 32, 32) in [0, 1] and their classes; skips where the data is not there."""
    if not (DATA / "cifar10" / "test.zip").exists():
        pytest.skip("The folder of real data and published weights is not here.")
    images, labels = [], []
    with zipfile.ZipFile(DATA / "cifar10" / "test.zip") as archive:
        names = sorted(
            (name for name in archive.namelist() if name.endswith(".webp")), key=lambda name: Path(name).name
        )
        for name in names[:300]:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255)
            labels.append(CLASSES.index(Path(name).parent.name))
    return torch.stack(images), torch.tensor(labels)

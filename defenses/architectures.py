"""Classifiers by name: the CIFAR ResNet family, torchvision's, or a factory of the user's own."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_RESNET = "cifar_resnet"
TORCHVISION = "torchvision"


class ArchitectureNotFound(LookupError):
    """A spec names no architecture that can be built."""

    def __init__(self, spec: str, reason: str) -> None:
        self.spec = spec
        super().__init__(f"No classifier can be built from {spec!r}: {reason}")


class WeightsMismatch(ValueError):
    """A file of weights does not fit the module it was meant for."""

    def __init__(self, path: Path, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
        self.path, self.missing, self.unexpected, self.misshapen = path, missing, unexpected, misshapen
        facts = [
            f"{what} {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
            for what, keys in (("lack", missing), ("unknown", unexpected), ("of another shape", misshapen))
            if keys
        ]
        super().__init__(f"The weights in {path} do not fit the architecture: {'; '.join(facts)}.")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an option A shortcut: striding, and channels padded with zeros (He et al. 4.2)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.padding = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels_out, H/stride, W/stride) for x of shape (N, channels_in, H, W)."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(residual + x)


class CifarResNet(nn.Module):
    """The ResNet for 32x32 images of He et al. (2016), section 4.2: depth 6 n + 2, stages of 16, 32, 64 channels."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels_out, stride)
        return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) for normalised images (N, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def cifar_resnet(depth: int, classes: int = 10) -> CifarResNet:
    """Build the CIFAR ResNet of a depth of 6 n + 2: 20, 32, 44, 56, 110. Raises ``ArchitectureNotFound``."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ArchitectureNotFound(
            f"{CIFAR_RESNET}{depth}", f"the depth must be 6 n + 2, such as 20 or 32, not {depth}."
        )
    return CifarResNet(blocks, classes)


def build(spec: str, classes: int) -> nn.Module:
    """Build a classifier of ``classes`` classes with fresh weights.

    ``spec`` is ``cifar_resnet20`` (or another depth), ``torchvision:resnet18``, or ``package.module:factory``, where
    the factory takes ``classes`` or ``num_classes`` (or neither) and the module may lie in the current directory.
    Raises ``ArchitectureNotFound``.
    """
    origin, colon, name = spec.partition(":")
    if not colon:
        depth = spec.removeprefix(CIFAR_RESNET)
        if depth == spec or not depth.isdecimal():
            raise ArchitectureNotFound(
                spec, f"expected {CIFAR_RESNET}20, torchvision:resnet18 or package.module:factory, for example."
            )
        return cifar_resnet(int(depth), classes)
    if origin == TORCHVISION:
        return _torchvision(spec, name, classes)
    return _call_factory(spec, _factory(spec, origin, name), classes)


def load_state(module: nn.Module, path: Path) -> None:
    """Load weights from a safetensors or a torch file into ``module``.

    Torch files are read with ``weights_only``; a wrapping dict with ``state_dict`` and the prefix ``module.`` of a
    parallel trainer are taken off. Raises ``WeightsMismatch``, naming the keys that lack, are unknown or differ in
    shape, and ``ValueError`` when the file is neither.
    """
    state = _without_prefix(_read_state(path))
    expected = module.state_dict()
    # Files written before torch 0.4 carry no batch counters, and nothing at inference reads them.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if missing or unexpected or misshapen:
        raise WeightsMismatch(path, missing, unexpected, misshapen)
    module.load_state_dict(state, strict=False)


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a file of weights: expected safetensors or a torch state dict.") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected names and tensors.")
    return dict(content)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _torchvision(spec: str, name: str, classes: int) -> nn.Module:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise ArchitectureNotFound(
            spec,
            f"torchvision does not import beside this build of torch ({error}); install the torchvision that was "
            f"built for torch {torch.__version__}.",
        ) from error
    if name not in models.list_models(module=models):
        raise ArchitectureNotFound(spec, f"torchvision {models.__package__} has no classifier named {name!r}.")
    module: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return module


def _factory(spec: str, origin: str, name: str) -> Callable[..., Any]:
    try:
        with _current_directory_importable():
            module = importlib.import_module(origin)
    except ImportError as error:
        raise ArchitectureNotFound(spec, f"the module {origin!r} does not import: {error}.") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ArchitectureNotFound(spec, f"the module {origin!r} has no callable {name!r}.")
    return factory  # type: ignore[no-any-return]


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _call_factory(spec: str, factory: Callable[..., Any], classes: int) -> nn.Module:
    try:
        parameters = inspect.signature(factory).parameters
        module = factory(**{name: classes for name in ("classes", "num_classes") if name in parameters})
    except Exception as error:
        raise ArchitectureNotFound(spec, f"its factory failed with {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ArchitectureNotFound(spec, f"its factory returned {type(module).__name__}, expected a torch.nn.Module.")
    return module

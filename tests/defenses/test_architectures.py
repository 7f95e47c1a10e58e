"""Classifiers by name, and the weights that go into them."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from defenses.architectures import ArchitectureNotFound, CifarResNet, WeightsMismatch, build, cifar_resnet, load_state


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_a_cifar_resnet_has_the_parameters_its_authors_count(depth: int, parameters: int) -> None:
    module = cifar_resnet(depth)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth", [0, 2, 21])
def test_a_depth_that_no_resnet_has_is_refused(depth: int) -> None:
    with pytest.raises(ArchitectureNotFound, match=f"6 n \\+ 2, such as 20 or 32, not {depth}"):
        cifar_resnet(depth)


def test_a_built_in_is_built_with_its_classes() -> None:
    module = build("cifar_resnet32", 7)
    assert isinstance(module, CifarResNet)
    assert len(module.layer1) == 5
    assert module.linear.out_features == 7


def test_torchvision_is_built_by_name(torchvision_models: ModuleType) -> None:
    module = build("torchvision:resnet18", 7)
    assert isinstance(module, torchvision_models.ResNet)
    assert module.fc.out_features == 7
    with pytest.raises(ArchitectureNotFound, match="no classifier named 'resnet19'"):
        build("torchvision:resnet19", 7)


def test_a_torchvision_that_does_not_import_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArchitectureNotFound, match=r"does not import beside this build of torch.*install") as caught:
        build("torchvision:resnet18", 10)
    assert torch.__version__ in str(caught.value)


FACTORIES = """
from torch import nn
def small(classes): return nn.Linear(4, classes)
def renamed(num_classes): return nn.Linear(4, num_classes)
def fixed(): return nn.Linear(4, 3)
def failing(classes): raise OSError("no disk")
def wrong(classes): return "a string"
number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    return "my_factories"


@pytest.mark.parametrize(("factory", "classes"), [("small", 6), ("renamed", 6), ("fixed", 3)])
def test_a_factory_in_the_current_directory_is_called(factories: str, factory: str, classes: int) -> None:
    path = list(sys.path)
    module = build(f"{factories}:{factory}", 6)
    assert isinstance(module, nn.Linear)
    assert module.out_features == classes
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet20", "expected cifar_resnet20, torchvision:resnet18 or package.module:factory"),
        ("cifar_resnetXX", "expected cifar_resnet20"),
        ("no_such_package:net", "'no_such_package' does not import"),
        ("my_factories:missing", "has no callable 'missing'"),
        ("my_factories:number", "has no callable 'number'"),
        ("my_factories:failing", "failed with OSError: no disk"),
        ("my_factories:wrong", "returned str, expected a torch.nn.Module"),
    ],
)
def test_a_spec_that_builds_nothing_is_told_why(factories: str, spec: str, message: str) -> None:
    with pytest.raises(ArchitectureNotFound, match=message) as caught:
        build(spec, 10)
    assert caught.value.spec == spec


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_load_wrapped_or_not_and_with_the_prefix_of_parallel_training(
    tmp_path: Path, wrapped: bool, prefix: str
) -> None:
    source, target = cifar_resnet(20), cifar_resnet(20)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "weights.th")
    load_state(target, tmp_path / "weights.th")
    assert torch.equal(target.state_dict()["layer3.2.conv2.weight"], source.state_dict()["layer3.2.conv2.weight"])


def test_safetensors_files_load(tmp_path: Path) -> None:
    source, target = cifar_resnet(20), cifar_resnet(20)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_state(target, tmp_path / "weights.safetensors")
    assert torch.equal(target.linear.weight, source.linear.weight)


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    target = cifar_resnet(20)
    before = target.conv1.weight.clone()
    state = cifar_resnet(20, classes=7).state_dict()
    state["extra.weight"] = state.pop("bn1.bias")
    torch.save(state, tmp_path / "weights.th")
    with pytest.raises(WeightsMismatch) as caught:
        load_state(target, tmp_path / "weights.th")
    error = caught.value
    assert (error.missing, error.unexpected) == (["bn1.bias"], ["extra.weight"])
    assert error.misshapen[0] == "linear.weight (7, 64), expected (10, 64)"
    assert "lack bn1.bias; unknown extra.weight; of another shape linear.weight" in str(error)
    assert torch.equal(target.conv1.weight, before)


class Unwelcome:
    """What a pickle may hold and a file of weights may not."""


@pytest.mark.parametrize("content", [{"state_dict": {"epoch": 3}}, [1, 2], Unwelcome()])
def test_files_that_hold_no_weights_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.th")
    with pytest.raises(ValueError, match=r"weights\.th (is not a file of weights|holds no state dict)"):
        load_state(cifar_resnet(20), tmp_path / "weights.th")


def test_published_weights_load(published_weights: Callable[[str], Path]) -> None:
    for depth, name in ((20, "resnet20-12fca82f.th"), (32, "resnet32-d509ac18.th")):
        module = cifar_resnet(depth)
        load_state(module, published_weights(name))
        assert module.bn1.running_var is not None
        assert not torch.equal(module.bn1.running_var, torch.ones(16))

"""A store on every backend, and something real enough to publish."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import model_store
from model_store import (
    AttackRecord,
    DataRecord,
    Draft,
    FalsePositiveRate,
    InputSpec,
    LocalStorage,
    Normalisation,
    Parent,
    Storage,
    Store,
)

BACKENDS: dict[str, Callable[[Path], Storage]] = {"local": LocalStorage}
PROJECT = Path(model_store.__file__).parents[1]


@pytest.fixture(params=sorted(BACKENDS))
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each backend."""
    return BACKENDS[request.param](tmp_path / "models")


@pytest.fixture
def store(storage: Storage) -> Store:
    """An empty store on each backend."""
    return Store(storage)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a local store."""
    return tmp_path / "models"


@pytest.fixture
def draft() -> Draft:
    """A draft that fills every field."""
    return Draft(
        kind="coophance",
        input=InputSpec(
            shape=(3, 32, 32),
            mode="RGB",
            resize="bilinear",
            normalisation=Normalisation(mean=(0.5,) * 3, std=(0.25,) * 3),
        ),
        labels=("plane", "bird", "crane", "crane"),
        layers={"inspector": "layer3"},
        parent=Parent(name="cifar10", version=1, digest="ab" * 32),
        threshold=0.75,
        false_positive_rate=FalsePositiveRate(budget=0.05, calibrated_on=1000, realised=0.048, evaluated_on=2000),
        data=DataRecord(name="cifar10", digest="cd" * 32, split_seed=7, counts={"fit": 4000, "calibration": 1000}),
        attacks=(
            AttackRecord(
                name="pgd",
                parameters={"epsilon": 1.0, "steps": 10, "random": True, "norm": "inf"},
                examples=500,
                success_rate=0.99,
            ),
        ),
        metrics={"clean_accuracy": 0.91},
        options={"noise": [0.1, None, {"kind": "gaussian"}]},
        libraries={"torch": "2.13.0"},
        seed=3,
        command="portcullis fit coophance",
    )


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """A folder with a graph, its weights, a checkpoint below it and a report."""
    folder = tmp_path / "payload"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(bytes(range(256)) * 16)
    (folder / "model.onnx.data").write_bytes(b"weights" * 1000)
    (folder / "checkpoint" / "regulator.safetensors").write_bytes(b"\x08" + b"tensors" * 500)
    (folder / "checkpoint" / "config.json").write_text('{"width": 16}')
    (folder / "report.html").write_text("<p>0.91</p>")
    return folder


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start publisher.py as a process of its own; whatever still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(command: str, *arguments: object, within: Sequence[str] = ()) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("publisher.py")
        process = subprocess.Popen(
            [*within, sys.executable, str(script), command, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defenses.classifier import Classifier
from defenses.coophance import Inspector, InspectorConfig, Regulator, RegulatorConfig
from defenses.onnx_export import export_protected
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier
from loadtest.image_sets import ImageSet, crafted
from loadtest.serving import Running, gateway
from model_store import SERVING, Draft, FalsePositiveRate, InputSpec, Parent, Store
from service.datasets import load_dataset

SPEC = InputSpec(shape=(1, 16, 16), mode="L", resize="bilinear")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a classifier of digits, trained for real, as version 1, and CoopHANCE around it as version 2."""
    root = tmp_path_factory.mktemp("load") / "store"
    models = Store.open(root / "models")
    dataset = load_dataset(["digits"], SPEC, labels=None, split_seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = _trained(dataset.fit.images, dataset.fit.targets)
        classifier = Classifier(export_classifier(layers, SPEC.shape)).eval()
        config = RegulatorConfig(SPEC.shape, channels=(4, 8), skip_channels=(2, 2), output="residual")
        layer = next(layer for layer in classifier.layers() if layer.operator == "Relu")
        inspector = Inspector(InspectorConfig(layer.name, layer.shape, 10)).eval()
        protected = ProtectedClassifier(classifier, Regulator(config).eval(), inspector, 0.5).eval()
        graphs = (classifier.model, export_protected(protected))
    draft = {"input": SPEC, "labels": dataset.labels}
    rate = FalsePositiveRate(budget=0.05, calibrated_on=100, realised=0.0, evaluated_on=100)
    with tempfile.TemporaryDirectory() as folder:
        for number, graph in enumerate(graphs):
            part = Path(folder) / str(number)
            part.mkdir()
            (part / "model.onnx").write_bytes(graph.SerializeToString())
        bare = models.publish("digits", Draft(kind="classifier", **draft), Path(folder) / "0")
        parent = Parent(name="digits", version=1, digest=models.fetch("digits", bare.version).digest)
        defended = Draft(kind="coophance", parent=parent, threshold=0.5, false_positive_rate=rate, **draft)
        models.publish("digits", defended, Path(folder) / "1")
    models.set_alias("digits", SERVING, 2)
    return root


def _trained(images: np.ndarray, targets: np.ndarray) -> nn.Module:
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(targets)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10))
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(layers(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layers.eval()


@pytest.fixture(scope="session")
def image_set(store: Path) -> ImageSet:
    """Forty clean digits and those of them that fool the classifier once they are attacked."""
    return crafted(store, "digits", ["digits"], count=40, seed=0)


@pytest.fixture(scope="session")
def images_file(image_set: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("images") / "new" / "images.npz"
    image_set.write(path)
    return path


@pytest.fixture(scope="session")
def server(store: Path) -> Iterator[Running]:
    """A gateway with the protected digits."""
    with gateway(store, models="digits", threads=1) as running:
        yield running

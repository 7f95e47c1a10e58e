import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defenses.checkpoint import save_protected
from defenses.classifier import Classifier
from defenses.coophance import Inspector, InspectorConfig, Regulator, RegulatorConfig
from defenses.onnx_export import export_protected
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier
from loadtest.connections import Address
from loadtest.image_sets import ImageSet, crafted
from loadtest.serving import Running, gateway
from model_store import SERVING, Draft, FalsePositiveRate, InputSpec, Parent, Store
from service.datasets import load_dataset

Answer = Callable[[int], tuple[float, bytes, bool]]
"""What becomes of a request by its number: delay in seconds, bytes, and whether the connection is closed then."""

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
        save_protected(protected, Path(folder) / "1" / "checkpoint")
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


class Scripted(asyncio.Protocol):
    """A server's side of one connection that answers each request as a function of its number says."""

    def __init__(self, answer: Answer, numbers: Iterator[int]) -> None:
        self.answer, self.numbers = answer, numbers

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        delay, content, close = self.answer(next(self.numbers))
        asyncio.get_running_loop().call_later(delay, self._send, content, close)

    def _send(self, content, close):
        self.transport.write(content)
        if close:
            self.transport.close()


@contextmanager
def _answering(answer: Answer) -> Iterator[Address]:
    """Serve from another thread."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    numbers = iter(range(10**9))
    servers = []

    async def serve():
        servers.append(await loop.create_server(lambda: Scripted(answer, numbers), "127.0.0.1", 0))
        ready.set()

    def stop():
        servers[0].close()
        loop.call_soon(loop.stop)

    loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    ready.wait()
    try:
        yield Address("127.0.0.1", servers[0].sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(stop)
        thread.join()
        loop.close()


@pytest.fixture
def answering() -> Callable[[Answer], AbstractContextManager[Address]]:
    """Serve HTTP as a function says, from another thread, until a block ends."""
    return _answering

"""A store of small models, gateways that serve it, and images that are surely accepted or surely alerted."""

import asyncio
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import pytest_asyncio
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from typer.testing import CliRunner

from defenses.classifier import Classifier
from defenses.coophance import Fluctuation, Inspector, InspectorConfig, Regulator, RegulatorConfig
from defenses.onnx_export import export_protected, save_graph
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier
from model_store import SERVING, Draft, FalsePositiveRate, InputSpec, Manifest, Store
from service.app import create_app
from service.cli import app as cli
from service.datasets import load_dataset
from service.demo.build import train
from service.p_values import CALIBRATION, write_scores
from service.register import Declaration, register
from service.settings import Settings

SHAPE = (1, 16, 16)
LABELS = ("zero", "one", "two", "three")
THIRDS = ("left", "middle", "right")


def images(low: int, high: int, count: int, seed: int = 0) -> np.ndarray:
    """Images uint8 (N, 1, 16, 16), each different, of pixels from ``low`` to below ``high``."""
    random = np.random.default_rng(seed)
    coarse = random.integers(low, high, (count, 1, 4, 4), np.uint8)
    return coarse.repeat(4, 2).repeat(4, 3)


def encoded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """One image (1, H, W) uint8 as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[0]).save(buffer, form, **options)
    return buffer.getvalue()


def infer_request(
    pixels: np.ndarray, outputs: Sequence[str] = (), *, binary: bool = True, parameters: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content and headers of an infer request for a tensor (N, C, H, W), uint8 or float32."""
    datatype = {"uint8": "UINT8", "float32": "FP32"}[pixels.dtype.name]
    tensor: dict[str, Any] = {"name": "image", "datatype": datatype, "shape": list(pixels.shape)}
    message: dict[str, Any] = {"inputs": [tensor], "outputs": [{"name": name} for name in outputs]}
    if parameters:
        message["parameters"] = parameters
    if not binary:
        tensor["data"] = pixels.ravel().tolist()
        return {"content": json.dumps(message).encode()}
    data = np.ascontiguousarray(pixels).tobytes()
    tensor["parameters"] = {"binary_data_size": len(data)}
    header = json.dumps(message).encode()
    return {"content": header + data, "headers": {"Inference-Header-Content-Length": str(len(header))}}


def read_outputs(answer: httpx.Response) -> dict[str, Any]:
    """The outputs of an infer response by name, binary ones read as the protocol says."""
    assert answer.status_code == 200, answer.text
    size = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    tail, found = answer.content[size:], {}
    for output in json.loads(answer.content[:size])["outputs"]:
        length = output.get("parameters", {}).get("binary_data_size", 0)
        data, tail = tail[:length], tail[length:]
        if output["datatype"] == "BYTES":
            found[output["name"]] = _texts(data) if length else output["data"]
        else:
            dtype = {"FP32": np.float32, "INT64": np.int64}[output["datatype"]]
            values = np.frombuffer(data, dtype) if length else np.array(output["data"], dtype)
            found[output["name"]] = values.reshape(output["shape"])
    assert tail == b"", "bytes are left that no output accounts for"
    return found


def _texts(data: bytes) -> list[str]:
    texts = []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        texts.append(data[4:end].decode())
        data = data[end:]
    return texts


@dataclass(frozen=True)
class Visitor:
    """A client of a gateway."""

    http: httpx.AsyncClient
    request_of = staticmethod(infer_request)
    read = staticmethod(read_outputs)

    async def until_ready(self) -> None:
        """Return once the models are loaded."""
        for _ in range(6000):
            if (await self.http.get("/v2/health/ready")).status_code == 200:
                return
            await asyncio.sleep(0.005)
        raise AssertionError("The gateway did not become ready.")

    async def infer(self, model: str, pixels: np.ndarray, outputs: Sequence[str] = (), **how: Any) -> httpx.Response:
        """The answer of the tensor protocol."""
        return await self.http.post(f"/v2/models/{model}/infer", **infer_request(pixels, outputs, **how))

    async def outputs(self, model: str, pixels: np.ndarray, outputs: Sequence[str] = ()) -> dict[str, Any]:
        """The outputs that the tensor protocol answers."""
        return read_outputs(await self.infer(model, pixels, outputs))

    async def predict(self, model: str, *files: bytes, **how: Any) -> httpx.Response:
        """The answer for one file as the body, or for several as a form."""
        form = (
            {"content": files[0]}
            if len(files) == 1
            else {"files": [("image", (f"{n}", file)) for n, file in enumerate(files)]}
        )
        return await self.http.post(f"/v1/models/{model}/predict", **form, **how)

    async def predictions(self, model: str, *files: bytes) -> list[dict[str, Any]]:
        """The predictions for files, one each."""
        answer = await self.predict(model, *files)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["predictions"]
        assert len(found) == len(files)
        return found

    async def alerts(self, count: int, **filters: Any) -> list[dict[str, Any]]:
        """The alerts on record that match, newest first, as many as expected, once none waits to be written."""
        for _ in range(1000):
            if await self.metric("alert_queue_depth") == 0:
                break
            await asyncio.sleep(0.005)
        answer = await self.http.get("/v1/alerts", params={"limit": 1000, **filters})
        assert answer.status_code == 200, answer.text
        rows: list[dict[str, Any]] = answer.json()["alerts"]
        assert len(rows) == count
        return rows

    async def recorded(self, alert_id: str) -> dict[str, Any]:
        """The alert with this id, once it is on record."""
        for _ in range(1000):
            answer = await self.http.get(f"/v1/alerts/{alert_id}")
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.005)
        assert answer.status_code == 200, answer.text
        row: dict[str, Any] = answer.json()
        return row

    async def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, 0 where it is not there."""
        text = (await self.http.get("/metrics")).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"portcullis_{name}" and sample.labels == labels:
                    return sample.value
        return 0.0


def network() -> nn.Sequential:
    """A random classifier whose first feature map is the image's brightness."""
    layers = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 64, len(LABELS))),
    )
    layers[0].weight.data[0], layers[0].bias.data[0] = 1 / 9, 0
    layers[5].weight.data *= 60
    return layers.eval()


@pytest.fixture(scope="session")
def protected() -> ProtectedClassifier:
    """A random classifier behind an untrained Regulator and an Inspector that alerts of bright images."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layers = network()
        config = RegulatorConfig(SHAPE, channels=(4, 4, 4, 4), skip_channels=(2, 2, 2, 2), batch_norm=False)
        regulator = Regulator(config).eval()
        sample = torch.from_numpy(np.concatenate([images(0, 76, 64), images(180, 256, 64)])).float() / 255
        quiet = torch.zeros(())
        # An untrained Regulator answers almost the same grey for every image: spread it over [0, 1].
        grey = regulator.reconstruct(sample, quiet)
        gain = 1.5 / grey.std()
        regulator.to_image.weight.data *= gain
        regulator.to_image.bias.data = (regulator.to_image.bias - grey.mean()) * gain
        for confusion in regulator.confusion_layers:
            confusion.imitate(Fluctuation(torch.zeros_like(confusion.mu), torch.full_like(confusion.sigma, 0.2)))
        # Every class is the answer to some image of every kind: the head does not see what tells the kinds apart.
        seen = torch.cat([layers[:5](sample), layers[:5](regulator(sample, quiet))])
        kinds = torch.stack([features.mean(0) for features in seen.split(64)])
        basis = torch.linalg.qr((kinds[1:] - kinds[0]).T).Q
        layers[5].weight.data -= layers[5].weight @ basis @ basis.T
        layers[5].bias.data -= layers[5](seen).mean(0)
    classifier = Classifier(canonicalise(export_classifier(layers, SHAPE))).eval()
    layer = next(layer for layer in classifier.layers() if layer.operator == "Relu")
    inspector = Inspector(InspectorConfig(layer.name, layer.shape, len(LABELS))).eval()
    brightness = torch.zeros(len(LABELS), *layer.shape)
    brightness[:, 0] = 10 / 64
    inspector.weight.data, inspector.bias.data = brightness.flatten(1), torch.full((len(LABELS),), -5.0)
    return ProtectedClassifier(classifier, regulator, inspector, 0.0).eval()


def handmade_graph(work: int = 0) -> onnx.ModelProto:
    """A graph with the outputs of a protected one, that two pixels of an image can make fail.

    The bare answer is the brightest third of the image, the protected one the darkest; images brighter than 0.5 are
    alerted. The first pixel at 1 makes the run itself fail, the second above 0.5 gives logits that are not finite; the
    bare answer reads neither. ``work`` products of large matrices, the same for any batch, make it slow.
    """
    products = [f"product_{n + 1} = MatMul(product_{n}, matrix)" for n in range(work)]
    steps = f"""
        brightness = ReduceMean <keepdims = 0> (image, axes)
        score = Sub(brightness, half)
        alert = Greater(score, nothing)
        {_thirds("image", "undefended_logits")}
        purified = Sub(one, image)
        {_thirds("purified", "darkness")}
        flat = Flatten(image)
        first = Slice(flat, place_0, place_1, place_1)
        second = Slice(flat, place_1, place_2, place_1)
        first_doubled = Mul(first, two)
        place = Cast <to = 7> (first_doubled)
        fails_at_one = Gather(two_zeros, place)
        second_doubled = Mul(second, two)
        left = Sub(one, second_doubled)
        logarithm = Log(left)
        finite_below_half = Mul(logarithm, nothing)
        trouble = Add(fails_at_one, finite_below_half)
        seed = ReduceMean <keepdims = 0> (image)
        size = Constant <value_ints = [1024, 1024]> ()
        matrix = ConstantOfShape <value = float[1] {{0.0009765625}}> (size)
        product_0 = Add(matrix, seed)
        {" ".join(products)}
        end = ReduceMean <keepdims = 0> (product_{work})
        worked = Mul(end, nothing)
        troubled = Add(darkness, trouble)
        logits = Add(troubled, worked)
    """
    model = onnx.parser.parse_model(HANDMADE.replace("STEPS", steps))
    onnx.checker.check_model(model)
    return model


HANDMADE = """
<ir_version: 10, opset_import: ["": 18]>
handmade (float[N, 1, 16, 16] image) => (
    float[N, 3] logits, float[N] score, bool[N] alert, float[N, 3] undefended_logits, float[N, 1, 16, 16] purified
) <
    float half = {0.5}, float one = {1}, float two = {2}, float nothing = {0}, float[2] two_zeros = {0, 0},
    int64[3] axes = {1, 2, 3}, int64[1] place_0 = {0}, int64[1] place_1 = {1}, int64[1] place_2 = {2},
    int64[3] widths = {5, 6, 5}
> { STEPS }
"""


def _thirds(image: str, brightness: str) -> str:
    parts = [f"{brightness}_{place}" for place in ("left", "middle", "right")]
    means = [f"{part}_mean = ReduceMean <keepdims = 0> ({part}, axes)" for part in parts]
    columns = [f"{part}_column = Unsqueeze({part}_mean, place_1)" for part in parts]
    joined = f"{brightness} = Concat <axis = 1> ({', '.join(f'{part}_column' for part in parts)})"
    return " ".join([f"{', '.join(parts)} = Split <axis = 3> ({image}, widths)", *means, *columns, joined])


def publish(
    root: Path,
    name: str,
    graph: onnx.ModelProto,
    *,
    kind: str = "coophance",
    labels: Sequence[str] = LABELS,
    threshold: float | Sequence[float] = 0.0,
    calibration: np.ndarray | None = None,
) -> Manifest:
    """Publish a graph as the next version of a model of the store at ``root`` and let it serve.

    ``calibration`` are the scores of its calibration images, kept with the version where there are any.
    """
    defended: dict[str, Any] = {
        "threshold": threshold,
        "false_positive_rate": FalsePositiveRate(budget=0.05, calibrated_on=100, realised=0.04, evaluated_on=100),
    }
    draft = Draft(
        kind=kind,
        input=InputSpec(shape=SHAPE, mode="L"),
        labels=tuple(labels),
        metrics={"clean_accuracy": 0.9},
        **(defended if kind == "coophance" else {}),
    )
    store = Store.open(root / "models")
    with tempfile.TemporaryDirectory() as folder:
        save_graph(graph, Path(folder) / "model.onnx")
        if calibration is not None:
            write_scores(calibration, Path(folder) / CALIBRATION)
        manifest = store.publish(name, draft, Path(folder))
    store.set_alias(name, SERVING, manifest.version)
    return manifest


@pytest.fixture(scope="session")
def protected_graph(protected: ProtectedClassifier) -> onnx.ModelProto:
    """The same as one graph."""
    return export_protected(protected)


@pytest.fixture(scope="session")
def published() -> Callable[..., Manifest]:
    """Publish a graph and let it serve: ``published(root, "digits", graph, threshold=0.5)``."""
    return publish


@pytest.fixture(scope="session")
def fragile_graph() -> onnx.ModelProto:
    """The handmade graph, which two pixels of an image can make fail; the score is the brightness less 0.5."""
    return handmade_graph()


@pytest.fixture(scope="session")
def calibration_scores(protected: ProtectedClassifier) -> np.ndarray:
    """The scores (99,) that the protected classifier gives accepted images, its noise off."""
    x = torch.from_numpy(images(0, 76, 99, seed=99)).float() / 255
    with torch.no_grad():
        return protected(x, torch.zeros(())).scores.numpy()


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory, protected, protected_graph, calibration_scores, fragile_graph
) -> Path:
    """The models ``digits`` (version 1 bare, 2 protected and serving), ``bare``, ``fragile`` and ``slow``.

    Version 2 of ``digits`` alone holds the scores of calibration images.
    """
    root = tmp_path_factory.mktemp("gateway") / "store"
    publish(root, "digits", protected.classifier.model, kind="classifier")
    publish(root, "digits", protected_graph, calibration=calibration_scores)
    publish(root, "bare", protected.classifier.model, kind="classifier")
    publish(root, "fragile", fragile_graph, labels=THIRDS)
    publish(root, "slow", handmade_graph(work=16), labels=THIRDS)
    return root


@asynccontextmanager
async def running(
    folder: Path, *, client: str = "127.0.0.1", ready: bool = True, **given: Any
) -> AsyncIterator[Visitor]:
    """A gateway with its lifespan run, and a visitor of it from the address ``client``."""
    settings = {"database": f"sqlite+aiosqlite:///{folder / 'alerts.db'}", "inputs": folder / "inputs", "threads": 1}
    app = create_app(Settings(**{**settings, "noise": False, **given}))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(client, 50000))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=30) as http:
            visitor = Visitor(http)
            if ready:
                await visitor.until_ready()
            yield visitor


@pytest.fixture
def gateway(store: Path, tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Visitor]]:
    """Open a gateway with some settings: ``async with gateway(mode="enforce") as visitor``."""

    def opened(**given: Any) -> AbstractAsyncContextManager[Visitor]:
        return running(tmp_path, **{"store": store, "models": ("digits",), **given})

    return opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def visitor(store: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Visitor]:
    """A visitor of one gateway that a module's tests share: flag mode, all disclosed, both answers computed."""
    folder = tmp_path_factory.mktemp("shared")
    models = ("digits", "bare", "fragile")
    async with running(folder, store=store, models=models, undefended_answer=True, max_images=8) as visitor:
        yield visitor


@pytest.fixture(scope="session")
def dark() -> Callable[..., np.ndarray]:
    """Make images that are surely accepted: ``dark(count, seed)``, uint8 (N, 1, 16, 16), each different."""
    return partial(images, 0, 76)


@pytest.fixture(scope="session")
def bright() -> Callable[..., np.ndarray]:
    """Make images that are surely alerted: ``bright(count, seed)``, uint8 (N, 1, 16, 16), each different."""
    return partial(images, 180, 256)


@pytest.fixture(scope="session")
def file_of() -> Callable[..., bytes]:
    """Write one image (1, H, W) uint8 as a file: ``file_of(pixels, "JPEG")``, PNG unless named."""
    return encoded


@pytest.fixture(scope="session")
def digits_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a small classifier of digits, trained for real; it is only read."""
    root = tmp_path_factory.mktemp("digits") / "store"
    spec = InputSpec(shape=(1, 32, 32), mode="L", resize="bilinear")
    dataset = load_dataset(["digits"], spec, labels=None, split_seed=0)
    network = train(dataset.fit, lambda stage, done, total: None)
    declared = Declaration(shape=spec.shape, resize="bilinear", labels=dataset.labels)
    register(Store.open(root / "models"), "digits", network, declared, command="test")
    return root


NIP = (
    "--data",
    "digits",
    "--preset",
    "paper",
    "--precision",
    "float16",
    "--candidates",
    "150",
    "--template",
    "class",
    "--search",
    "class",
    "--accuracy-loss",
    "0.02",
)
NIP += ("--amplitudes", "0.005,0.02,0.05,0.5", "--test-examples", "40", "--attack", "fgsm:epsilon=24/255")
NIP += ("--attack", "deepfool:steps=8")


@pytest.fixture(scope="session")
def nip_options() -> tuple[str, ...]:
    """How ``nip_store`` was fitted: what ``portcullis fit nip digits`` was given but for the store."""
    return NIP


@pytest.fixture(scope="session")
def nip_store(digits_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with NIP fitted by the command line, in one thread, and promoted: version 2; it is only read."""
    root = tmp_path_factory.mktemp("nip") / "store"
    shutil.copytree(digits_store, root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = CliRunner().invoke(cli, ["fit", "nip", "digits", *NIP, "--promote", "--store", str(root)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return root


@dataclass(frozen=True)
class Server:
    """A gateway in a process of its own."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def served(folder: Path, store: Path, **given: Any) -> Iterator[Server]:
    """Run ``portcullis serve`` on a free port until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "store": store,
        "port": port,
        "database": f"sqlite+aiosqlite:///{folder / 'alerts.db'}",
        "inputs": folder / "inputs",
        "threads": 1,
        "noise": "false",
        **given,
    }
    environment = os.environ | {f"PORTCULLIS_{name.upper()}": str(value) for name, value in settings.items()}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from service.cli import app; app()", "serve"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                if httpx.get(f"{url}/v2/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        yield Server(url, process, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Server]:
    """One real server for the tests that only ask it things."""
    with served(
        tmp_path_factory.mktemp("server"), store, models="digits,bare,fragile", undefended_answer="true"
    ) as one:
        yield one


@pytest.fixture
def serve(tmp_path: Path, store: Path) -> Callable[..., AbstractContextManager[Server]]:
    """Run a real server with some settings: ``with serve(mode="enforce") as server``."""
    return lambda store=store, **given: served(tmp_path, store, **given)

"""The gateway started as its image starts it: same command, environment and check, without the extras' packages."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_store import SERVING, Draft, InputSpec, Store

FITTING = ("torch", "torchvision", "foolbox", "art", "pyautoattack", "sklearn", "safetensors", "onnxscript")
START_SECONDS = 60


@dataclass(frozen=True)
class Running:
    """A gateway's process, the program it runs, its environment and where it listens."""

    process: subprocess.Popen[str]
    program: str
    environment: dict[str, str]
    url: str


def publish_classifier(store: Path, folder: Path) -> None:
    """Publish a classifier of 2x2 grey images, light or dark, as version 1 of `shades`."""
    weights = np.array([[1, -1]] * 4, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
        ],
        "shades",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([-2, 2], np.float32), "bias"),
        ],
    )
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx"
    )
    draft = Draft(kind="classifier", input=InputSpec(shape=(1, 2, 2), mode="L"), labels=("light", "dark"))
    models = Store.open(store / "models")
    models.set_alias("shades", SERVING, models.publish("shades", draft, folder).version)


def contents(folder: Path) -> set[Path]:
    """Every file and folder below."""
    return set(folder.rglob("*"))


def check(command: list[str], root: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the image's health check as Docker does, with the checked-out script for the one copied into the image."""
    script = root / "docker" / Path(command[1]).name
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def started(image: dict[str, Any], root: Path, place: Path) -> Iterator[Running]:
    """Run the image's command in its environment, with folders below `place` for those of the container."""
    for folder in ("data", "home", "tmp", "hidden"):
        (place / folder).mkdir()
    publish_classifier(place / "store", place / "payload")
    missing = "".join(f"sys.modules[{name!r}] = None\n" for name in FITTING)
    (place / "hidden" / "sitecustomize.py").write_text(f"import sys\n{missing}")
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PORTCULLIS_")},
        **{name: value.replace("/data", f"{place}/data") for name, value in image["ENV"].items()},
        "PORTCULLIS_STORE": str(place / "store"),
        "PORTCULLIS_PORT": str(port),
        "PYTHONPATH": str(place / "hidden"),
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
    }
    (entrypoint,) = image["ENTRYPOINT"]
    program = shutil.which(entrypoint, path=Path(sys.executable).parent)
    assert program, "the package is not installed beside this Python"
    process = subprocess.Popen(
        [program, *image["CMD"]], env=environment, cwd=place / "home", stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while check(image["HEALTHCHECK"], root, environment).returncode:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the gateway did not become healthy"
        yield Running(process, program, environment, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def running(image, root, tmp_path_factory) -> Iterator[Running]:
    with started(image("serve"), root, tmp_path_factory.mktemp("container")) as gateway:
        yield gateway


def test_the_health_checks_script_is_where_the_image_runs_it(stages, image, root):
    program, path = image("serve")["HEALTHCHECK"]
    assert program == "python"
    assert ("COPY", f"--chmod=0644 docker/{Path(path).name} {path}") in stages["serve"]
    assert (root / "docker" / Path(path).name).is_file()


def test_a_gateway_without_the_packages_that_fit_answers_about_an_image(running):
    pixels = np.array([[[[0, 0], [0, 0]]], [[[255, 255], [255, 255]]]], np.uint8)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [2, 1, 2, 2], "data": pixels.ravel().tolist()}
    answer = httpx.post(f"{running.url}/v2/models/shades/infer", json={"inputs": [tensor]})
    assert answer.status_code == 200
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert outputs["label"] == ["dark", "light"]


def test_what_fits_is_really_missing_there(running):
    fit = [running.program, "fit", "coophance", "shades", "--data", "digits"]
    done = subprocess.run(fit, env=running.environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "pip install 'portcullis[fit]'" in done.stderr


def test_what_probes_and_prometheus_ask_for_is_answered(running, gateway_manifests):
    (deployment,) = gateway_manifests["Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    for path in {*probes, deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]}:
        assert httpx.get(running.url + path).status_code == 200, path


def test_the_health_check_fails_where_nothing_listens(image, root, running):
    command = image("serve")["HEALTHCHECK"]
    done = check(command, root, {**running.environment, "PORTCULLIS_PORT": str(free_port())})
    assert done.returncode == 1
    assert "gave no answer" in done.stderr


def test_the_health_check_fails_while_the_gateway_is_not_ready(image, root, running):
    asked = []

    class NotReady(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), NotReady) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        environment = {**running.environment, "PORTCULLIS_PORT": str(server.server_port)}
        done = check(image("serve")["HEALTHCHECK"], root, environment)
    assert done.returncode == 1
    assert "answered 503" in done.stderr
    assert asked == ["/v2/health/ready"]


def test_sigterm_ends_a_gateway_that_has_written_to_data_alone(image, root, tmp_path):
    with started(image("serve"), root, tmp_path) as gateway:
        store = contents(tmp_path / "store")
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(timeout=20) == 0, gateway.process.stderr.read()
    assert contents(tmp_path / "store") == store
    assert not contents(tmp_path / "home")
    assert not contents(tmp_path / "tmp")
    assert tmp_path / "data" / "alerts.db" in contents(tmp_path / "data")

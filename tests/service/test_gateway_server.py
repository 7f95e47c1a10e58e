"""The gateway as it runs: a process of its own, spoken to by programs that know nothing of it."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

LABELS = ("zero", "one", "two", "three")


@pytest.fixture
def triton_client(server):
    """The protocol's ordinary client."""
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


def test_the_protocols_own_client_reads_what_the_server_is(triton_client):
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert triton_client.is_model_ready("digits")
    assert triton_client.is_model_ready("digits", "2")
    assert not triton_client.is_model_ready("digits", "7")
    assert not triton_client.is_model_ready("letters")
    assert triton_client.get_server_metadata()["name"] == "portcullis"
    metadata = triton_client.get_model_metadata("digits")
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 16, 16]}]
    index = triton_client.get_model_repository_index()
    assert [(entry["name"], entry["state"]) for entry in index] == [
        ("bare", "READY"),
        ("digits", "READY"),
        ("fragile", "READY"),
    ]


@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_the_protocols_own_client_infers(triton_client, server, dark, bright, file_of, datatype, binary_in, binary_out):
    pixels = np.concatenate([dark(2), bright(1)])
    tensor = pixels if datatype == "UINT8" else pixels.astype(np.float32) / np.float32(255)
    image = triton.InferInput("image", list(tensor.shape), datatype)
    image.set_data_from_numpy(tensor, binary_data=binary_in)
    names = ["label", "class_index", "verdict", "logits", "probabilities", "score", "p_value", "purified"]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    result = triton_client.infer("digits", [image], outputs=outputs, request_id="own-7")
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("own-7", "digits", "2")
    assert response["parameters"]["alert_ids"].startswith(",,")
    files = [("image", file_of(one)) for one in pixels]
    plain = httpx.post(f"{server.url}/v1/models/digits/predict", files=files).json()["predictions"]

    def texts(name: str) -> list[str]:
        return [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy(name)]

    assert texts("label") == [prediction["label"] for prediction in plain]
    assert texts("verdict") == ["accepted", "accepted", "alert"]
    assert result.as_numpy("class_index").tolist() == [prediction["class_index"] for prediction in plain]
    np.testing.assert_allclose(
        result.as_numpy("probabilities"), [prediction["probabilities"] for prediction in plain], atol=1e-5
    )
    np.testing.assert_allclose(result.as_numpy("score"), [prediction["score"] for prediction in plain], atol=1e-4)
    p_values = result.as_numpy("p_value")
    assert p_values.dtype == np.float32
    np.testing.assert_allclose(p_values, [prediction["p_value"] for prediction in plain], rtol=1e-6)
    assert p_values[2] == np.float32(0.01) < p_values[:2].min()
    assert result.as_numpy("logits").shape == (3, 4)
    assert result.as_numpy("purified").shape == (3, 1, 16, 16)


def test_the_protocols_own_client_is_told_what_it_did_wrong(triton_client, dark):
    image = triton.InferInput("image", [1, 1, 16, 16], "INT64")
    image.set_data_from_numpy(dark(1).astype(np.int64))
    with pytest.raises(InferenceServerException, match="must be FP32 or UINT8, not INT64") as caught:
        triton_client.infer("digits", [image])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="No model letters is in service"):
        triton_client.get_model_metadata("letters")


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("DATABASE", "nowhere", "The alert log cannot live in the database given: its URL cannot be read."),
        ("DATABASE", "sqlite:///alerts.db", "an async driver is needed, such as sqlite+aiosqlite"),
        ("DEVICE", "cuda", "Asked to run on cuda, but ONNX Runtime offers only CPUExecutionProvider."),
    ],
)
def test_a_start_that_fails_is_told_in_a_sentence(setting, value, told, tmp_path):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("There is a GPU here.")
    command = [sys.executable, "-c", "from service.cli import app; app()", "serve", "--port", "0"]
    environment = os.environ | {
        "PORTCULLIS_DATABASE": f"sqlite+aiosqlite:///{tmp_path / 'alerts.db'}",
        f"PORTCULLIS_{setting}": value,
    }
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "portcullis: " in done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def curl(*arguments: str | Path) -> dict[str, object]:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed.")
    done = subprocess.run(
        [program, "-sS", *map(str, arguments)], capture_output=True, text=True, timeout=30, check=True
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_curl_posts_a_png_and_gets_a_verdict(server, tmp_path, dark, bright, file_of):
    for name, pixels, verdict in (("dark", dark(1)[0], "accepted"), ("bright", bright(1)[0], "alert")):
        path = tmp_path / f"{name}.png"
        path.write_bytes(file_of(pixels))
        url = f"{server.url}/v1/models/digits/predict"
        (as_body,) = curl("-H", "Content-Type: image/png", "--data-binary", f"@{path}", url)["predictions"]
        (undeclared,) = curl("--data-binary", f"@{path}", url)["predictions"]
        first, second = curl("-F", f"image=@{path}", "-F", f"image=@{path}", url)["predictions"]
        for prediction in (as_body, undeclared, first, second):
            assert prediction["verdict"] == verdict
            assert prediction["label"] in LABELS
    assert "error" in curl("-F", "image=hello", f"{server.url}/v1/models/digits/predict")


def test_a_bomb_costs_neither_time_nor_memory(server):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def peak_megabytes() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(30_001 * 1000), 1) * 10
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    httpx.post(f"{server.url}/v1/models/digits/predict", content=bomb[:1000])
    before, start = peak_megabytes(), time.perf_counter()
    answer = httpx.post(f"{server.url}/v1/models/digits/predict", content=bomb)
    assert time.perf_counter() - start < 2
    assert answer.status_code == 400
    assert "at most 25000000 pixels, but the PNG has 10000 x 10000" in answer.json()["error"]
    assert peak_megabytes() - before < 30, "300 MB of pixels were not to be decoded"


def test_a_body_over_the_limit_is_refused_over_the_wire_and_the_next_one_served(server, dark, file_of):
    limit = 32 * 2**20
    with httpx.Client(base_url=server.url, timeout=20) as client:
        declared = client.post("/v2/models/digits/infer", content=bytes(limit + 1))
        chunked = client.post("/v2/models/digits/infer", content=iter([bytes(2**20)] * 40))
        for answer in (declared, chunked):
            assert answer.status_code == 413
            assert answer.json()["error"].startswith(f"Expected a body of at most {limit} bytes, got ")
        good = client.post("/v1/models/digits/predict", content=file_of(dark(1)[0]))
        assert good.status_code == 200


def test_a_client_that_breaks_off_leaves_the_gateway_well(server, dark, file_of):
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (
        b"POST /v1/models/digits/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nonly a part",
        b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"GARBAGE\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(sent)
    answer = httpx.post(f"{server.url}/v1/models/digits/predict", content=file_of(dark(1)[0]))
    assert answer.status_code == 200


def outcome(url: str, name: str, **labels: str) -> float:
    """The value of a metric, 0 where it is not there."""
    wanted = (
        f"portcullis_{name}{{{','.join(f'{key}={chr(34)}{value}{chr(34)}' for key, value in sorted(labels.items()))}}} "
    )
    found = [line for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines() if line.startswith(wanted)]
    return float(found[0].removeprefix(wanted)) if found else 0.0


def test_a_client_that_leaves_or_runs_out_of_time_leaves_the_queue(serve, dark, file_of):
    file = file_of(dark(1)[0])
    with serve(models="slow,digits", max_batch=1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        head = f"POST /v1/models/slow/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(file)}\r\n\r\n"
        connections = [socket.create_connection((host, int(port))) for _ in range(150)]
        for connection in connections:
            connection.sendall(head.encode() + file)
        start = time.monotonic()
        while outcome(server.url, "queue_depth", model="slow") < 100:
            assert time.monotonic() - start < 5
            time.sleep(0.01)
        image = triton.InferInput("image", [1, 1, 16, 16], "UINT8")
        image.set_data_from_numpy(dark(1))
        with triton.InferenceServerClient(f"{host}:{port}") as client:
            with pytest.raises(InferenceServerException, match=r"The request was given up after 0.03 s.") as caught:
                client.infer("slow", [image], timeout=30_000)
            assert caught.value.status() == "504"
            assert client.infer("digits", [image], timeout=30_000_000).as_numpy("verdict") == [b"accepted"]
        computed = outcome(server.url, "batch_size_sum", model="slow")
        for connection in connections:
            connection.close()
        start = time.monotonic()
        while outcome(server.url, "queue_depth", model="slow"):
            assert time.monotonic() - start < 5
            time.sleep(0.02)
        gone = outcome(server.url, "requests_total", model="slow", version="1", outcome="ClientDisconnect")
        assert gone > 20
        answered = outcome(server.url, "requests_total", model="slow", version="1", outcome="ok")
        assert gone + answered == 150
        assert computed < 150
        assert httpx.post(f"{server.url}/v1/models/slow/predict", content=file).status_code == 200
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_answers_all_that_was_accepted_and_records_every_alert(serve, dark, bright, tmp_path, stop):
    with serve(models="slow", max_batch=2) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

            async def ask(number: int) -> httpx.Response:
                pixels = (bright if number % 2 else dark)(1, seed=number)
                pixels[:, 0, 0, :2] = 0
                tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 16, 16], "data": pixels.tolist()}
                return await client.post("/v2/models/slow/infer", json={"inputs": [tensor]})

            asked = [asyncio.create_task(ask(number)) for number in range(24)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert sum(not task.done() for task in asked) >= 12, "most are still in flight"
            server.process.send_signal(stop)
            answers = await asyncio.gather(*asked)
        assert await asyncio.to_thread(server.process.wait, 20) == 0
    assert [answer.status_code for answer in answers] == [200] * 24
    told = [answer.json().get("parameters", {}).get("alert_ids") for answer in answers]
    assert [bool(alert_id) for alert_id in told] == [number % 2 == 1 for number in range(24)]
    with sqlite3.connect(tmp_path / "alerts.db") as connection:
        rows = {row for (row,) in connection.execute("SELECT id FROM alerts")}
    connection.close()
    assert rows == {alert_id for alert_id in told if alert_id}
    assert len(list((tmp_path / "inputs").rglob("*.npy"))) == 12
    assert "Traceback" not in server.log.read_text()


def test_a_stop_that_loses_alerts_says_which_and_fails(serve, bright, file_of, tmp_path):
    with serve(models="digits", shutdown_seconds=1) as server:
        blocker = sqlite3.connect(tmp_path / "alerts.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        answer = httpx.post(f"{server.url}/v1/models/digits/predict", content=file_of(bright(1)[0]))
        server.process.terminate()
        assert server.process.wait(20) == 1
        blocker.close()
    assert f"1 alerts not written: {answer.json()['predictions'][0]['alert_id']}" in server.log.read_text()

"""Check under load that everyone gets his own answer and that a stop loses nothing.

Starts a gateway on the demonstration's store (run `make demo ARGS=--once` first) with the noise off, in three acts:
every image alone; many clients at once, each with an image of its own; then SIGTERM while requests are in flight.
Prints JSON and exits 1 when an answer differs, a request is lost, or alerts and rows do not match.
"""

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import torch
import typer
from PIL import Image

from defenses.attacks import attack, craft
from defenses.classifier import Classifier
from loadtest.serving import plain_environment
from model_store import Store
from service.alerts import AlertFilter, AlertLog
from service.datasets import load_dataset
from service.demo.build import ATTACKS, NAME, SEED
from service.fit import find_classifier
from service.repository import MODELS
from service.served import GRAPH

TOLERANCE = 1e-4
IN_FLIGHT_AT_LEAST = 50


def main(
    clients: Annotated[int, typer.Option(help="Clients at once, each with an image of its own.", min=1)] = 100,
    requests: Annotated[int, typer.Option(help="Requests of each client.", min=1)] = 20,
    store: Annotated[Path, typer.Option(help="Folder of the demonstration's store.")] = Path("var/demo/store"),
) -> None:
    """Run the three acts and print what happened."""
    images = different_images(store, clients)
    with tempfile.TemporaryDirectory() as folder, gateway(store, Path(folder)) as (process, url):
        result = asyncio.run(acts(process, url, images, requests))
        rows = asyncio.run(rows_in(Path(folder) / "alerts.db"))
    result["alert_rows"] = rows
    result["passed"] = (
        result["answers_that_differ"] == result["lost"] == result["accepted_but_not_answered"] == 0
        and result["in_flight_at_sigterm"] >= IN_FLIGHT_AT_LEAST
        and result["alert_verdicts"] == rows
        and result["exit_status"] == 0
    )
    typer.echo(json.dumps(result, indent=2))
    raise typer.Exit(0 if result["passed"] else 1)


def different_images(store: Path, count: int) -> list[bytes]:
    """Return clean and adversarial digits in turns, no two alike, as PNG."""
    fetched = find_classifier(Store.open(store / MODELS), NAME, None)
    test = load_dataset(["digits"], fetched.manifest.input, labels=fetched.manifest.labels, split_seed=SEED).test
    classifier = Classifier.load(fetched.folder / GRAPH).eval()
    half = (count + 1) // 2
    pixels, targets = torch.from_numpy(test.images[:count]), torch.from_numpy(test.targets[:count])
    crafted = craft(
        attack(ATTACKS[0]),
        classifier,
        pixels,
        targets,
        limit=half,
        device=torch.device("cpu"),
        seed=SEED,
        progress=lambda done, total: None,
    )
    adversarial = crafted.rounded.numpy()
    mixed = np.concatenate([test.images[:half], adversarial])[:count]
    return [as_png(image[0]) for image in mixed]


def as_png(pixels: np.ndarray) -> bytes:
    """Return grey pixels (H, W) as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def gateway(store: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a gateway with the noise off; yield its process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **plain_environment(),
        "PORTCULLIS_STORE": str(store),
        "PORTCULLIS_PORT": str(port),
        "PORTCULLIS_NOISE": "false",
        "PORTCULLIS_DATABASE": f"sqlite+aiosqlite:///{folder / 'alerts.db'}",
        "PORTCULLIS_INPUTS": str(folder / "inputs"),
    }
    process = subprocess.Popen([sys.executable, "-c", "from service.cli import app; app()", "serve"], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url)
        yield process, url
    finally:
        process.kill()
        process.wait()


def wait_until_ready(url: str) -> None:
    """Wait until the gateway is ready, at most a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/v2/health/ready").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError("The gateway was not ready within a minute.")


async def acts(process: subprocess.Popen[bytes], url: str, images: list[bytes], requests: int) -> dict[str, Any]:
    """Play the three acts and count."""
    path = f"{url}/v1/models/{NAME}/predict"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:

        async def ask(image: bytes) -> dict[str, Any]:
            answer = await client.post(path, content=image, headers={"Content-Type": "image/png"})
            answer.raise_for_status()
            prediction: dict[str, Any] = answer.json()["predictions"][0]
            return prediction

        alone = [await ask(image) for image in images]
        start = time.perf_counter()
        together = await asyncio.gather(
            *(repeat(ask, image, requests) for image in images),
        )
        seconds = time.perf_counter() - start
        answers = [(answer, alone[who]) for who, given in enumerate(together) for answer in given]
        stopped = [asyncio.create_task(ask(image)) for image in images]
        await asyncio.sleep(0.1)
        in_flight = sum(not task.done() for task in stopped)
        process.send_signal(signal.SIGTERM)
        last = await asyncio.gather(*stopped, return_exceptions=True)
        status = await asyncio.to_thread(process.wait)
    received = [*alone, *(answer for answer, _ in answers), *(each for each in last if isinstance(each, dict))]
    return {
        "clients": len(images),
        "answers": len(answers),
        "lost": len(images) * requests - len(answers),
        "answers_that_differ": sum(not same(answer, expected) for answer, expected in answers),
        "requests_per_second": round(len(answers) / seconds, 1),
        "in_flight_at_sigterm": in_flight,
        "accepted_but_not_answered": sum(not isinstance(each, dict) for each in last),
        "exit_status": status,
        "alert_verdicts": sum(answer["verdict"] == "alert" for answer in received),
    }


async def repeat(ask: Any, image: bytes, requests: int) -> list[dict[str, Any]]:
    """Ask about one image again and again, one after the other."""
    return [await ask(image) for _ in range(requests)]


def same(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Say whether two answers agree: label and verdict exactly, probabilities to a tolerance."""
    return (
        answer["label"] == expected["label"]
        and answer["verdict"] == expected["verdict"]
        and bool(np.allclose(answer["probabilities"], expected["probabilities"], atol=TOLERANCE))
    )


async def rows_in(database: Path) -> int:
    """Count the alerts in the database."""
    log = await AlertLog.open(f"sqlite+aiosqlite:///{database}")
    try:
        return await log.count(AlertFilter())
    finally:
        await log.close()


if __name__ == "__main__":
    typer.run(main)

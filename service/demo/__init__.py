"""The demonstration: handwritten digits, protected and attacked through HTTP."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from defenses.classifier import Classifier
from model_store import SERVING, Store
from service.client import Client, pages
from service.datasets import load_dataset
from service.demo.build import ATTACKS, NAME, SEED, build_demo, is_built
from service.evaluate import Measured, Report, measure
from service.fit import find_classifier
from service.progress import progress_bars
from service.repository import MODELS
from service.served import GRAPH
from service.tables import report_table

IMAGES = 120
WORST_FALSE_POSITIVE_RATE = 0.15
LEAST_RESISTANCE = 0.70
START_SECONDS = 60
WRITE_SECONDS = 10


class GatewayDidNotStart(OSError):
    """The gateway's process ended, or did not become ready in time."""


def run(folder: Path, port: int, *, once: bool) -> int:
    """Build what is missing in ``folder``, serve it, attack it, print what happened; return the exit status.

    0 when at most 15 % of the clean images are alerted and at least 70 % of the adversarial ones resisted, else 1.
    Without ``once`` the gateway stays up until Ctrl-C.
    """
    # A stop by SIGTERM ends the gateway too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    store = folder / "store"
    if not is_built(store):
        console.print("Training a classifier of handwritten digits, then fitting CoopHANCE for it.")
        with progress_bars() as progress:
            build_demo(store, progress)
    port = _free_port(port)
    url = f"http://127.0.0.1:{port}"
    with _gateway(folder, port) as process, closing(Client(url)) as client:
        _wait_until_ready(client, process)
        start = datetime.now(UTC)
        measured = _measure(client, store)
        report = Report.of(NAME, client.served(NAME), measured)
        console.print(_samples(measured))
        console.print(report_table(report))
        verdicts = sum(int(each.told.alerted.sum()) for each in measured)
        alerts = _alerts_on_record(client, start, verdicts)
        console.print("Both attacks are among those that the defense was fitted on; others may do better.")
        console.print(f"{verdicts} images were alerted, and {alerts} alerts are on record.")
        console.print(_what_to_try(url, _example_image(folder, measured[0])), highlight=False, soft_wrap=True)
        status = _verdict(report, console) or int(alerts != verdicts)
        if not once:
            console.print("The gateway stays up. Ctrl-C stops it.")
            _wait_for_interrupt()
    return status


def _measure(client: Client, store: Path) -> list[Measured]:
    classifier = find_classifier(Store.open(store / MODELS), NAME, SERVING)
    dataset = load_dataset(["digits"], classifier.manifest.input, labels=classifier.manifest.labels, split_seed=SEED)
    with progress_bars() as progress:
        return measure(
            client,
            NAME,
            Classifier.load(classifier.folder / GRAPH).eval(),
            dataset.test,
            attacks=ATTACKS,
            limit=IMAGES,
            seed=SEED,
            progress=progress,
        )


def _alerts_on_record(client: Client, start: datetime, expected: int) -> int:
    """Count the alerts since ``start``, waiting a little for those that are still to be written."""
    since = start.isoformat().replace("+00:00", "Z")
    deadline = time.monotonic() + WRITE_SECONDS
    while True:
        count = sum(1 for _ in pages(client, f"/v1/alerts?model={NAME}&since={since}"))
        if count >= expected or time.monotonic() > deadline:
            return count
        time.sleep(0.1)


def _samples(measured: list[Measured]) -> Table:
    table = Table(title="A few of the images")
    for heading in ("input", "true", "bare answer", "protected answer", "verdict"):
        table.add_column(heading)
    for kind in measured:
        for row in range(min(4, len(kind.targets))):
            told = kind.told
            verdict = "alert" if told.alerted[row] else "accepted"
            answers = (kind.targets[row], kind.bare[row], told.class_index[row])
            table.add_row(kind.kind.partition(":")[0], *map(str, answers), verdict)
        table.add_section()
    return table


def _example_image(folder: Path, clean: Measured) -> Path:
    """Keep a clean image as a PNG that the printed curl line can send."""
    from PIL import Image

    path = folder / "digit.png"
    Image.fromarray(clean.images[0, 0]).save(path)
    return path


def _what_to_try(url: str, image: Path) -> str:
    return "\n".join(
        (
            f"Documentation  {url}/docs",
            f"Metrics        {url}/metrics",
            f"Models         curl {url}/v1/models",
            f"Alerts         curl '{url}/v1/alerts?limit=3'",
            f"One image      curl -H 'Content-Type: image/png' --data-binary @{image} {url}/v1/models/{NAME}/predict",
        )
    )


def _verdict(report: Report, console: Console) -> int:
    false_positives = report.clean.false_positive_rate
    least = min(row.resisted or 0.0 for row in report.attacks)
    if false_positives <= WORST_FALSE_POSITIVE_RATE and least >= LEAST_RESISTANCE:
        return 0
    console.print(
        f"Below what the demonstration promises: {100 * false_positives:.1f} % of the clean images alerted (at most "
        f"{100 * WORST_FALSE_POSITIVE_RATE:.0f} % expected), {100 * least:.1f} % of the worst attack resisted (at "
        f"least {100 * LEAST_RESISTANCE:.0f} % expected)."
    )
    return 1


@contextmanager
def _gateway(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "PORTCULLIS_STORE": str(folder / "store"),
        "PORTCULLIS_PORT": str(port),
        "PORTCULLIS_DATABASE": f"sqlite+aiosqlite:///{folder / 'alerts.db'}",
        "PORTCULLIS_INPUTS": str(folder / "inputs"),
        "PORTCULLIS_UNDEFENDED_ANSWER": "true",
    }
    command = [sys.executable, "-c", "from service.cli import app; app()", "serve"]
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(client: Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise GatewayDidNotStart(f"The gateway ended with status {process.returncode}; its log above says why.")
        try:
            client.get("/v2/health/ready")
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise GatewayDidNotStart(f"The gateway was not ready within {START_SECONDS} s; its log above says why.")


def _wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


def _free_port(wanted: int) -> int:
    for port in range(wanted, min(wanted + 100, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise GatewayDidNotStart(f"No port from {wanted} on is free.")

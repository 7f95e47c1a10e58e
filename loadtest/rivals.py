"""Other inference servers in the settings that are tried, each with the bare classifier; see ``loadtest.peers``."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loadtest.contenders import CORES, Contender, counted
from loadtest.environments import Environment
from loadtest.messages import base64_message, form_message, png_message, raw_message
from loadtest.serving import Running, free_port, running

PEERS = Path(__file__).parent / "peers"
MODEL = "bare"
WAIT_SECONDS = 0.001
"""How long a server that always waits for company does so."""

RUNTIME = ("onnxruntime==1.31.1", "numpy==2.4.6", "pillow==13.0.0", "httptools==0.9.0")
"""What every server has: the runtime and the decoder of the gateway, and uvicorn's faster parser."""

REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "litserve": ("litserve==0.2.19", *RUNTIME, "uvloop==0.23.0"),
    "mlserver": ("mlserver==1.7.1", *RUNTIME, "uvloop==0.21.0"),  # its workers fail to start with a newer one
    "bentoml": ("bentoml==1.4.39", *RUNTIME, "uvloop==0.23.0"),
    "ray": ("ray[serve]==2.60.0", *RUNTIME, "uvloop==0.23.0"),
}

WORKERS = ((1, 1), (1, CORES), (CORES, 1))
"""How many processes compute, and the threads of each: never more in all than cores."""

API_SERVERS = {1: (1,), CORES: (CORES, 1)}
"""How many of LitServe's processes speak HTTP by how many compute: its own choice, as many, and one for all."""


@dataclass(frozen=True)
class Computing:
    """How a server computes: the graph, the largest batch, the processes and the threads of each.

    ``wait`` is how many seconds a batch is waited for; a largest batch of 1 is none.
    """

    graph: Path
    batch: int
    workers: int
    threads: int
    wait: float = WAIT_SECONDS

    @property
    def told(self) -> str:
        """The workers and their threads."""
        return f"{counted(self.workers, 'worker')} of {counted(self.threads, 'thread')}"

    @property
    def gathering(self) -> str:
        """How batches are made."""
        if self.batch == 1:
            return "no batches"
        return f"batches within {1000 * self.wait:g} ms" if self.wait else "batches of what waits"

    def gatherings(self) -> tuple["Computing", ...]:
        """Return the same with batches waited for, with batches of what waits already, and without batches."""
        return self, replace(self, wait=0.0), replace(self, batch=1)

    def environment(self) -> dict[str, str]:
        """Return what the files of ``loadtest.peers`` read."""
        return {
            "BENCH_MODEL": str(self.graph.resolve()),
            "BENCH_BATCH": str(self.batch),
            "BENCH_WORKERS": str(self.workers),
            "BENCH_THREADS": str(self.threads),
            "BENCH_WAIT_SECONDS": str(self.wait),
        }


def environment_of(server: str, root: Path) -> Environment:
    """Return the environment of a server, to be installed under ``root``; raises ``ValueError`` for an unknown one."""
    if server not in REQUIREMENTS:
        raise ValueError(f"Expected one of {', '.join(REQUIREMENTS)}, got {server!r}.")
    return Environment(root, server, REQUIREMENTS[server])


def rivals(server: str, environment: Environment, graph: Path, batch: int) -> list[Contender]:
    """Return a server of ``REQUIREMENTS`` in every setting that is tried."""
    computing = [Computing(graph, batch, workers, threads) for workers, threads in WORKERS]
    return [contender for one in computing for contender in SETTINGS[server](environment, one)]


@contextmanager
def opened(
    environment: Environment,
    computing: Computing,
    command: Callable[[int], Sequence[str]],
    ready: str,
    *,
    files: Callable[[int], Mapping[str, object]] = lambda port: {},
    **settings: str,
) -> Iterator[Running]:
    """Run a server's command on a free port, in a folder with ``files`` as JSON; raises ``ServerNotReady``."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files(port).items():
            (Path(folder) / name).write_text(json.dumps(content))
        given = {
            "HOME": folder,
            "PYTHONPATH": str(PEERS),
            "BENCH_PORT": str(port),
            **computing.environment(),
            **{f"BENCH_{name.upper()}": value for name, value in settings.items()},
        }
        # Activated, since some of these servers start their own programs by name.
        given["PATH"] = f"{environment.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        with running(command(port), port, ready=ready, environment=given, folder=Path(folder)) as server:
            yield server


def _litserve(environment: Environment, computing: Computing) -> list[Contender]:
    command = [environment.program("python"), str(PEERS / "litserve_server.py")]
    contenders = []
    for queue, fast in {"ZeroMQ": "1", "plain": "0"}.items():
        for one in computing.gatherings():
            for count in API_SERVERS[computing.workers]:
                process = f"{one.told}, {one.gathering}, {queue} queue, {counted(count, 'API server')}"
                settings = {"fast_queue": fast, "api_servers": str(count)}
                open_ = partial(opened, environment, one, lambda port: command, "/health", **settings)
                contenders += _either("LitServe", process, "/predict", open_)
    return contenders


def _mlserver(environment: Environment, computing: Computing) -> list[Contender]:
    command = [environment.program("mlserver"), "start", "."]
    open_ = partial(
        opened,
        environment,
        computing,
        lambda port: command,
        f"/v2/models/{MODEL}/ready",
        files=partial(_mlserver_files, computing),
    )
    protocol = partial(base64_message, path=f"/v2/models/{MODEL}/infer")
    raw = partial(raw_message, path="/classify_raw")
    return [
        Contender("MLServer", computing.told, "PNG, no batches", partial(png_message, path="/classify"), open_),
        Contender("MLServer", computing.told, "PNG as Base64 in JSON, batches", protocol, open_),
        Contender("MLServer", computing.told, "raw pixels, no batches", raw, open_, raw=True),
    ]


def _mlserver_files(computing: Computing, port: int) -> dict[str, object]:
    server = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_endpoint": None,
        "gzip_enabled": False,
        # Without workers beside it the server's own process computes.
        "parallel_workers": computing.workers if computing.workers > 1 else 0,
    }
    model = {
        "name": MODEL,
        "implementation": "mlserver_model.Bare",
        "max_batch_size": computing.batch,
        "max_batch_time": WAIT_SECONDS,
    }
    return {"settings.json": server, "model-settings.json": model}


def _bentoml(environment: Environment, computing: Computing) -> list[Contender]:
    def command(port: int) -> list[str]:
        serve = [environment.program("bentoml"), "serve", "bentoml_service:Bare", "--working-dir", str(PEERS)]
        return [*serve, "--host", "127.0.0.1", "--port", str(port)]

    open_ = partial(opened, environment, computing, command, "/readyz")
    bodies = {
        "PNG, no batches": partial(png_message, path="/png"),
        "PNG in a form, batches": partial(form_message, path="/gathered_png", name="images"),
        "raw pixels, no batches": partial(raw_message, path="/raw"),
        "raw pixels in a form, batches": partial(form_message, path="/gathered_raw", name="images", raw=True),
    }
    return [
        Contender("BentoML", computing.told, body, message, open_, raw=body.startswith("raw"))
        for body, message in bodies.items()
    ]


def _ray(environment: Environment, computing: Computing) -> list[Contender]:
    command = [environment.program("python"), str(PEERS / "ray_app.py")]
    contenders = []
    for one in computing.gatherings():
        open_ = partial(opened, environment, one, lambda port: command, "/-/healthz")
        contenders += _either("Ray Serve", f"{one.told}, {one.gathering}", "/classify", open_)
    return contenders


def _either(
    server: str, process: str, path: str, open_: Callable[[], AbstractContextManager[Running]]
) -> list[Contender]:
    """Return a server that tells PNG from raw pixels by the type of the content, asked by both."""
    return [
        Contender(server, process, "PNG", partial(png_message, path=path), open_),
        Contender(server, process, "raw pixels", partial(raw_message, path=path), open_, raw=True),
    ]


SETTINGS: Mapping[str, Callable[[Environment, Computing], list[Contender]]] = {
    "litserve": _litserve,
    "mlserver": _mlserver,
    "bentoml": _bentoml,
    "ray": _ray,
}

"""Everything that is compared, side by side in one run: `make bench`, or `python -m loadtest.bench NAME@VERSION ...`.

Four phases, each of which can be chosen alone: `compute`, the protected pipelines beside the bare classifier in one
process; `servers`, other inference servers serving the bare classifier beside the gateway serving it bare and
protected; `art`, the defenses of the Adversarial Robustness Toolbox in plain Python; `gateway`, what the gateway itself
adds to decoding and computing. Absolute times vary with the machine: quote the ratios. What was measured is written
as JSON after every phase, and as a page beside it.
"""

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from loadtest.art_defenses import art_comparison
from loadtest.bench_page import page
from loadtest.competition import compete
from loadtest.compute import computation
from loadtest.contenders import CORES, Contender, counted, gateways
from loadtest.environments import PeerUnavailable, own_versions
from loadtest.image_sets import ImageSet
from loadtest.own_cost import own_cost
from loadtest.rivals import REQUIREMENTS, environment_of, rivals
from model_store import Fetched, Store, parse_reference
from service.cli.common import failures_told
from service.hardware import hardware
from service.repository import MODELS
from service.served import GRAPH

OWN = "Portcullis"
REQUESTS = 1000
"""Of each round on the gateway's own cost: far fewer drown in the ticks in which the system counts processor time."""


class Phase(StrEnum):
    """What can be compared."""

    COMPUTE = "compute"
    SERVERS = "servers"
    ART = "art"
    GATEWAY = "gateway"


class NothingProtected(ValueError):
    """A version that is to be compared with the bare classifier has no defense."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{name} has no defense; expected a version that `portcullis fit` published.")


@dataclass(frozen=True)
class Plan:
    """What is compared and how thoroughly.

    ``versions`` are by what they are called, the bare classifier first; ``concurrencies``, ``trial_seconds``,
    ``seconds`` and ``rounds`` are of the servers, ``threads`` and ``turns`` of the computation.
    """

    store: Path
    versions: Mapping[str, Fetched]
    images: np.ndarray
    peers: tuple[str, ...]
    environments: Path
    concurrencies: tuple[int, ...]
    trial_seconds: float
    seconds: float
    rounds: int
    threads: tuple[int, ...]
    turns: int
    batch: int
    told: Callable[[str], None]

    @property
    def bare(self) -> Fetched:
        """The classifier without a defense."""
        return self.versions["bare"]


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Protected versions, as NAME or NAME@VERSION.")] = None,
    store: Annotated[Path, typer.Option(help="Folder of the model store.")] = Path("var/demo/store"),
    images: Annotated[Path, typer.Option(help="Images, from python -m loadtest.image_sets.")] = Path(
        "var/bench/images.npz"
    ),
    phase: Annotated[list[Phase] | None, typer.Option(help="What to compare.", show_default="all")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Other servers.", show_default=", ".join(REQUIREMENTS))] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests in flight.", show_default="1, 16, 64")] = None,
    trial: Annotated[float, typer.Option(help="Seconds of each load while all settings are tried.", min=0.1)] = 0.5,
    seconds: Annotated[float, typer.Option(help="Seconds of each load on the best settings.", min=0.5)] = 1.5,
    rounds: Annotated[int, typer.Option(help="How often each server has its turn.", min=1)] = 3,
    threads: Annotated[
        list[int] | None, typer.Option(help="Threads that compute.", show_default=f"1, {CORES}", min=1)
    ] = None,
    turns: Annotated[int, typer.Option(help="Turns of each graph at each batch size.", min=3)] = 60,
    batch: Annotated[int, typer.Option(help="The most images that a server computes at once.", min=1)] = 32,
    output: Annotated[Path, typer.Option(help="Where bench.json and bench.html are written.")] = Path("var/bench"),
) -> None:
    """Compare protected versions with the bare classifier they were fitted for, and with what else serves it."""
    with failures_told():
        plan = Plan(
            store=store,
            versions=versions_of(Store.open(store / MODELS), models or ["digits"]),
            images=ImageSet.read(images).clean,
            peers=tuple(peer or REQUIREMENTS),
            environments=output / "environments",
            concurrencies=tuple(concurrency or (1, 16, 64)),
            trial_seconds=trial,
            seconds=seconds,
            rounds=rounds,
            threads=tuple(threads or (1, CORES)),
            turns=turns,
            batch=batch,
            told=partial(typer.echo, err=True),
        )
        output.mkdir(parents=True, exist_ok=True)
        result = run(plan, tuple(phase or Phase), output)
    typer.echo(f"{output / 'bench.json'} and {output / 'bench.html'}: {', '.join(result['phases'])}.")


def versions_of(models: Store, names: list[str]) -> dict[str, Fetched]:
    """Return the bare classifier and the protected versions named, by what the tables call them.

    Raises ``NothingProtected``, and ``ValueError`` where they were fitted for different classifiers.
    """
    protected = {name: models.fetch(*parse_reference(name)) for name in names}
    parents = {}
    for name, fetched in protected.items():
        if fetched.manifest.parent is None:
            raise NothingProtected(name)
        parents[fetched.manifest.parent.name, fetched.manifest.parent.version] = name
    if len(parents) > 1:
        raise ValueError(f"Expected versions of one classifier, got {len(parents)}: {', '.join(protected)}.")
    called = {f"{f.manifest.kind} @{f.manifest.version}": f for f in protected.values()}
    return {"bare": models.fetch(*next(iter(parents))), **called}


def run(plan: Plan, phases: tuple[Phase, ...], output: Path) -> dict[str, Any]:
    """Run the phases in order, write what each showed as soon as it is there, and return all of it."""
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "loadtest.bench", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": hardware(torch.device("cpu")),
        "installed": own_versions(),
        "versions": {
            name: f"{fetched.manifest.name}@{fetched.manifest.version} {fetched.digest}"
            for name, fetched in plan.versions.items()
        },
        "phases": {},
    }
    for phase in phases:
        result["phases"][phase.value] = RUN[phase](plan)
        (output / "bench.json").write_text(json.dumps(result, indent=1))
        (output / "bench.html").write_text(page(result))
    return result


def compute(plan: Plan) -> dict[str, Any]:
    """Compare computation in each number of threads."""
    protected = {name: fetched for name, fetched in plan.versions.items() if name != "bare"}
    compared = {}
    for threads in plan.threads:
        for name, fetched in protected.items():
            called = f"{name}, {counted(threads, 'thread')}"
            plan.told(f"computation of {called}")
            compared[called] = computation(fetched, plan.bare, turns=plan.turns, threads=threads)
    return compared


def servers(plan: Plan) -> dict[str, Any]:
    """Compare servers; one that cannot be installed is named with the reason."""
    contenders: list[Contender] = []
    for name, fetched in plan.versions.items():
        manifest = fetched.manifest
        contenders += gateways(plan.store, f"{OWN} {name}", manifest.name, manifest.version, max_batch=plan.batch)
    installed: dict[str, list[str]] = {}
    failures: dict[str, str] = {}
    for peer in plan.peers:
        environment = environment_of(peer, plan.environments)
        plan.told(f"installing {peer}")
        try:
            environment.install()
        except PeerUnavailable as error:
            failures[peer] = str(error)
            continue
        installed[peer] = environment.versions()
        contenders += rivals(peer, environment, plan.bare.folder / GRAPH, plan.batch)
    compared = compete(
        contenders,
        plan.images,
        [f"{OWN} {name}" for name in plan.versions],
        concurrencies=plan.concurrencies,
        trial_seconds=plan.trial_seconds,
        seconds=plan.seconds,
        rounds=plan.rounds,
        told=plan.told,
    )
    return {**compared, "installed": installed, "failures": failures | compared["failures"]}


def art(plan: Plan) -> dict[str, Any]:
    """Compare ART's defenses."""
    return art_comparison(plan.versions, plan.images, turns=plan.turns, told=plan.told)


def gateway(plan: Plan) -> dict[str, Any]:
    """Measure what the gateway itself costs."""
    return own_cost(plan.store, dict(plan.versions), plan.images, requests=REQUESTS, rounds=plan.rounds, told=plan.told)


RUN: Mapping[Phase, Callable[[Plan], dict[str, Any]]] = {
    Phase.COMPUTE: compute,
    Phase.SERVERS: servers,
    Phase.ART: art,
    Phase.GATEWAY: gateway,
}


if __name__ == "__main__":
    typer.run(main)

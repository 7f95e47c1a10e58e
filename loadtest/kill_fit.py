"""Kill a fit at random moments, resume it until it is done, and compare it with one that was left alone.

For example, on the demonstration's store (run `make demo ARGS=--once` first):

    python -m loadtest.kill_fit digits --kills 20 -- --data digits --epochs 2 --no-flip

Every fit is a process of its own, on a copy of the store, and is killed with SIGKILL, four times at most; one that is
done before its moment comes is compared too. The kills that are left are spent on another. Prints JSON and exits 1
when a metric differs, when something was published twice, or when something unfinished is left.
"""

import json
import math
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import load_file

from model_store import Fetched, Store
from service.fit import CHECKPOINT
from service.fit_job import FITS, FitJobs
from service.regulators import REGULATORS
from service.repository import MODELS

POLL_SECONDS = 0.05

KILLS_OF_ONE_FIT = 4
"""How often one fit is killed at most: after a few, all of its stages are kept, and every further kill is alike."""

WEIGHTS = "largest difference of a weight"


class FitFailed(RuntimeError):
    """A fit that nobody killed ended with an error."""


@dataclass(frozen=True)
class Kill:
    """One kill: of which fit, how many seconds after its process had taken the lock, and the stages kept by then."""

    fit: int
    seconds: float
    kept: tuple[str, ...]


class FitProcess:
    """`portcullis fit` of a method in a process of its own, from the moment at which it has taken its lock."""

    def __init__(self, store: Path, name: str, arguments: Sequence[str], *, method: str = "coophance") -> None:
        self._told = store.parent / f"{store.name}-{time.monotonic_ns()}.txt"
        self._jobs = FitJobs(store / FITS)
        command = [sys.executable, "-c", "from service.cli import app; app()", "fit", method, name]
        with self._told.open("w") as told:
            self._process = subprocess.Popen(
                [*command, *arguments, "--json", "--store", str(store)], stdout=subprocess.DEVNULL, stderr=told
            )
        while self._process.poll() is None and self.pid not in {fit.pid for fit in self._jobs.unfinished()}:
            time.sleep(POLL_SECONDS)
        self._began = time.monotonic()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def kept(self) -> tuple[str, ...] | None:
        """Return the stages that are kept of the fit, or None where it is no longer unfinished."""
        return next((fit.stages for fit in self._jobs.unfinished()), None)

    def stop_after(self, seconds: float, number: signal.Signals = signal.SIGKILL) -> int | None:
        """Send a signal so long after the lock was taken; return the exit status, or None where it was done before."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, self._began + seconds - time.monotonic()))
            return None
        self._process.send_signal(number)
        return self._process.wait()

    def finish(self) -> float:
        """Wait for the end, and return the seconds under the lock; raises ``FitFailed`` where it ends in an error."""
        if self._process.wait() != 0:
            raise FitFailed(self.told())
        return time.monotonic() - self._began

    def told(self) -> str:
        """Return what the fit has said on its error stream."""
        return self._told.read_text()


def fit_undisturbed(store: Path, name: str, arguments: Sequence[str]) -> float:
    """Fit and publish; return the seconds that it took under its lock."""
    return FitProcess(store, name, arguments).finish()


def kill_and_resume(
    store: Path, folder: Path, name: str, arguments: Sequence[str], *, kills: int, longest: float, seed: int
) -> tuple[list[Kill], list[Path]]:
    """Fit in copies of a store, killing each process at a moment drawn evenly from 0 to ``longest`` seconds.

    Returns the kills, as many as asked for, and the stores, in each of which the fit was resumed until it was done.
    """
    moments = random.Random(seed)
    killed: list[Kill] = []
    stores: list[Path] = []
    while len(killed) < kills:
        stores.append(copy_of(store, folder / f"killed-{len(stores)}", name))
        done, last = False, min(kills, len(killed) + KILLS_OF_ONE_FIT)
        while not done and len(killed) < last:
            moment = moments.uniform(0, longest)
            process = FitProcess(stores[-1], name, arguments)
            if process.stop_after(moment) is None:
                process.finish()
                done = True
            elif (kept := process.kept()) is None:
                done = True  # killed after all was published
            else:
                killed.append(Kill(len(stores) - 1, round(moment, 2), kept))
        if not done:
            FitProcess(stores[-1], name, arguments).finish()
    return killed, stores


def copy_of(store: Path, target: Path, name: str) -> Path:
    """Copy what a fit reads of a store: the model that the classifier belongs to, and the Regulators."""
    shutil.copytree(store / MODELS / name, target / MODELS / name)
    if (store / REGULATORS).is_dir():
        shutil.copytree(store / REGULATORS, target / REGULATORS)
    return target


def published_by(store: Path, before: Path, name: str) -> Fetched:
    """Return the one version that a fit published; raises ``FitFailed`` unless it is one, with nothing left unfinished.

    ``before`` is the store that ``store`` is a copy of.
    """
    new = Store.open(store / MODELS).versions(name)[len(Store.open(before / MODELS).versions(name)) :]
    regulators = _versions(store / REGULATORS) - _versions(before / REGULATORS)
    unfinished = [fit.key for fit in FitJobs(store / FITS).unfinished()]
    if len(new) != 1 or len(regulators) > 1 or unfinished:
        raise FitFailed(f"Expected one new version and nothing unfinished, got {new}, {regulators} and {unfinished}.")
    return Store.open(store / MODELS).fetch(name, new[0])


def difference(one: Fetched, other: Fetched) -> dict[str, float]:
    """Return the metrics that differ and by how much, and the largest difference of a fitted weight."""
    first, second = one.manifest.metrics, other.manifest.metrics
    different = {
        key: abs(first.get(key, math.nan) - second.get(key, math.nan))
        for key in first.keys() | second.keys()
        if first.get(key) != second.get(key)
    }
    return {**different, WEIGHTS: max(_weight_differences(one.folder / CHECKPOINT, other.folder / CHECKPOINT))}


def _weight_differences(one: Path, other: Path) -> Iterator[float]:
    for path in sorted(one.glob("*.safetensors")):
        theirs = load_file(other / path.name)
        for key, value in load_file(path).items():
            yield float((value.double() - theirs[key].double()).abs().max()) if value.numel() else 0.0


def _versions(folder: Path) -> set[tuple[str, int]]:
    store = Store.open(folder)
    return {(name, version) for name in store.models() for version in store.versions(name)}


def main(
    name: Annotated[str, typer.Argument(help="The classifier's name in the store.")],
    arguments: Annotated[list[str], typer.Argument(help="After --: what `portcullis fit coophance NAME` is given.")],
    store: Annotated[Path, typer.Option(help="Folder of the model store; it is only read.")] = Path("var/demo/store"),
    kills: Annotated[int, typer.Option(help="How many times to kill.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
) -> None:
    """Fit once undisturbed, then with kills, and compare."""
    with tempfile.TemporaryDirectory(prefix="portcullis-kill-") as folder:
        undisturbed = copy_of(store, Path(folder) / "undisturbed", name)
        seconds = fit_undisturbed(undisturbed, name, arguments)
        killed, stores = kill_and_resume(store, Path(folder), name, arguments, kills=kills, longest=seconds, seed=seed)
        expected = published_by(undisturbed, store, name)
        differences = [difference(expected, published_by(each, store, name)) for each in stores]
    equal = all(each.keys() == {WEIGHTS} for each in differences)
    result = {
        "command": shlex.join(["python", "-m", "loadtest.kill_fit", *sys.argv[1:]]),
        "seconds_undisturbed": round(seconds, 1),
        "kills": [asdict(kill) for kill in killed],
        "fits": len(stores),
        "metrics": expected.manifest.metrics,
        "differences": differences,
        "equal": equal,
    }
    typer.echo(json.dumps(result, indent=2))
    raise typer.Exit(0 if equal else 1)


if __name__ == "__main__":
    typer.run(main)

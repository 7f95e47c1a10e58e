"""What an engine takes on a device, protected beside bare: `python -m loadtest.engines NAME@VERSION ... --device auto`.

Each version, the classifier that they were fitted for among them, is opened by each engine in each precision for each
size of batch as a gateway opens it, warmed up, and takes turns with the others. Beside the times stand their ratio to
the bare classifier's and the share of what products of square matrices reach on the same device in the same run. What
cannot be opened is listed with the reason. Exits 1 where an aim that was given is missed.
"""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from loadtest.bench import versions_of
from loadtest.cost_model import markdown_table
from loadtest.engine_turns import BARE, NothingMeasured, Plan, measured
from model_store import Store
from service.cli.common import failures_told
from service.hardware import DeviceName, find_device, hardware
from service.libraries import library_versions
from service.repository import MODELS
from service.settings import EngineName, Precision

BATCHES = (1, 8, 32, 128, 512)

EngineChoice = StrEnum("EngineChoice", [(name, name) for name in get_args(EngineName) if name != "auto"])
"""The engines by name; which of them a gateway takes by itself is no third one."""

PrecisionChoice = StrEnum("PrecisionChoice", [(name, name) for name in get_args(Precision)])
"""The precisions of a gateway's settings."""


def main(
    models: Annotated[list[str], typer.Argument(help="Protected versions, as NAME or NAME@VERSION.")],
    store: Annotated[Path, typer.Option(help="Folder of the model store.")] = Path("var/demo/store"),
    device: Annotated[DeviceName, typer.Option(help="Where to compute; auto is a GPU where there is one.")] = "auto",
    engine: Annotated[
        list[EngineChoice] | None, typer.Option(help="What computes.", show_default="onnx, torch")
    ] = None,
    precision: Annotated[
        list[PrecisionChoice] | None, typer.Option(help="What it computes in.", show_default="auto, the gateway's own")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Images at once.", show_default=", ".join(map(str, BATCHES)), min=1)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads on a processor; 0 takes every core.", min=0)] = 0,
    turns: Annotated[int, typer.Option(help="Turns of each version at each size of batch.", min=3)] = 200,
    p50: Annotated[
        float | None, typer.Option(help="Aim: milliseconds that p50 of one image, protected, is to stay under.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Aim: protected images a second, at the least, at the best batch.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The JSON file to be written.")] = Path("var/engines.json"),
) -> None:
    """Measure protected versions beside the bare classifier they were fitted for, in the engines that serve them."""
    with failures_told():
        batches = tuple(dict.fromkeys(batch or BATCHES))
        if p50 is not None and 1 not in batches:
            got = ", ".join(map(str, batches))
            raise ValueError(f"Expected 1 among the batches, since --p50 is of one image at a time, got {got}.")
        plan = Plan(
            store=store,
            versions=versions_of(Store.open(store / MODELS), models),
            device=find_device(device),
            engines=tuple(dict.fromkeys(each.value for each in engine or EngineChoice)),
            precisions=tuple(dict.fromkeys(each.value for each in precision or [PrecisionChoice.auto])),
            batches=batches,
            threads=threads,
            turns=turns,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        result = run(plan, p50=p50, rate=rate, output=output, told=partial(typer.echo, err=True))
    typer.echo(page(result))
    raise typer.Exit(0 if all(verdict["passed"] for verdict in result["verdicts"]) else 1)


def run(plan: Plan, *, p50: float | None, rate: float | None, output: Path, told: Callable[[str], None]) -> Any:
    """Measure everything, write what is known after every step to ``output``, and return it.

    Raises ``NothingMeasured`` where nothing could be.
    """
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "loadtest.engines", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": hardware(plan.device),
        "libraries": library_versions() | _cuda_versions(plan.device),
        "versions": {
            name: f"{fetched.manifest.name}@{fetched.manifest.version} {fetched.digest}"
            for name, fetched in plan.versions.items()
        },
        "threads": plan.threads,
        "turns": plan.turns,
        "rows": [],
        "refused": [],
    }
    for step in measured(plan, told):
        result["rows"] += step.rows
        result["refused"] += step.refused
        result |= {"best": best(plan, result["rows"]), "verdicts": judge(plan, result["rows"], p50=p50, rate=rate)}
        output.write_text(json.dumps(result, indent=1))
    if not result["rows"]:
        raise NothingMeasured(list(dict.fromkeys(refusal["reason"] for refusal in result["refused"])))
    return result


def best(plan: Plan, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the row with the most images a second of each version that was measured."""
    own = {name: [row for row in rows if row["version"] == name] for name in plan.versions}
    return {name: max(each, key=lambda row: row["images_per_second"]) for name, each in own.items() if each}


def judge(plan: Plan, rows: Sequence[dict[str, Any]], *, p50: float | None, rate: float | None) -> list[dict[str, Any]]:
    """Return whether each protected version keeps the aims that were given, by the engine that does best.

    A version of which nothing was measured misses them.
    """
    verdicts = []
    for version in [name for name in plan.versions if name != BARE]:
        own = [row for row in rows if row["version"] == version]
        alone = min((row["p50_milliseconds"] for row in own if row["batch"] == 1), default=None)
        most = max((row["images_per_second"] for row in own), default=None)
        if p50 is not None:
            expected = f"p50 of one image under {p50:g} ms"
            verdicts.append(_verdict(version, expected, alone, alone is not None and alone < p50))
        if rate is not None:
            expected = f"at least {rate:,.0f} images a second at the best batch"
            verdicts.append(_verdict(version, expected, most, most is not None and most >= rate))
    return verdicts


def page(result: dict[str, Any]) -> str:
    """Return the tables in Markdown: every row, each version's best, what was refused, and the aims."""
    machine, header = result["machine"], ("version", "engine", "precision", "batch")
    columns = ("p50, ms", "p99, ms", "images/s", "over bare", "of the ceiling", "memory, MiB")
    parts = [
        f"{machine['device']}, {machine['cpus']} processors, {result['turns']} turns.",
        markdown_table((*header, *columns), [[*_setting(row), *_figures(row)] for row in result["rows"]]),
        "At the batch that is best:",
        markdown_table((*header, *columns), [[*_setting(row), *_figures(row)] for row in result["best"].values()]),
    ]
    if result["refused"]:
        parts += ["Not measured:", "\n".join(_refusals(result["refused"]))]
    if result["verdicts"]:
        rows = [
            [each["version"], each["expected"], _number(each["measured"]), "kept" if each["passed"] else "missed"]
            for each in result["verdicts"]
        ]
        parts.append(markdown_table(("version", "aim", "measured", ""), rows))
    return "\n\n".join(parts)


def _verdict(version: str, expected: str, measured: float | None, passed: bool) -> dict[str, Any]:
    return {"version": version, "expected": expected, "measured": measured, "passed": passed}


def _setting(row: dict[str, Any]) -> list[str]:
    asked, computed = row["precision"], row["arithmetic"]
    return [row["version"], row["engine"], asked if asked == computed else f"{asked}: {computed}", str(row["batch"])]


def _figures(row: dict[str, Any]) -> list[str]:
    held = row["device_bytes"]
    return [
        f"{row['p50_milliseconds']:.3f}",
        f"{row['p99_milliseconds']:.3f}",
        f"{row['images_per_second']:,.0f}",
        _number(row["over_bare"]),
        f"{100 * row['of_ceiling']:.1f} %",
        "-" if held is None else f"{held / 2**20:,.0f}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _refusals(refused: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each reason, with the sizes of batch that it holds for; none where it holds for all."""
    batches: dict[tuple[str, str, str, str], list[str]] = {}
    for each in refused:
        key = each["version"] or "every version", each["engine"], each["precision"], each["reason"]
        batches.setdefault(key, []).extend([] if each["batch"] is None else [str(each["batch"])])
    lines = []
    for (version, engine, precision, reason), sizes in batches.items():
        where = f", batch {', '.join(sizes)}" if sizes else ""
        lines.append(f"- {version}, {engine}, {precision}{where}: {reason}")
    return lines


def _cuda_versions(device: torch.device) -> dict[str, str]:
    return {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}


if __name__ == "__main__":
    typer.run(main)

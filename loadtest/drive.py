"""Load a gateway that runs already and print what it showed: `python -m loadtest.drive closed|open URL MODEL`.

`closed` keeps so many requests in flight, `open` sends so many a second whatever becomes of them; see
``loadtest.drivers``. Prints JSON, and exits 1 where a limit that was given is broken.
"""

import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from loadtest.connections import Address, Message
from loadtest.drivers import Spacing, arrivals, closed_loop, drive, open_loop
from loadtest.image_sets import ImageSet, traffic
from loadtest.messages import Body
from loadtest.runs import Run
from loadtest.serving import Running
from loadtest.watching import memory_over_time
from service.cli.common import failures_told

UrlArgument = Annotated[str, typer.Argument(help="The gateway's address, as http://host:port.")]
ModelArgument = Annotated[str, typer.Argument(help="The model to ask.")]
ImagesOption = Annotated[Path, typer.Option(help="The images, from python -m loadtest.image_sets.")]
BodyOption = Annotated[Body, typer.Option(help="How an image is sent.")]
ShareOption = Annotated[float, typer.Option(help="The share of adversarial images.", min=0, max=1)]
PidOption = Annotated[int | None, typer.Option(help="The server's process, whose memory and time are to be watched.")]
P99Option = Annotated[float, typer.Option(help="The most that p99 may be, in milliseconds.")]
ErrorsOption = Annotated[float, typer.Option(help="The largest share of answers other than 200.", min=0, max=1)]

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def closed(
    url: UrlArgument,
    model: ModelArgument,
    images: ImagesOption,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 16,
    seconds: Annotated[float, typer.Option(help="How long.", min=0.1)] = 10,
    body: BodyOption = "png",
    share: ShareOption = 0.0,
    pid: PidOption = None,
    p99: P99Option = float("inf"),
    errors: ErrorsOption = 0.0,
) -> None:
    """Keep so many requests in flight."""
    with failures_told():
        messages = traffic(ImageSet.read(images), share, model, body)
        _tell(closed_loop(Address.of(url), messages, concurrency=concurrency, seconds=seconds), url, pid, p99, errors)


@app.command("open")
def open_(
    url: UrlArgument,
    model: ModelArgument,
    images: ImagesOption,
    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.1)] = 100,
    seconds: Annotated[float, typer.Option(help="How long.", min=0.1)] = 10,
    spacing: Annotated[Spacing, typer.Option(help="Independent clients, or one every 1/rate seconds.")] = "exponential",
    body: BodyOption = "png",
    share: ShareOption = 0.0,
    pid: PidOption = None,
    p99: P99Option = float("inf"),
    errors: ErrorsOption = 0.0,
) -> None:
    """Send so many requests a second; latencies count from when each was to be sent."""
    with failures_told():
        messages: list[Message] = traffic(ImageSet.read(images), share, model, body)
        run = open_loop(Address.of(url), messages, arrivals(rate, seconds, spacing))
        _tell(run, url, pid, p99, errors)


def _tell(run: Coroutine[Any, Any, Run], url: str, pid: int | None, p99: float, errors: float) -> None:
    ended: list[str] = []
    told: dict[str, Any] = {"command": " ".join(["python -m loadtest.drive", *sys.argv[1:]])}
    if pid is None:
        done = drive(run)
    else:
        if not psutil.pid_exists(pid):
            run.close()
            raise ValueError(f"Expected a running server's process, got {pid}.")
        server = Running(url, pid, Path())
        before = server.cpu_seconds
        with memory_over_time(server) as held:
            done = drive(run)
        told["memory"] = [{"second": second, "bytes": size} for second, size in held.samples]
        if held.ended is None:
            told["server_cpu_milliseconds"] = 1000 * (server.cpu_seconds - before) / max(1, len(done.seconds))
        else:
            ended.append(str(held.ended))
    told |= done.summary()
    broken = ended + broken_limits(done, p99, errors)
    told["broken_limits"] = broken
    typer.echo(json.dumps(told, indent=1))
    raise typer.Exit(1 if broken else 0)


def broken_limits(run: Run, p99: float, errors: float) -> list[str]:
    """Return a sentence for each limit that a run broke: the p99 in milliseconds, the share of answers not 200."""
    broken = []
    if not len(run.seconds):
        return ["Expected requests, but none was sent."]
    measured = 1000 * run.percentile(99)
    if measured > p99:
        broken.append(f"Expected a p99 of at most {p99:g} ms, measured {measured:.1f} ms.")
    share = run.errors / len(run.seconds)
    if share > errors:
        broken.append(f"Expected at most {100 * errors:g} % of answers other than 200, got {100 * share:.2f} %.")
    return broken


if __name__ == "__main__":
    app()

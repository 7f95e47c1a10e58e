"""Ask a gateway hundreds of thousands of times and see what it holds: `python -m loadtest.endurance NAME`.

Prints JSON with the memory over the requests and exits 1 where it is not flat, an answer is not 200, or the gateway
ends. Flat means that
after the first tenth of the requests, in which pools and caches fill, what is held stays within a share of what was
held then.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest.connections import Address, Message
from loadtest.drivers import closed_loop, drive
from loadtest.image_sets import ImageSet, traffic
from loadtest.messages import Body
from loadtest.overload import settings_of
from loadtest.serving import Running, ServerEnded, gateway
from model_store import parse_reference
from service.cli.common import failures_told

PORTIONS = 40


def main(
    name: Annotated[str, typer.Argument(help="The model, as NAME or NAME@VERSION.")],
    images: Annotated[Path, typer.Option(help="The images, from python -m loadtest.image_sets.")],
    store: Annotated[Path, typer.Option(help="Folder of the model store.")] = Path("var/demo/store"),
    requests: Annotated[int, typer.Option(help="How many.", min=PORTIONS)] = 200_000,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 16,
    body: Annotated[Body, typer.Option(help="How an image is sent.")] = "png",
    share: Annotated[float, typer.Option(help="The share of adversarial images.", min=0, max=1)] = 0.01,
    growth: Annotated[float, typer.Option(help="The share by which memory may differ.", min=0)] = 0.05,
    setting: Annotated[list[str] | None, typer.Option(help="A setting of the gateway, as name=value.")] = None,
) -> None:
    """Ask so many times and print what was held."""
    with failures_told():
        model, _ = parse_reference(name)
        messages = traffic(ImageSet.read(images), share, model, body)
        settings = settings_of(setting or [])
        with gateway(store, models=name, **settings) as server:
            result = endure(server, messages, requests, concurrency, partial(typer.echo, err=True))
    result |= verdict(result["memory_bytes"], growth)
    result["passed"] = result["flat"] and not result["errors"] and result["ended"] is None
    told = {"command": " ".join(["python -m loadtest.endurance", *sys.argv[1:]]), "settings": settings}
    typer.echo(json.dumps(told | result, indent=1))
    raise typer.Exit(0 if result["passed"] else 1)


def endure(
    server: Running, messages: Sequence[Message], requests: int, concurrency: int, told: Callable[[str], None]
) -> dict[str, Any]:
    """Return the memory after each fortieth of the requests, the first entry before any, and the answers.

    ``ended`` says how the server ended, where it did: nothing is asked of it any more. Raises ``ServerEnded`` where it
    is gone before the first request.
    """
    address = Address.of(server.url)
    memory, answered, errors, seconds = [server.memory], 0, 0, 0.0
    ended: str | None = None
    for portion in range(PORTIONS):
        count = requests * (portion + 1) // PORTIONS - requests * portion // PORTIONS
        run = drive(closed_loop(address, messages, concurrency=concurrency, requests=count))
        answered += count - run.errors
        errors, seconds = errors + run.errors, seconds + run.duration
        try:
            memory.append(server.memory)
        except ServerEnded as error:
            ended = str(error)
            told(ended)
            break
        told(f"{requests * (portion + 1) // PORTIONS} requests, {memory[-1] / 2**20:.1f} MiB")
    return {
        "requests": answered + errors,
        "errors": errors,
        "per_second": answered / seconds,
        "memory_bytes": memory,
        "ended": ended,
    }


def verdict(memory: Sequence[int], growth: float) -> dict[str, Any]:
    """Say whether memory, as ``endure`` returns it, is flat: how far from that after a tenth it went, as a share."""
    settled = len(memory) // 10
    furthest = max(abs(held / memory[settled] - 1) for held in memory[settled:])
    return {"settled_bytes": memory[settled], "furthest": furthest, "flat": furthest <= growth}


if __name__ == "__main__":
    typer.run(main)

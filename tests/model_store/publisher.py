"""A publisher in a process of its own, so that tests can race it, limit it and kill it.

Every command reports on its standard output, one line per fact, and says `ready` before it waits for a line to start.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from model_store import AliasConflict, Draft, InputSpec, Store, StoreError

DRAFT = Draft(kind="classifier", input=InputSpec(shape=(1, 8, 8), mode="L"), labels=("cat", "dog"))
STEPS = ("open", "os.", "fcntl.", "shutil.")


def say(*words: object) -> None:
    print(*words, flush=True)


def await_start() -> None:
    say("ready")
    sys.stdin.readline()


def publish_forever(root: str, payload: str) -> None:
    """Publish again and again; say `begin` before each time and `done VERSION` after it."""
    store = Store.open(Path(root))
    await_start()
    while True:
        say("begin")
        say("done", store.publish("m", DRAFT, Path(payload)).version)


def publish_turns(root: str, payload: str, turns: str) -> None:
    """Publish a few times with a file that says whose turn it was; say `VERSION TURN`."""
    store = Store.open(Path(root))
    await_start()
    for turn in range(int(turns)):
        (Path(payload) / "turn.json").write_text(json.dumps([payload, turn]))
        say(store.publish("m", DRAFT, Path(payload)).version, turn)


def increment_alias(root: str, times: str) -> None:
    """Move the alias `serving` one version up, several times, never past somebody else's move; say the conflicts."""
    store = Store.open(Path(root))
    await_start()
    conflicts = 0
    for _ in range(int(times)):
        while True:
            seen = store.aliases("m")["serving"]
            try:
                store.set_alias("m", "serving", seen + 1, expected=seen)
                break
            except AliasConflict:
                conflicts += 1
    say(conflicts)


def move_alias(root: str, alias: str, times: str) -> None:
    """Point one alias at version 1, 2, 3 and so on."""
    store = Store.open(Path(root))
    await_start()
    for version in range(1, int(times) + 1):
        store.set_alias("m", alias, version)


def publish_once(root: str, payload: str, largest_file: str = "") -> None:
    """Publish once; say the version, or the error as JSON. `largest_file` in bytes stands for a full disk."""
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest_file), int(largest_file)))
    try:
        say(Store.open(Path(root)).publish("m", DRAFT, Path(payload)).version)
    except StoreError as error:
        left = [str(path.relative_to(root)) for path in Path(root).rglob("*")]
        say(json.dumps({"error": type(error).__name__, "message": str(error), "left": left}))


def die_at(step: int) -> None:
    """Kill this process when it is about to take its step-th step with the file system."""
    remaining = step

    def hook(event: str, _: object) -> None:
        nonlocal remaining
        if event.startswith(STEPS):
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_everywhere(root: str, act: Callable[[Store], object], *, tidy: bool) -> None:
    """Act in children that die at their first, second, third step and so on; say what each left, until one lives.

    Tidy: what one left behind is removed before the next, so that all take the same steps.
    """
    store = Store.open(Path(root))
    for step in range(1, 1000):
        child = os.fork()
        if child == 0:
            die_at(step)
            act(store)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        hidden = len(list(Path(root).glob("m/.publishing-*")))
        problems = [problem.message for problem in store.verify()]
        facts = {"versions": store.versions("m"), "aliases": store.aliases("m"), "hidden": hidden, "problems": problems}
        say(json.dumps(facts | {"killed": os.WIFSIGNALED(status)}))
        if not os.WIFSIGNALED(status):
            return
        if tidy:
            store.prune_abandoned("m")


def die_publishing(root: str, payload: str, tidy: str = "") -> None:
    """Die at every step of publishing."""
    die_everywhere(root, lambda store: store.publish("m", DRAFT, Path(payload)), tidy=bool(tidy))


def die_moving(root: str) -> None:
    """Die at every step of moving the alias `serving` to version 2."""
    die_everywhere(root, lambda store: store.set_alias("m", "serving", 2), tidy=False)


COMMANDS: dict[str, Callable[..., None]] = {
    "publish-forever": publish_forever,
    "publish-turns": publish_turns,
    "publish-once": publish_once,
    "increment-alias": increment_alias,
    "move-alias": move_alias,
    "die-publishing": die_publishing,
    "die-moving": die_moving,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])

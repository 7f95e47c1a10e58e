"""Real processes that race each other, run out of room and die: the store stays whole."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from model_store import Draft, Store

UNSHARE = ["unshare", "--mount", "--map-root-user"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def store(root: Path) -> Store:
    """The store in a local folder, as this process sees it."""
    return Store.open(root)


def lines(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout
    return process.stdout.read().splitlines()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def start_together(processes: Iterable[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert next_line(process) == "ready"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()


def write_payload(folder: Path, files: int, size: int) -> Path:
    generator = random.Random(5)
    (folder / "checkpoint").mkdir(parents=True)
    for number in range(files):
        (folder / "checkpoint" / f"layer{number:03}.safetensors").write_bytes(generator.randbytes(size))
    (folder / "model.onnx").write_bytes(generator.randbytes(size))
    return folder


def hidden(root: Path) -> list[Path]:
    return list(root.glob("m/.publishing-*"))


def test_racing_publishers_get_consecutive_versions_and_lose_nothing(
    store: Store, root: Path, tmp_path: Path, publisher: Start
) -> None:
    payloads = [write_payload(tmp_path / f"payload{number}", 10, 20_000) for number in range(4)]
    publishers = [publisher("publish-turns", root, payload, 6) for payload in payloads]
    start_together(publishers)
    looks = 0
    while any(process.poll() is None for process in publishers):
        assert store.verify() == []  # a version is whole from the moment it is visible
        looks += 1

    turns = {}
    for payload, process in zip(payloads, publishers, strict=True):
        assert process.returncode == 0
        for line in lines(process):
            version, turn = map(int, line.split())
            turns[version] = [str(payload), turn]
    assert looks > 1
    assert sorted(turns) == store.versions("m") == list(range(1, 25))
    for version, content in turns.items():
        assert json.loads((store.fetch("m", version).folder / "turn.json").read_text()) == content
    assert len({payload for payload, _ in list(turns.values())[:12]}) > 1
    assert hidden(root) == []


def test_publishers_killed_at_random_moments_leave_a_valid_store(
    store: Store, root: Path, tmp_path: Path, draft: Draft, publisher: Start
) -> None:
    payload = write_payload(tmp_path / "big", 60, 100_000)
    durations = []
    for _ in range(3):
        began = time.perf_counter()
        store.publish("m", draft, payload)
        durations.append(time.perf_counter() - began)
    span = median(durations)
    generator = random.Random(11)
    reported = {1, 2, 3}
    kills = inside = halfway = 0

    following = publisher("publish-forever", root, payload)
    for _ in range(20):
        process, following = following, publisher("publish-forever", root, payload)
        start_together([process])
        assert next_line(process) == "begin"
        time.sleep(generator.uniform(0, span))
        process.kill()
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        said = ["begin", *lines(process)]
        reported |= {int(line.removeprefix("done ")) for line in said if line.startswith("done ")}
        inside += said[-1] == "begin"
        span *= 1.1 if len(said) == 1 else 0.8  # so that kills reach from the first to the last moment of publishing
        halfway += bool(hidden(root))

        assert store.verify() == []
        versions = store.versions("m")
        assert versions == list(range(1, len(versions) + 1))
        assert reported <= set(versions)

    assert kills == 20
    assert inside >= 10, f"only {inside} of {kills} kills landed while a version was being published"
    assert halfway >= 5, f"only {halfway} of {kills} kills left half a version behind"
    latest = store.latest("m")
    assert store.publish("m", draft, payload).version == latest + 1
    assert hidden(root) == []
    assert store.verify() == []


def deaths_of(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    deaths = [json.loads(line) for line in lines(process)]
    assert [death["killed"] for death in deaths] == [True] * (len(deaths) - 1) + [False]
    assert [death["problems"] for death in deaths] == [[]] * len(deaths)
    assert all(death["versions"] == list(range(1, len(death["versions"]) + 1)) for death in deaths)
    return deaths


def test_a_publisher_killed_at_any_step_leaves_nothing_or_a_whole_version(
    root: Path, payload: Path, publisher: Start
) -> None:
    deaths = deaths_of(publisher("die-publishing", root, payload, "tidy"))
    counts = [len(death["versions"]) for death in deaths]
    assert counts.count(0) > 40  # dead before the rename
    assert counts[-1] > 5  # dead after it, and at last alive
    assert counts == sorted(counts)
    assert any(death["hidden"] for death in deaths)
    assert deaths[-1]["hidden"] == 0


def test_publishers_killed_one_after_the_other_clean_up_behind_each_other(
    root: Path, payload: Path, publisher: Start
) -> None:
    deaths = deaths_of(publisher("die-publishing", root, payload))
    assert len(deaths) > 40
    assert max(death["hidden"] for death in deaths) == 1
    assert deaths[-1]["hidden"] == 0


def test_a_process_killed_at_any_step_of_moving_an_alias_leaves_the_old_or_the_new_version(
    store: Store, root: Path, draft: Draft, payload: Path, publisher: Start
) -> None:
    for _ in range(2):
        store.publish("m", draft, payload)
    store.set_alias("m", "serving", 1)
    deaths = deaths_of(publisher("die-moving", root))
    assert all(death["versions"] == [1, 2] for death in deaths)
    pointed = [death["aliases"]["serving"] for death in deaths]
    assert pointed == [1] * pointed.count(1) + [2] * pointed.count(2)
    assert pointed.count(1) > 5
    assert pointed.count(2) > 1


def test_racing_moves_of_one_alias_are_all_counted(
    store: Store, root: Path, draft: Draft, payload: Path, publisher: Start
) -> None:
    shutil.rmtree(payload / "checkpoint")
    for _ in range(41):
        store.publish("m", draft, payload)
    store.set_alias("m", "serving", 1)
    processes = [publisher("increment-alias", root, 10) for _ in range(4)]
    start_together(processes)
    conflicts = [int(line) for process in processes for line in lines(process)]
    assert [process.wait() for process in processes] == [0] * 4
    assert store.aliases("m") == {"serving": 41}
    assert sum(conflicts) > 0


def test_racing_moves_of_different_aliases_lose_none(
    store: Store, root: Path, draft: Draft, payload: Path, publisher: Start
) -> None:
    for _ in range(10):
        store.publish("m", draft, payload)
    processes = [publisher("move-alias", root, f"alias{number}", 10) for number in range(4)]
    start_together(processes)
    assert [process.wait() for process in processes] == [0] * 4
    assert store.aliases("m") == {f"alias{number}": 10 for number in range(4)}


def may_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    return (
        subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.parametrize("limit", ["largest file", "full disk"])
def test_a_publisher_without_room_tells_so_and_leaves_nothing(
    store: Store, root: Path, tmp_path: Path, publisher: Start, limit: str
) -> None:
    payload = write_payload(tmp_path / "big", 10, 300_000)
    if limit == "largest file":
        reason = "File too large"
        process = publisher("publish-once", root, payload, 200_000)
    elif may_mount():
        reason = "No space left on device"
        root.mkdir()
        mount = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'
        process = publisher("publish-once", root, payload, within=[*UNSHARE, "sh", "-c", mount, str(root)])
    else:
        pytest.skip("a small disk cannot be mounted here")
    told = json.loads(next_line(process))
    assert told["error"] == "StorageFailed"
    assert told["message"] == f"Model 'm' could not be published: {reason}."
    assert told["left"] == ["m", "m/.lock"]
    assert store.models() == []

"""Stages come back to the bit, or not at all: damaged files, full disks, writers killed half-way."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from defenses.stages import StageNotKept, Stages


@pytest.fixture
def stages(tmp_path) -> Stages:
    return Stages(tmp_path / "job" / "stages")


def test_tensors_of_any_layout_come_back_to_the_bit_and_in_order(stages):
    base = torch.randn(6, 5)
    weights = torch.randn(4, 4)
    given = {
        "transposed": base.t(),
        "rows": base[1:4],
        "base": base,
        "tied": weights,
        "also tied": weights,
        "expanded": torch.randn(1, 3).expand(2, 3),
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one of two": torch.rand(2, 3)[1],
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0, 3),
        "fooled": torch.tensor([True, False]),
        "images": torch.randint(0, 256, (2, 1, 3, 3), dtype=torch.uint8),
        "classes": torch.tensor([2**62, -1]),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "double": torch.tensor([math.nan, math.inf, 5e-324], dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    stages.save("regulator", given)
    kept = stages.load("regulator")
    assert list(kept.tensors) == list(given)
    for name, tensor in kept.tensors.items():
        expected = given[name].detach()
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        assert tensor.is_contiguous(), name
        assert torch.equal(bits(tensor), bits(expected)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_values_come_back_as_json_holds_them(stages):
    values = {
        "steps": 391,
        "losses": [0.1 + 0.2, math.inf],
        "seconds": 1.25,
        "name": "fgsm:epsilon=8/255",
        "none": None,
    }
    stages.save("plan", {}, values)
    assert stages.load("plan") == ({}, values)
    assert stages.seconds("plan") == 1.25
    stages.save("bare", {"a": torch.zeros(1)})
    assert stages.load("bare").values == {}
    assert stages.seconds("bare") is None
    assert stages.seconds("absent") is None


def test_what_is_loaded_is_independent_of_the_file(stages):
    stages.save("statistics", {"mu": torch.arange(5.0)})
    first = stages.load("statistics").tensors["mu"]
    first += 1
    assert stages.load("statistics").tensors["mu"].tolist() == [0, 1, 2, 3, 4]
    stages.drop("statistics")
    assert first.tolist() == [1, 2, 3, 4, 5]
    assert first.data_ptr() % 64 == 0


def test_stages_are_listed_in_the_order_in_which_they_were_made(stages):
    assert stages.names() == []
    names = ["plan", "examples fgsm:epsilon=48/255,steps=100", "a.b/../c", "épreuve", "a"]
    for name in names:
        stages.save(name, {"x": torch.ones(1)})
    assert stages.names() == names
    assert all(stages.load(name) is not None for name in names)
    stages.save("plan", {"x": torch.zeros(2)})
    stages.drop("épreuve")
    stages.drop("never kept")
    assert stages.names() == [names[1], names[2], "a", "plan"]
    assert stages.load("plan").tensors["x"].tolist() == [0, 0]
    assert Stages(stages.folder).load("épreuve") is None
    assert {path.suffix for path in stages.folder.iterdir()} == {".safetensors"}, "nothing lies elsewhere"


@pytest.mark.parametrize("name", ["", "x" * 201, "é" * 40])
def test_a_name_that_no_file_can_bear_is_refused_before_anything_is_computed(stages, name):
    with pytest.raises(ValueError, match="A stage's name has 1 to 200 characters"):
        stages.load(name)


def only_file(stages: Stages) -> Path:
    (path,) = stages.folder.glob("*.safetensors")
    return path


def test_a_truncated_file_counts_as_not_kept_wherever_it_ends(stages, caplog):
    stages.save("examples", {"x": torch.rand(64)}, {"seconds": 3})
    whole = only_file(stages).read_bytes()
    for end in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        path = stages.folder / "examples.safetensors"
        path.write_bytes(whole[:end])
        caplog.clear()
        assert stages.seconds("examples") is None
        assert stages.load("examples") is None
        assert not path.exists()
        assert "examples" in caplog.text
        assert "damaged" in caplog.text
    stages.save("examples", {"x": torch.ones(2)})
    assert stages.load("examples").tensors["x"].tolist() == [1, 1]


def test_every_changed_byte_of_the_contents_is_noticed(stages):
    stages.save("examples", {"x": torch.rand(16), "fooled": torch.tensor([True] * 3)}, {"seconds": 3})
    path = only_file(stages)
    whole = path.read_bytes()
    contents = 16 * 4 + 3
    for position in range(len(whole) - contents, len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert stages.load("examples") is None, position


@pytest.mark.parametrize("content", [b"not a safetensors file at all", b"\x00" * 4096])
def test_a_file_of_something_else_counts_as_not_kept(stages, content):
    stages.save("examples", {"x": torch.rand(4)})
    only_file(stages).write_bytes(content)
    assert stages.load("examples") is None


def test_a_full_disk_says_what_was_needed_and_leaves_nothing_behind(stages, files_of_at_most):
    stages.save("plan", {}, {"steps": 3})
    large = {"x": torch.zeros(1_000_000)}
    with files_of_at_most(100_000), pytest.raises(StageNotKept) as caught:
        stages.save("sample model", large)
    error = caught.value
    assert isinstance(error, OSError)
    assert (error.stage, error.errno) == ("sample model", errno.EFBIG)
    assert 4_000_000 < error.needed < 4_001_000
    assert error.free > 0
    for part in ("'sample model'", f"{stages.folder}: File too large;", "takes 3.8 MiB", "MiB are free", "resumes"):
        assert part in str(error), part
    assert stages.names() == ["plan"]
    assert [path.name for path in stages.folder.iterdir()] == ["plan.safetensors"]
    stages.save("sample model", large)
    assert stages.names() == ["plan", "sample model"]


def test_a_folder_that_cannot_be_made_is_told_the_same_way(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StageNotKept, match="Not a directory") as caught:
        Stages(tmp_path / "file" / "stages").save("plan", {}, {"steps": 3})
    assert caught.value.errno == errno.ENOTDIR


WRITER = """
import sys, torch
from pathlib import Path
from defenses.stages import Stages
stages = Stages(Path(sys.argv[1]))
for turn in range(10_000):
    stages.save("weights", {"w": torch.full((2_000_000,), float(turn))}, {"turn": turn})
    print(turn, flush=True)
"""


def test_a_writer_that_is_killed_leaves_a_whole_stage(stages):
    for delay in (0.004, 0.017):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(stages.folder)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        assert writer.stdout.readline() == "0\n"
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        kept = stages.load("weights")
        assert (kept.tensors["w"] == kept.values["turn"]).all()
    stages.save("after", {"w": torch.zeros(1)})
    assert sorted(path.name for path in stages.folder.iterdir()) == ["after.safetensors", "weights.safetensors"]

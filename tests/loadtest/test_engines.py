import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from loadtest import engines
from loadtest.ceiling import products_per_second, torch_products_per_second
from loadtest.compute import in_turns
from loadtest.cost import multiply_adds
from model_store import Draft, Store
from service.engines import pruned

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="There is a GPU here.")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here.")


@pytest.fixture
def measure(store, tmp_path):
    """Run the script on the protected digits, a few turns in one thread."""

    def run(*arguments: str, root: Path = store) -> Result:
        command = typer.Typer()
        command.command()(engines.main)
        given = ["digits@2", "--store", str(root), "--turns", "5", "--threads", "1", "--output", str(tmp_path / "it")]
        return CliRunner().invoke(command, [*given, "--device", "cpu", *arguments])

    return run


@pytest.fixture
def written(tmp_path):
    """What the script wrote."""
    return lambda: json.loads((tmp_path / "it").read_text())


def test_both_engines_are_measured_beside_the_bare_classifier(store, measure, written):
    done = measure("--batch", "1", "--batch", "4", "--p50", "60000", "--rate", "0.001")
    assert done.exit_code == 0, done.output
    result = written()
    rows = {(row["version"], row["engine"], row["batch"]): row for row in result["rows"]}
    protected = "coophance @2"
    assert set(rows) == {(v, e, b) for v in ("bare", protected) for e in ("onnx", "torch") for b in (1, 4)}
    fetched = {"bare": 1, protected: 2}
    models = Store.open(store / "models")
    for (version, engine, batch), row in rows.items():
        path = models.fetch("digits", fetched[version]).folder / "model.onnx"
        outputs = ["logits"] if version == "bare" else ["logits", "score", "alert"]
        work = row["images_per_second"] * multiply_adds(pruned(path, outputs))
        assert row["multiply_adds_per_second"] == pytest.approx(work)
        assert row["of_ceiling"] == pytest.approx(work / row["ceiling"])
        assert 0 < row["of_ceiling"] < 1
        assert 0 < row["p50_milliseconds"] <= row["p99_milliseconds"]
        assert row["over_bare"] == row["p50_milliseconds"] / rows["bare", engine, batch]["p50_milliseconds"]
        assert (row["precision"], row["arithmetic"], row["device_bytes"]) == ("auto", "fp32", None)
    assert rows[protected, "torch", 1]["platform"] == "pytorch_safetensors"
    assert len({row["ceiling"] for row in rows.values()}) == 2, "one ceiling for each engine"
    for version, row in result["best"].items():
        assert row["images_per_second"] == max(r["images_per_second"] for k, r in rows.items() if k[0] == version)
    assert result["refused"] == []
    assert [verdict["passed"] for verdict in result["verdicts"]] == [True, True]
    assert "loadtest.engines" in result["command"]
    assert result["libraries"]["torch"] == torch.__version__
    assert result["machine"]["device"] == result["machine"]["processor"]
    table = [line for line in done.output.splitlines() if line.startswith("| ")]
    assert len(table) == (2 + len(rows)) + (2 + 2) + (2 + 2)
    assert len({line.count(" | ") for line in table[: 2 + len(rows)]}) == 1


@gpu
def test_a_gpu_is_measured_in_every_precision_of_torch(measure, written):
    precisions = [word for name in ("auto", "fp32", "bf16", "fp16") for word in ("--precision", name)]
    done = measure("--device", "auto", "--engine", "torch", "--batch", "1", "--batch", "5", *precisions)
    assert done.exit_code == 0, done.output
    rows = written()["rows"]
    assert len(rows) == 2 * 2 * 4
    assert {row["arithmetic"] for row in rows} == {"fp32", "bf16", "fp16"}
    assert all(0 < row["of_ceiling"] < 1 and row["device_bytes"] >= 0 for row in rows)
    assert sum(row["device_bytes"] for row in rows) > 0
    assert written()["machine"]["device"] == torch.cuda.get_device_name()


def test_a_missed_aim_ends_it_with_1(measure, written):
    done = measure("--engine", "onnx", "--batch", "1", "--p50", "0", "--rate", "1e12")
    assert done.exit_code == 1
    assert [verdict["passed"] for verdict in written()["verdicts"]] == [False, False]
    assert done.output.count("| missed |") == 2


def test_what_an_engine_does_not_take_is_listed_and_the_rest_measured(measure, written):
    done = measure("--batch", "2", "--precision", "fp32", "--precision", "bf16")
    assert done.exit_code == 0, done.output
    result = written()
    computed = {(row["engine"], row["arithmetic"]) for row in result["rows"]}
    assert computed == {("onnx", "fp32"), ("torch", "fp32"), ("torch", "bf16")}
    reason = "Asked for the engine onnx, but it computes a graph as it is and not in bf16."
    assert result["refused"] == [
        {"version": None, "engine": "onnx", "precision": "bf16", "batch": None, "reason": reason}
    ]
    assert f"- every version, onnx, bf16: {reason}" in done.output


def test_a_version_that_an_engine_cannot_run_is_listed_by_name(store, measure, written, tmp_path):
    again, payload = tmp_path / "store", tmp_path / "payload"
    shutil.copytree(store, again)
    models = Store.open(again / "models")
    fetched = models.fetch("digits", 2)
    payload.mkdir()
    shutil.copy(fetched.folder / "model.onnx", payload)
    draft = Draft.model_validate(fetched.manifest.model_dump(include=set(Draft.model_fields)))
    models.publish("digits", draft, payload)
    done = measure("digits@3", "--engine", "torch", "--batch", "2", "--batch", "3", "--rate", "1e-3", root=again)
    assert done.exit_code == 1, "of the version without a checkpoint nothing is known"
    result = written()
    assert {(row["version"], row["batch"]) for row in result["rows"]} == set(product(("bare", "coophance @2"), (2, 3)))
    refused = [(refusal["version"], refusal["batch"]) for refusal in result["refused"]]
    assert refused == [("coophance @3", 2), ("coophance @3", 3)]
    reason = "Asked to run digits@3 with the engine torch, but it holds no checkpoint."
    assert f"- coophance @3, torch, auto, batch 2, 3: {reason}" in done.output
    assert [(verdict["version"], verdict["passed"]) for verdict in result["verdicts"]] == [
        ("coophance @2", True),
        ("coophance @3", False),
    ]
    assert result["verdicts"][1]["measured"] is None


@no_gpu
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "cuda"], "Asked to run on cuda, but torch finds no such device here."),
        (["--engine", "onnx", "--precision", "fp16"], "Nothing could be measured. Asked for the engine onnx, but it"),
        (["--batch", "8", "--batch", "32", "--p50", "1"], "Expected 1 among the batches, since --p50 is of one image"),
    ],
)
def test_what_cannot_be_measured_is_told(measure, tmp_path, arguments, sentence):
    done = measure(*arguments)
    assert done.exit_code == 1
    assert sentence in done.output
    assert "Traceback" not in done.output


def test_a_version_without_a_defense_is_refused(measure):
    done = measure("digits@1")
    assert done.exit_code == 1
    assert "digits@1 has no defense" in done.output


def test_calls_take_turns_and_are_timed_after_some_that_are_not():
    order = []
    taken = in_turns({name: lambda name=name: order.append(name) for name in ("one", "other")}, 4)
    assert order[:4] == ["one", "other", "one", "other"]
    assert {name: len(times) for name, times in taken.items()} == {"one": 4, "other": 4}
    assert order.count("one") > 4
    assert all(clock >= 0 and cpu >= 0 for times in taken.values() for clock, cpu in times)


def test_the_ceiling_is_of_the_same_kind_on_either_engine():
    before = torch.get_float32_matmul_precision()
    one, other = products_per_second(1), torch_products_per_second(torch.device("cpu"), "fp32")
    assert one > 1e8
    assert other > 1e8
    assert torch.get_float32_matmul_precision() == before

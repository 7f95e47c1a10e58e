import json
import re
import sys
from functools import partial

import numpy as np
import onnx
import pytest
import typer
from typer.testing import CliRunner

from defenses.coophance import Regulator, RegulatorConfig
from loadtest import bench, cost_model
from loadtest.art_defenses import art_preprocessors
from loadtest.bench_page import page
from loadtest.ceiling import Ceiling, measure_ceiling
from loadtest.compute import with_ratios
from loadtest.contenders import Contender, gateways
from loadtest.cost import costs, total, weight_bytes
from loadtest.cost_model import convolutions, regulator_table
from loadtest.environments import Environment, PeerUnavailable
from loadtest.messages import png_message, raw_message
from loadtest.own_cost import echo
from loadtest.peers.classifier import Classifier
from loadtest.racing import race
from loadtest.rivals import REQUIREMENTS, environment_of, rivals
from loadtest.serving import free_port, running
from model_store import Store
from service.engines import pruned


@pytest.fixture
def versions(store):
    models = Store.open(store / "models")
    return [models.fetch("digits", version).folder / "model.onnx" for version in (1, 2)]


def test_a_graph_costs_what_its_layers_do(versions):
    bare = total(costs(onnx.load(versions[0])))
    assert bare.multiply_adds == 4 * 9 * 64 + 4 * 64 * 10
    assert weight_bytes(versions[0]) >= 4 * (4 * 9 + 4 + 4 * 64 * 10 + 10)
    # The image, the convolution's maps, and the product's features and logits, four bytes each.
    assert bare.activation_bytes == 4 * (256 + 4 * 64 + 4 * 64 + 10)


def test_a_protected_graph_costs_two_passes_and_its_purifier(versions):
    bare = total(costs(onnx.load(versions[0]))).multiply_adds
    parts = costs(pruned(versions[1], ["logits", "score", "alert", "undefended_logits"]))
    assert parts["raw"].multiply_adds == parts["purified"].multiply_adds == bare
    assert parts["purifier"].multiply_adds > 0
    assert parts["detector"].multiply_adds == 4 * 64 * 10
    without_bare = costs(pruned(versions[1], ["logits", "score", "alert"]))
    assert without_bare["raw"].multiply_adds == 4 * 9 * 64, "the raw pass ends at the layer that is inspected"


def test_a_regulator_grows_with_its_image(versions):
    regulator = Regulator(RegulatorConfig((1, 16, 16), channels=(4, 8), skip_channels=(2, 2), output="residual"))
    assert (
        convolutions(regulator.eval(), (1, 16, 16))
        == costs(pruned(versions[1], ["purified"]))["purifier"].multiply_adds
    )
    counts = [int(line.split("|")[2].replace(",", "")) for line in regulator_table((32, 64)).splitlines()[2:]]
    assert counts[1] == 4 * counts[0]


def test_a_version_is_told_by_its_parts(store):
    command = typer.Typer()
    command.command()(cost_model.main)
    told = CliRunner().invoke(command, ["digits@2", "--store", str(store)])
    assert told.exit_code == 0, told.output
    assert "| bare classifier | 4,864 | 1.00 |" in told.output
    assert re.search(r"\| 512x28x28 \| 1000 \| 5x5 \| 12,800 \| 1,531\.2 \| 48\.8 \| 24\.4 \|", told.output)
    undefended = CliRunner().invoke(command, ["digits@1", "--store", str(store)])
    assert undefended.exit_code == 1
    assert "digits@1 has no defense" in undefended.output


def test_the_floor_is_the_longer_of_two_limits():
    ceiling = Ceiling(multiply_adds=1e9, bytes=1e8)
    assert ceiling.floor(2e9, 1e8) == 2
    assert ceiling.floor(1e9, 3e8) == 3
    measured = measure_ceiling(threads=1)
    assert measured.multiply_adds > 1e8
    assert measured.bytes > 1e8


def test_a_race_measures_who_runs_and_names_who_does_not(store, image_set):
    message = partial(png_message, path="/")
    silent = partial(running, [sys.executable, "-c", "print('no model'); raise SystemExit(3)"], free_port(), ready="/")
    gateway = gateways(store, "gateway", "digits", 1)[0]
    contenders = [
        Contender("echo", "alone", "PNG", message, echo),
        Contender("silent", "alone", "PNG", message, silent),
        gateway,
        Contender("lost", gateway.process, "PNG", partial(png_message, path="/nowhere"), gateway.open),
    ]
    told = []
    loads = dict.fromkeys(contenders, (1, 4))
    raced = race(loads, image_set.clean[:4], seconds=0.2, rounds=1, told=told.append)
    assert {(run["server"], run["concurrency"]) for run in raced["runs"]} == {
        (server, concurrency) for server in ("echo", "gateway") for concurrency in (1, 4)
    }
    assert all(run["statuses"] == {"200": run["requests"]} for run in raced["runs"])
    assert all(run["memory_bytes"] > 1_000_000 and run["server_cpu_milliseconds"] > 0 for run in raced["runs"])
    assert set(raced["overheads"]) == {"echo, alone", "silent, alone", gateway.started, f"lost, {gateway.process}"}
    assert all(0 < seconds < 60 for seconds in raced["overheads"].values())
    assert set(raced["failures"]) == {"silent, alone", f"lost, PNG, {gateway.process}"}
    assert raced["failures"]["silent, alone"].startswith("In round 1 of 1: ")
    assert "ended with status 3" in raced["failures"]["silent, alone"]
    assert "no model" in raced["failures"]["silent, alone"]
    assert "404" in raced["failures"][f"lost, PNG, {gateway.process}"]


def test_every_rival_has_settings_with_and_without_company(store, tmp_path, image_set):
    for server in REQUIREMENTS:
        contenders = rivals(server, environment_of(server, tmp_path), tmp_path / "model.onnx", 32)
        assert len({contender.process for contender in contenders}) >= 3
        assert len({contender.name for contender in contenders}) == len(contenders)
        assert any("no batches" in contender.setting for contender in contenders)
        assert any("no batches" not in contender.setting for contender in contenders)
        assert {contender.raw for contender in contenders} == {False, True}
        pixels = image_set.clean[0].tobytes()
        assert all((pixels in one.message(image_set.clean[0]).content) == one.raw for one in contenders)
    with pytest.raises(ValueError, match="litserve"):
        environment_of("another", tmp_path)


def test_a_peer_answers_raw_pixels_as_it_does_a_png(versions, image_set, monkeypatch):
    monkeypatch.setenv("BENCH_MODEL", str(versions[0]))
    monkeypatch.setenv("BENCH_THREADS", "1")
    classifier, images = Classifier(), image_set.clean[:8]
    bodies = [[make(image, "/") for image in images] for make in (png_message, raw_message)]
    pngs, raws = (
        np.stack([classifier.pixels(message.content, dict(message.headers)["Content-Type"]) for message in messages])
        for messages in bodies
    )
    assert np.array_equal(pngs, images)
    assert np.array_equal(raws, images)
    probabilities = classifier.predict(raws)
    assert np.allclose(probabilities.sum(1), 1)
    assert [classifier.told(row)["class_index"] for row in probabilities] == probabilities.argmax(1).tolist()
    with pytest.raises(ValueError, match="reshape"):
        classifier.raw(bodies[1][0].content[:-1])


def test_a_graph_keeps_its_limit_by_the_time_that_is_compared():
    times = {
        "bare": {"milliseconds": 10.0, "cpu_milliseconds": 10.0},
        "protected": {"milliseconds": 33.0, "cpu_milliseconds": 34.0},
    }
    for compared, kept in (("milliseconds", True), ("cpu_milliseconds", False)):
        rows = with_ratios(times, compared, {"protected": 3.0}, dict.fromkeys(times, 5.0))
        assert rows["protected"]["limit"] == pytest.approx(3.3)
        assert (rows["protected"]["ratio"] <= 3.3, rows["protected"]["kept"]) == (kept, kept)
        assert rows["protected"]["over_floor"] == times["protected"][compared] / 5
        assert "kept" not in rows["bare"]


def test_what_cannot_be_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    environment = Environment(tmp_path, "nothing", ["nothing-of-the-kind==1.0"])
    with pytest.raises(PeerUnavailable, match=r"nothing could not be installed: .*nothing-of-the-kind"):
        environment.install()


@pytest.mark.parametrize("name", ["SpatialSmoothing", "JpegCompression", "FeatureSqueezing"])
def test_arts_defenses_change_images_and_keep_their_range(name):
    x = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    prepared = art_preprocessors()[name](x)
    assert prepared.shape == x.shape
    assert 0 <= prepared.min() <= prepared.max() <= 1
    assert not np.allclose(prepared, x)


def test_the_bench_writes_what_it_measured(store, images_file, tmp_path):
    command = typer.Typer()
    command.command()(bench.main)
    arguments = ["--store", str(store), "--images", str(images_file), "--output", str(tmp_path), "--turns", "3"]
    done = CliRunner().invoke(command, ["digits@2", "--phase", "compute", *arguments])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["phases"]["compute"]) == {"coophance @2, 1 thread", "coophance @2, 2 threads"}
    compared = result["phases"]["compute"]["coophance @2, 2 threads"]
    assert (compared["threads"], compared["compared"]) == (2, "milliseconds")
    row = compared["batches"]["32"]["protected"]
    assert row["ratio"] == row["milliseconds"] / compared["batches"]["32"]["bare"]["milliseconds"]
    assert row["limit"] == pytest.approx(1.1 * compared["allowed"]["protected"])
    compared = result["phases"]["compute"]["coophance @2, 1 thread"]
    assert set(compared["batches"]) == {"1", "4", "8", "16", "32"}
    assert compared["multiply_adds"]["protected"] == sum(
        part["multiply_adds"] for part in compared["parts"]["protected"].values()
    )
    assert (
        compared["allowed"]["protected"] == compared["multiply_adds"]["protected"] / compared["multiply_adds"]["bare"]
    )
    assert compared["batches"]["32"]["bare"]["ratio"] == 1
    assert result["machine"]["cpus"] >= 1
    assert any(line.startswith("onnxruntime") for line in result["installed"])
    shown = (tmp_path / "bench.html").read_text()
    assert "<h2>Computation</h2>" in shown
    assert len(re.findall(r"<td>(?:not )?kept</td>", shown)) == 2 * 5 * 2, "threads, batches, and the graphs not bare"
    undefended = CliRunner().invoke(command, ["digits@1", "--phase", "compute", *arguments])
    assert undefended.exit_code == 1
    assert "digits@1 has no defense" in undefended.output


def test_the_page_shows_every_phase():
    row = {"server": "A & B", "concurrency": 1, "setting": "PNG", "per_second": 100.0, "rounds": [90.0, 100.0, 120.0]}
    row |= {"p50": 1.0, "p90": 2.0, "p99": 3.0, "server_cpu_milliseconds": 0.5}
    ratio = {"server": "A & B", "against": "C", "concurrency": 1, "ratio": 2.0, "least": 1.5, "most": 2.5}
    ratio |= {"p99_ratio": 0.7, "lower_p99": True}
    parts = ("gateway", "echo", "decode", "engine")
    names = ["gateway_p50", "echo_p50", "decode", "engine", "ratio", "cpu_ratio"]
    names += [f"{part}_cpu_milliseconds" for part in parts]
    result = {
        **{"command": "python -m loadtest.bench", "started": "2026-01-01T00:00:00+00:00"},
        "machine": {"processor": "P", "cpus": 2},
        "phases": {
            "servers": {
                **{"settings_tried": 9, "trial_seconds": 0.5, "seconds": 5.0, "rounds": 3},
                "best": {"PNG": [row, {**row, "server": "C"}], "any": [{**row, "setting": "raw pixels"}]},
                "ratios": {"PNG": [ratio], "any": []},
                "failures": {"D": "it <did> not start"},
            },
            "art": {"1": {"bare": {"cpu_milliseconds": 1.0, "over_bare": 1.0}}},
            "gateway": {"bare": {**dict.fromkeys(names, 1.25), "stages": {"decode": 0.07, "encode": 0.02}}},
        },
    }
    shown = page(result)
    assert "A &amp; B" in shown
    assert "it &lt;did&gt; not start" in shown
    assert shown.count('class="plot"') == 2
    assert shown.index("Everyone is sent PNGs") < shown.index("C</td>") < shown.index("what is best for it")
    assert shown.index("what is best for it") < shown.index("<td>raw pixels</td>")
    assert shown.count("<h2>") == 3
    assert 'bare: decode <data value="0.07">0.07</data>, encode <data value="0.02">0.02</data></li>' in shown

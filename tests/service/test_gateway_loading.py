"""What the gateway takes into service, and what it refuses by name while the rest is served."""

import asyncio
import shutil
import sqlite3
import threading
from pathlib import Path

import onnx
import pytest

from model_store import SERVING, Draft, InputSpec, Store
from service.engines import DeviceUnavailable
from service.repository import Repository
from service.served import ServedModel


@pytest.fixture
def own_store(store, tmp_path) -> Path:
    """A copy of the store that a test may damage: digits, bare and fragile."""
    root = tmp_path / "store"
    for name in ("digits", "bare", "fragile"):
        shutil.copytree(store / "models" / name, root / "models" / name)
    return root


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def publish_files(root: Path, name: str, labels: int = 4, shape=(1, 16, 16), **files: bytes) -> None:
    folder = root.parent / f"{name}-files"
    folder.mkdir()
    for stem, content in files.items():
        (folder / f"{stem}.onnx").write_bytes(content)
    mode = "L" if shape[0] == 1 else "RGB"
    draft = Draft(
        kind="classifier", input=InputSpec(shape=shape, mode=mode), labels=tuple(str(n) for n in range(labels))
    )
    models = Store.open(root / "models")
    models.set_alias(name, SERVING, models.publish(name, draft, folder).version)


def graph_of(root: Path, name: str) -> bytes:
    return (Store.open(root / "models").fetch(name).folder / "model.onnx").read_bytes()


def a_flipped_byte(root: Path) -> str:
    flip(root / "models" / "bare" / "1" / "model.onnx")
    return "Model 'bare' version 1 is corrupt: 'model.onnx' should be of the SHA-256"


def a_flipped_byte_in_the_manifest(root: Path) -> str:
    flip(root / "models" / "bare" / "1" / "manifest.json")
    return "Model 'bare' version 1 is corrupt: 'manifest.json' should be of the SHA-256"


def a_missing_graph(root: Path) -> str:
    (root / "models" / "bare" / "1" / "model.onnx").unlink()
    return "Model 'bare' version 1 is corrupt: 'model.onnx' should be a file, but is missing."


def no_alias(root: Path) -> str:
    (root / "models" / "bare" / "aliases.json").unlink()
    return "Model 'bare' has no alias 'serving'"


def republished(root: Path, graph: bytes, **how: object) -> None:
    shutil.rmtree(root / "models" / "bare")
    publish_files(root, "bare", model=graph, **how)


def no_graph_published(root: Path) -> str:
    shutil.rmtree(root / "models" / "bare")
    publish_files(root, "bare", other=b"")
    return "model.onnx cannot be run: "


def no_onnx(root: Path) -> str:
    republished(root, b"this is no graph")
    return "model.onnx cannot be run: "


def an_empty_graph(root: Path) -> str:
    republished(root, b"")
    return "model.onnx cannot be run: "


def an_operator_that_the_runtime_lacks(root: Path) -> str:
    model = onnx.load_from_string(graph_of(root, "bare"))
    model.graph.node[0].op_type = "Nonsense"
    republished(root, model.SerializeToString())
    return "Nonsense"


def another_input_shape(root: Path) -> str:
    republished(root, graph_of(root, "bare"), shape=(3, 16, 16))
    return "model.onnx cannot be run: "


def other_labels(root: Path) -> str:
    republished(root, graph_of(root, "bare"), labels=3)
    return "model.onnx cannot be run: expected logits of shape (1, 3) for its labels, got (1, 4)."


@pytest.mark.parametrize(
    "damage",
    [
        a_flipped_byte,
        a_flipped_byte_in_the_manifest,
        a_missing_graph,
        no_alias,
        no_graph_published,
        no_onnx,
        an_empty_graph,
        an_operator_that_the_runtime_lacks,
        another_input_shape,
        other_labels,
    ],
    ids=lambda damage: damage.__name__.replace("_", " "),
)
async def test_a_version_that_is_not_sound_is_refused_by_name_and_the_rest_is_served(
    gateway, own_store, dark, damage, caplog
):
    told = damage(own_store)
    async with gateway(store=own_store, models=()) as visitor:
        index = {entry["name"]: entry for entry in (await visitor.http.post("/v2/repository/index")).json()}
        assert index["bare"]["state"] == "UNAVAILABLE"
        assert told in index["bare"]["reason"]
        assert [index[name]["state"] for name in ("digits", "fragile")] == ["READY", "READY"]
        for answer in (
            await visitor.infer("bare", dark(1)),
            await visitor.predict("bare", b""),
            await visitor.http.get("/v2/models/bare"),
            await visitor.http.get("/v2/models/bare/ready"),
        ):
            assert answer.status_code == 503
            assert list(answer.json()) == ["error"]
            assert answer.json()["error"].startswith("Model bare is not available: ")
            assert told in answer.json()["error"]
        assert (await visitor.infer("digits", dark(1))).status_code == 200
        listed = [model["name"] for model in (await visitor.http.get("/v1/models")).json()["models"]]
        assert listed == ["digits", "fragile"]
    assert "Model bare is not served: " in caplog.text


@pytest.mark.parametrize("made", [True, False])
async def test_an_empty_store_is_ready_and_has_nothing(gateway, tmp_path, made, dark):
    root = tmp_path / "empty"
    if made:
        (root / "models").mkdir(parents=True)
    async with gateway(store=root, models=()) as visitor:
        assert (await visitor.http.post("/v2/repository/index")).json() == []
        assert (await visitor.http.get("/v1/models")).json() == {"models": []}
        answer = await visitor.infer("digits", dark(1))
        assert (answer.status_code, answer.json()) == (
            404,
            {"error": "No model digits is in service; there are: none."},
        )


async def test_only_the_named_models_are_served_in_the_named_versions(gateway, dark):
    async with gateway(models="digits@1, fragile, letters, digits@9, No!") as visitor:
        index = (await visitor.http.post("/v2/repository/index")).json()
        states = [(entry["name"], entry["version"], entry["state"]) for entry in index]
        assert states == [
            ("digits", "1", "READY"),
            ("fragile", "1", "READY"),
            ("No!", "", "UNAVAILABLE"),
            ("digits", "9", "UNAVAILABLE"),
            ("letters", "", "UNAVAILABLE"),
        ]
        assert (await visitor.outputs("digits", dark(1)))["verdict"] == ["undefended"]
        assert (await visitor.http.get("/v2/models/bare")).status_code == 404
        assert (await visitor.http.get("/v2/models/letters")).status_code == 503


async def test_every_reference_that_is_broken_is_told(gateway, tmp_path, store):
    root = tmp_path / "store"
    shutil.copytree(store, root)
    flip(root / "models" / "digits" / "2" / "model.onnx")
    async with gateway(store=root, models="digits@1,digits,digits@x") as visitor:
        index = (await visitor.http.post("/v2/repository/index")).json()
        told = {(entry["version"], entry["state"]): entry["reason"] for entry in index}
        assert set(told) == {("1", "READY"), ("2", "UNAVAILABLE"), ("", "UNAVAILABLE")}
        assert "version 2 is corrupt" in told["2", "UNAVAILABLE"]
        assert "x" in told["", "UNAVAILABLE"]
        assert (await visitor.http.get("/v2/models/digits/versions/2")).status_code == 503


async def test_a_gateway_without_any_of_its_models_is_not_ready(gateway, tmp_path, store):
    root = tmp_path / "store"
    shutil.copytree(store / "models" / "bare", root / "models" / "bare")
    flip(root / "models" / "bare" / "1" / "model.onnx")
    async with gateway(ready=False, store=root, models=()) as visitor:
        for _ in range(200):
            index = (await visitor.http.post("/v2/repository/index")).json()
            if index:
                break
            await asyncio.sleep(0.05)
        assert index[0]["state"] == "UNAVAILABLE"
        assert (await visitor.http.get("/v2/health/ready")).status_code == 503
        assert (await visitor.http.get("/v2/health/live")).status_code == 200


async def test_another_version_is_never_given_for_the_one_that_is_broken(gateway, dark):
    async with gateway(models="digits@9,digits@1") as visitor:
        assert (await visitor.infer("digits", dark(1))).status_code == 503
        for version, status in (("9", 503), ("1", 200), ("2", 404)):
            answer = await visitor.http.get(f"/v2/models/digits/versions/{version}")
            assert answer.status_code == status


async def test_two_versions_of_a_model_serve_beside_each_other(gateway, dark):
    async with gateway(models="digits@2,digits@1") as visitor:
        verdicts = {}
        for path in ("", "/versions/1", "/versions/2"):
            request = visitor.request_of(dark(1), ["verdict"])
            answer = await visitor.http.post(f"/v2/models/digits{path}/infer", **request)
            verdicts[path] = (answer.json()["model_version"], *visitor.read(answer)["verdict"])
        models = (await visitor.http.get("/v1/models")).json()["models"]
    assert verdicts == {"": ("2", "accepted"), "/versions/1": ("1", "undefended"), "/versions/2": ("2", "accepted")}
    assert [(model["version"], model["default"]) for model in models] == [("1", False), ("2", True)]


async def test_a_default_that_is_broken_hides_no_other_version_and_no_other_model(gateway, tmp_path, store):
    root = tmp_path / "store"
    shutil.copytree(store, root)
    flip(root / "models" / "digits" / "2" / "model.onnx")
    async with gateway(store=root, models="digits@2,digits@1,bare") as visitor:
        answer = await visitor.http.get("/v1/models")
        assert answer.status_code == 200, answer.text
        listed = [(model["name"], model["version"], model["default"]) for model in answer.json()["models"]]
        assert listed == [("bare", "1", True), ("digits", "1", False)]
        assert (await visitor.http.get("/v2/models/digits")).status_code == 503


async def test_until_the_models_are_loaded_the_gateway_lives_but_is_not_ready(gateway, dark):
    async with gateway(ready=False, models=("slow",) * 5 + ("digits",)) as visitor:
        ready = await visitor.http.get("/v2/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False})
        assert (await visitor.http.get("/v2/health/live")).status_code == 200
        early = await visitor.infer("digits", dark(1))
        assert early.status_code == 503
        assert early.json() == {"error": "Model digits is not available: the models are still being loaded."}
        await visitor.until_ready()
        assert (await visitor.infer("digits", dark(1))).status_code == 200


async def test_a_version_that_is_named_twice_is_served_once(gateway, dark):
    async with gateway(models="digits,digits@2,digits@serving") as visitor:
        assert len((await visitor.http.get("/v1/models")).json()["models"]) == 1
        assert (await visitor.infer("digits", dark(1))).status_code == 200
        assert [thread.name for thread in threading.enumerate()].count("model-digits") == 1


async def test_a_stop_leaves_nothing_running(gateway, bright):
    before = asyncio.all_tasks()
    async with gateway(models=()) as visitor:
        assert (await visitor.infer("digits", bright(1))).status_code == 200
        assert len(asyncio.all_tasks()) > len(before)
    assert asyncio.all_tasks() == before


async def test_a_stop_during_the_start_is_clean(gateway):
    async with gateway(ready=False, models=("slow", "digits")):
        await asyncio.sleep(0)


async def test_a_stop_during_the_start_waits_for_no_version(gateway, bright, monkeypatch, tmp_path):
    opened, go_on, read = [], threading.Event(), Repository._open

    def opening(repository: Repository, reference: str) -> ServedModel:
        opened.append(reference)
        if len(opened) > 1:
            assert go_on.wait(10)
        return read(repository, reference)

    monkeypatch.setattr(Repository, "_open", opening)
    try:
        async with asyncio.timeout(5), gateway(ready=False, models=("digits", "bare", "fragile", "slow")) as visitor:
            for _ in range(1000):
                if len(opened) == 2:
                    break
                await asyncio.sleep(0.005)
            answer = await visitor.infer("digits", bright(1))
            assert answer.status_code == 200, "what is loaded serves"
            assert (await visitor.infer("bare", bright(1))).status_code == 503
    finally:
        go_on.set()
    with sqlite3.connect(tmp_path / "alerts.db") as connection:
        rows = connection.execute("SELECT id FROM alerts").fetchall()
    connection.close()
    assert rows == [(answer.json()["parameters"]["alert_ids"],)]
    await asyncio.sleep(0.1)
    assert opened == ["digits", "bare"], "what was not begun is not loaded"


async def test_a_gateway_that_was_promised_a_gpu_does_not_start_without(gateway):
    with pytest.raises(DeviceUnavailable, match="Asked to run on cuda, but ONNX Runtime offers only CPU"):
        async with gateway(device="cuda"):
            pytest.skip("There is a GPU here.")

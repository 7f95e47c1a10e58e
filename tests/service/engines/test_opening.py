"""Which engine a version gets, what is served from torch, and what is refused by name."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from model_store import Store
from service.engines import DeviceUnavailable, EngineUnavailable, OnnxEngine, VersionUnsuitable
from service.engines.opening import OnnxSource, Preferred, check_engine, open_source
from service.engines.torch_engine import TorchCorrection, TorchEngine
from service.engines.torch_opening import TorchSource
from service.settings import Settings

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="There is a GPU here.")


@pytest.fixture
def opened(published_versions):
    """Open a version's source with some settings: ``opened(2, engine="torch")``."""

    def source(version: int, **given: object) -> OnnxSource | TorchSource:
        settings = Settings(store=published_versions, noise=False, **given)
        fetched = Store.open(published_versions / "models").fetch("digits", version)
        return open_source(fetched, fetched.folder / "model.onnx", fetched.folder / "correction.onnx", settings)

    return source


def test_a_processor_gets_onnx_runtime_unless_torch_is_asked_for(opened):
    for engine in ("auto", "onnx"):
        source = opened(3, engine=engine)
        assert isinstance(source.open(("logits",)), OnnxEngine)
        assert isinstance(source.open_correction(purified=True), OnnxEngine)
    source = opened(3, engine="torch")
    assert isinstance(source.open(("logits",)), TorchEngine)
    assert isinstance(source.open_correction(purified=True), TorchCorrection)


@pytest.mark.parametrize("version", [1, 2])
def test_a_published_version_gives_the_same_answers_either_way(opened, mixed, version):
    outputs = ("logits",) if version == 1 else ("logits", "score", "alert")
    one, other = (opened(version, engine=engine).open(outputs).run(mixed) for engine in ("onnx", "torch"))
    for name in outputs:
        np.testing.assert_allclose(other[name], one[name], atol=1e-4)


async def test_a_gateway_on_torch_serves_what_one_on_onnx_runtime_serves(gateway, published_versions, mixed):
    found = {}
    names = ("label", "class_index", "verdict", "logits", "score", "undefended_class_index", "purified")
    for times, engine in enumerate(("onnx", "torch"), 1):
        settings = {"engine": engine, "undefended_answer": True, "on_defense_error": "open", "max_batch": 16}
        async with gateway(store=published_versions, models="digits@3", **settings) as visitor:
            found[engine] = await visitor.outputs("digits", mixed, names)
            assert await visitor.alerts(times * found[engine]["verdict"].count("alert")), "kept from one to the other"
    one, other = found.values()
    assert set(one["verdict"]) == {"accepted", "alert"}
    assert other["verdict"] == one["verdict"]
    kept = np.array(one["verdict"]) == "accepted"
    np.testing.assert_allclose(other["score"], one["score"], atol=1e-4)
    np.testing.assert_allclose(other["logits"][kept], one["logits"][kept], atol=1e-4)
    np.testing.assert_allclose(other["purified"][kept], one["purified"][kept], atol=1e-4)
    # A correction follows a gradient, which a ReLU near its kink may turn.
    assert (np.abs(other["logits"] - one["logits"]).max(1) < 1e-2).mean() > 0.9
    assert other["undefended_class_index"].tolist() == one["undefended_class_index"].tolist()


@pytest.mark.parametrize(
    ("version", "engine", "platform"),
    [
        (1, "torch", "pytorch_onnx"),
        (2, "torch", "pytorch_safetensors"),
        (3, "torch", "pytorch_safetensors"),
        (3, "onnx", "onnxruntime_onnx"),
    ],
)
async def test_a_version_tells_what_computes_it_from_what(gateway, published_versions, version, engine, platform):
    async with gateway(store=published_versions, models=f"digits@{version}", engine=engine) as visitor:
        assert (await visitor.http.get("/v2/models/digits")).json()["platform"] == platform


@pytest.mark.parametrize(
    ("engine", "precision", "arithmetic"),
    [("onnx", "auto", "fp32"), ("onnx", "fp32", "fp32"), ("torch", "auto", "fp32"), ("torch", "bf16", "bf16")],
)
def test_an_engine_tells_what_it_multiplies_in(opened, engine, precision, arithmetic):
    assert opened(2, engine=engine, precision=precision).open(("logits",)).arithmetic == arithmetic


async def test_a_version_that_torch_cannot_run_is_refused_by_name_and_the_rest_is_served(
    gateway, published_versions, mixed
):
    async with gateway(store=published_versions, models="digits@2,digits@4", engine="torch") as visitor:
        index = {entry["version"]: entry for entry in (await visitor.http.post("/v2/repository/index")).json()}
        assert {version: entry["state"] for version, entry in index.items()} == {"2": "READY", "4": "UNAVAILABLE"}
        told = "Asked to run digits@4 with the engine torch, but it holds no checkpoint."
        assert index["4"]["reason"] == told
        refused = await visitor.http.get("/v2/models/digits/versions/4")
        assert refused.status_code == 503
        assert told in refused.json()["error"]
        assert (await visitor.infer("digits", mixed[:2])).status_code == 200


def test_what_the_store_says_of_a_version_is_said_of_its_engine(opened, published_versions, monkeypatch):
    def broken(*_: object) -> None:
        raise ValueError("The weights are those of another network.")

    monkeypatch.setattr("service.engines.torch_opening.load_defended", broken)
    with pytest.raises(VersionUnsuitable, match="digits@2 with the engine torch, but The weights are those of another"):
        opened(2, engine="torch")
    with pytest.raises(VersionUnsuitable, match="its checkpoint holds no correction"):
        opened(1, engine="torch").open_correction(purified=False)


def test_the_noise_of_two_processes_does_not_begin_alike(opened):
    torch.manual_seed(0)
    opened(1, engine="torch")
    assert torch.initial_seed() != 0
    first = torch.initial_seed()
    opened(1, engine="torch")
    assert torch.initial_seed() != first


def test_as_many_threads_are_used_as_the_settings_say(opened):
    before = torch.get_num_threads()
    try:
        opened(1, engine="torch", threads=before + 1)
        assert torch.get_num_threads() == before + 1
        opened(1, engine="torch", threads=0)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_precision_is_torchs_alone(opened, mixed):
    for engine in ("auto", "onnx"):
        with pytest.raises(EngineUnavailable, match="engine onnx, but it computes a graph as it is and not in bf16"):
            check_engine(Settings(engine=engine, precision="bf16"))
        with pytest.raises(VersionUnsuitable, match="digits@2 with the engine onnx"):
            opened(2, engine=engine, precision="bf16")
    check_engine(Settings(engine="onnx", precision="fp32"))
    check_engine(Settings(engine="torch", precision="bf16"))
    full, half = (
        opened(2, engine="torch", precision=precision).open(("undefended_logits",)).run(mixed)["undefended_logits"]
        for precision in ("fp32", "bf16")
    )
    assert 1e-6 < np.abs(full - half).max() < 0.05 * np.abs(full).max()


@no_gpu
def test_a_gpu_that_is_not_there_is_named_by_whoever_looked_for_it(opened, caplog):
    check_engine(Settings())
    with pytest.raises(EngineUnavailable, match="Asked for the engine torch, but torch finds no GPU here"):
        check_engine(Settings(engine="torch", device="cuda"))
    for engine in ("auto", "onnx"):
        with pytest.raises(DeviceUnavailable, match="ONNX Runtime offers only CPU"):
            check_engine(Settings(engine=engine, device="cuda"))
    with pytest.raises(EngineUnavailable):
        opened(2, engine="torch", device="cuda")
    with caplog.at_level("INFO", "portcullis"):
        assert isinstance(opened(2, engine="auto", device="cuda"), OnnxSource)
    assert "ONNX Runtime runs digits@2: Asked for the engine torch, but torch finds no GPU here." in caplog.text


def test_what_does_not_suit_the_preferred_engine_is_left_to_the_other(opened, caplog):
    class Unsuited:
        def open(self, outputs):
            raise VersionUnsuitable("digits@2", "torch", "it is too large")

        def open_correction(self, *, purified):
            raise VersionUnsuitable("digits@2", "torch", "it is too large")

    source = Preferred(Unsuited(), opened(2, engine="onnx"))
    with caplog.at_level("INFO", "portcullis"):
        assert isinstance(source.open(("logits",)), OnnxEngine)
    assert "it is too large" in caplog.text
    source = Preferred(opened(2, engine="torch"), opened(2, engine="onnx"))
    assert isinstance(source.open(("logits",)), TorchEngine)


def test_torch_that_is_not_installed_is_refused_before_anything_is_served(published_versions, tmp_path):
    environment = os.environ | {"PORTCULLIS_DATABASE": f"sqlite+aiosqlite:///{tmp_path / 'alerts.db'}"}
    program = "import sys; sys.modules['torch'] = None; from service.cli import app; app()"
    command = [sys.executable, "-c", program, "serve", "--engine", "torch", "--port", "0"]
    done = subprocess.run(
        [*command, "--store", str(published_versions)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, "the start failed"
    assert (
        "portcullis: Asked for the engine torch, but torch is not installed: pip install 'portcullis[fit]'."
        in done.stderr
    )

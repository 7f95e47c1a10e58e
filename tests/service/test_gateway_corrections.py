"""A version that corrects alerted images does so only where a client is told."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from defenses.onnx_export import save_graph
from model_store import SERVING, Draft, FalsePositiveRate, InputSpec, Store
from service.engines import OnnxEngine

LABELS = ("left", "middle", "right")
CORRECTED = 2

CORRECTION = """
<ir_version: 10, opset_import: ["": 18]>
correction (float[N, 1, 16, 16] purified, float[N, 3] undefended_logits) => (
    float[N, 3] logits, float[N, 1, 16, 16] corrected
) <float[1, 3] always = {0, 0, 9}, float nothing = {0}>
{ zeros = Mul(undefended_logits, nothing) logits = Add(zeros, always) corrected = Mul(purified, nothing) }
"""
"""Whatever was alerted is of the third class, and its purified image black."""


@pytest.fixture(scope="module")
def correcting(fragile_graph, tmp_path_factory) -> Path:
    """A store with one version of two graphs, which alerts of bright images."""
    root = tmp_path_factory.mktemp("correcting") / "store"
    store = Store.open(root / "models")
    draft = Draft(
        kind="nip",
        input=InputSpec(shape=(1, 16, 16), mode="L"),
        labels=LABELS,
        threshold=0.0,
        false_positive_rate=FalsePositiveRate(budget=0.05, calibrated_on=100, realised=0.04, evaluated_on=100),
    )
    with tempfile.TemporaryDirectory() as folder:
        save_graph(fragile_graph, Path(folder) / "model.onnx")
        save_graph(onnx.parser.parse_model(CORRECTION), Path(folder) / "correction.onnx")
        store.set_alias("corrected", SERVING, store.publish("corrected", draft, Path(folder)).version)
    return root


@pytest.fixture
def corrections(monkeypatch) -> list[int]:
    """How many images each correction was asked for, those of the start included."""
    asked: list[int] = []
    correct = OnnxEngine.correct

    def noted(engine: OnnxEngine, purified: np.ndarray, undefended_logits: np.ndarray) -> dict[str, np.ndarray]:
        asked.append(len(purified))
        return correct(engine, purified, undefended_logits)

    monkeypatch.setattr(OnnxEngine, "correct", noted)
    return asked


@pytest.fixture
def sent(dark, bright) -> np.ndarray:
    """Two images that are accepted and two that are alerted, and whose darkest third is not the third one."""
    pixels = np.concatenate([dark(2), bright(2)])
    pixels[:, 0, 0, :2] = 0
    pixels[2:, 0, 1:, :5] -= 60
    return pixels


def darkest(pixels: np.ndarray) -> list[int]:
    thirds = [pixels[:, 0, :, first:last].mean((1, 2)) for first, last in ((0, 5), (5, 11), (11, 16))]
    classes: list[int] = np.argmin(thirds, 0).tolist()
    return classes


async def test_a_client_that_is_told_of_an_alert_gets_the_corrected_answer(gateway, correcting, sent, corrections):
    assert CORRECTED not in darkest(sent)[2:]
    async with gateway(store=correcting, models=("corrected",), mode="flag") as visitor:
        corrections.clear()
        outputs = await visitor.outputs("corrected", sent, ["class_index", "verdict", "purified"])
        rows = await visitor.alerts(2)
    assert corrections == [2]
    assert outputs["verdict"] == ["accepted"] * 2 + ["alert"] * 2
    assert outputs["class_index"].tolist() == [*darkest(sent)[:2], CORRECTED, CORRECTED]
    assert not outputs["purified"][2:].any()
    assert [row["class_index"] for row in rows] == [CORRECTED] * 2


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
async def test_what_no_client_is_told_is_not_computed(gateway, correcting, sent, corrections, mode):
    given = {"store": correcting, "models": ("corrected",), "mode": mode, "undefended_answer": True}
    async with gateway(**given) as visitor:
        outputs = await visitor.outputs("corrected", sent, ["class_index", "verdict", "undefended_class_index"])
        rows = await visitor.alerts(2)
        changed = await visitor.metric("label_changes_total", model="corrected")
        counted = {
            label: await visitor.metric("alerts_total", **{"model": "corrected", "class": label}) for label in LABELS
        }
    assert corrections == []
    first, bare = darkest(sent), outputs["undefended_class_index"].tolist()
    told = bare if mode == "shadow" else [*first[:2], -1, -1]
    assert outputs["class_index"].tolist() == told
    assert outputs["verdict"] == (["accepted"] * 4 if mode == "shadow" else ["accepted"] * 2 + ["alert"] * 2)
    recorded = {row["index"]: row["class_index"] for row in rows}
    assert recorded == {2: first[2], 3: first[3]}, "an alert holds what the first graph says"
    assert {row["undefended_class_index"] for row in rows} == {bare[2], bare[3]}
    assert counted == {label: float(first[2:].count(index)) for index, label in enumerate(LABELS)}
    assert changed == sum(one != other for one, other in zip(first, bare, strict=True))

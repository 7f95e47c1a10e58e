"""P-values through the gateway: what clients and operators are told, and which calibration is refused."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from model_store import SERVING, Store
from service.p_values import CalibrationScores

THIRDS = ("left", "middle", "right")


async def test_a_p_value_says_how_many_calibration_images_score_as_high(gateway, calibration_scores, dark, bright):
    pixels = np.concatenate([dark(7, seed=1), bright(1)])
    async with gateway(disclose="all") as visitor:
        outputs = await visitor.outputs("digits", pixels, ["score", "p_value"])
    as_high = (calibration_scores[None] >= outputs["score"][:, None]).sum(1)
    np.testing.assert_allclose(outputs["p_value"], (1 + as_high) / 100, rtol=1e-6)
    assert len(set(outputs["p_value"])) > 4
    assert outputs["p_value"][7] == np.float32(0.01)


@pytest.mark.parametrize("mode", ["flag", "enforce", "shadow"])
async def test_score_p_value_and_alert_row_agree_in_every_mode(gateway, dark, bright, file_of, mode):
    pixels = np.concatenate([dark(2), bright(2)])
    async with gateway(disclose="all", mode=mode) as visitor:
        outputs = await visitor.outputs("digits", pixels, ["score", "p_value"])
        predictions = await visitor.predictions("digits", *map(file_of, pixels))
        rows = await visitor.alerts(4)
        within = await visitor.alerts(4, maximum_p_value=0.01)
    for row, prediction in enumerate(predictions):
        assert prediction["score"] == pytest.approx(float(outputs["score"][row]), abs=1e-4)
        assert prediction["p_value"] == pytest.approx(float(outputs["p_value"][row]), abs=0.011)
    assert [prediction["p_value"] for prediction in predictions[2:]] == [0.01, 0.01]
    assert [row["p_value"] for row in rows] == [0.01] * 4
    assert within == rows


async def test_a_version_without_calibration_scores_offers_no_p_value(gateway, dark, bright, file_of):
    bright_enough = bright(1)
    bright_enough[:, 0, 0, :2] = 0
    async with gateway(models=("fragile", "bare", "digits@1"), disclose="all") as visitor:
        for name in ("fragile", "bare", "digits"):
            offered = [output["name"] for output in (await visitor.http.get(f"/v2/models/{name}")).json()["outputs"]]
            assert "p_value" not in offered
            answer = await visitor.infer(name, dark(1), ["p_value"])
            assert answer.status_code == 400
            assert answer.json()["error"] == (f"No output 'p_value' is computed here; there are {', '.join(offered)}.")
            (prediction,) = await visitor.predictions(name, file_of(bright_enough[0]))
            assert prediction["p_value"] is None
        assert prediction["verdict"] == "undefended"
        (row,) = await visitor.alerts(1)
        await visitor.alerts(0, maximum_p_value=1)
    assert (row["model"], row["p_value"]) == ("fragile", None)


async def test_a_p_value_is_withheld_where_the_score_is(gateway, bright, file_of):
    async with gateway(disclose="probabilities") as visitor:
        answers = [await visitor.infer("digits", bright(1), [name]) for name in ("score", "p_value")]
        (prediction,) = await visitor.predictions("digits", file_of(bright(1)[0]))
        (row,) = await visitor.alerts(1)
    assert [answer.status_code for answer in answers] == [403, 403]
    assert answers[1].json()["error"] == (
        "Output 'p_value' is withheld: this gateway discloses 'probabilities' at most."
    )
    assert prediction["p_value"] is None
    assert row["p_value"] == 0.01, "operators see what clients do not"


@pytest.mark.parametrize("bound", ["0", "1.5", "nan", "low"])
async def test_alerts_are_not_selected_by_what_is_no_p_value(gateway, bound):
    async with gateway() as visitor:
        answer = await visitor.http.get("/v1/alerts", params={"maximum_p_value": bound})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("query.maximum_p_value: ")


@pytest.mark.parametrize("fails", ["one row", "the run"])
async def test_where_the_defense_failed_there_is_no_p_value(
    gateway, tmp_path, published, fragile_graph, dark, file_of, fails
):
    # The score is the brightness less 0.5: four of the nine calibration images are as bright as a dark one or brighter.
    calibration = np.array([-0.9, -0.8, -0.7, -0.6, -0.501, 0.0, 0.1, 0.2, 0.3])
    published(tmp_path / "store", "fragile", fragile_graph, labels=THIRDS, calibration=calibration)
    pixels = dark(3)
    pixels[:, 0, 0, :2] = 0
    pixels[1, 0, 0, :2] = (0, 255) if fails == "one row" else (255, 0)
    lost = np.array([False, True, False]) if fails == "one row" else np.ones(3, bool)
    given = {"store": tmp_path / "store", "models": ("fragile",), "disclose": "all"}
    async with gateway(on_defense_error="open", **given) as visitor:
        outputs = await visitor.outputs("fragile", pixels, ["verdict", "score", "p_value"])
        predictions = await visitor.predictions("fragile", *map(file_of, pixels))
    expected = CalibrationScores(calibration).p_values(outputs["score"]).astype(np.float32)
    assert (expected >= np.float32(0.5)).all()
    for row, failed in enumerate(lost):
        assert outputs["verdict"][row] == predictions[row]["verdict"] == ("undefended" if failed else "accepted")
        assert outputs["p_value"][row] == (0 if failed else expected[row])
        assert (predictions[row]["p_value"] is None) == failed


def publish_damaged(root: Path, content: bytes) -> None:
    """Publish the serving version of ``digits`` again, with other calibration scores, as version 3."""
    models = Store.open(root / "models")
    fetched = models.fetch("digits", 2)
    with tempfile.TemporaryDirectory() as folder:
        payload = Path(folder)
        shutil.copy(fetched.folder / "model.onnx", payload)
        (payload / "calibration.json").write_bytes(content)
        models.publish("digits", fetched.manifest, payload)
    models.set_alias("digits", SERVING, 3)


@pytest.fixture
def own_store(store, tmp_path) -> Path:
    """A copy of the store's ``digits`` and ``bare`` that a test may add to."""
    for name in ("digits", "bare"):
        shutil.copytree(store / "models" / name, tmp_path / "store" / "models" / name)
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file: Invalid JSON: "),
        (b'{"images": 0, "scores": []}', "scores: List should have at least 1 item"),
        (b'{"images": 2, "scores": [1.5, 0.5]}', "expected ascending scores, got 0.5 after 1.5."),
        (b'{"images": 2, "scores": [0.5, Infinity]}', "scores.1: Input should be a finite number, got inf."),
        (b'{"images": 2, "scores": "high"}', "scores: Input should be a valid array, got 'high'."),
    ],
)
async def test_a_version_with_damaged_calibration_scores_is_refused_and_the_rest_is_served(
    gateway, own_store, dark, content, told, caplog
):
    publish_damaged(own_store, content)
    async with gateway(store=own_store, models=("digits@2", "digits", "bare")) as visitor:
        index = (await visitor.http.post("/v2/repository/index")).json()
        states = {(entry["name"], entry["version"]): entry["state"] for entry in index}
        assert states == {("digits", "2"): "READY", ("digits", "3"): "UNAVAILABLE", ("bare", "1"): "READY"}
        (reason,) = (entry["reason"] for entry in index if entry["reason"])
        assert reason.startswith(f"calibration.json cannot be used: {told}")
        answer = await visitor.http.get("/v2/models/digits/versions/3")
        assert (answer.status_code, answer.json()["error"]) == (503, f"Model digits is not available: {reason}")
        assert (await visitor.outputs("digits", dark(1)))["verdict"] == ["accepted"], "version 2 serves as before"
    assert f"Model digits is not served: {reason}" in caplog.text


async def test_a_damaged_version_that_is_asked_for_alone_is_not_replaced_by_the_one_before(gateway, own_store, dark):
    publish_damaged(own_store, b"{}")
    async with gateway(store=own_store, models=("digits", "bare")) as visitor:
        answer = await visitor.infer("digits", dark(1))
        assert (answer.status_code, answer.json()) == (
            503,
            {
                "error": "Model digits is not available: calibration.json cannot be used: images: Field required, "
                "got {}."
            },
        )
        assert (await visitor.infer("bare", dark(1))).status_code == 200


async def test_calibration_scores_that_were_changed_after_they_were_published_are_refused(gateway, own_store):
    path = own_store / "models" / "digits" / "2" / "calibration.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    async with gateway(store=own_store, models=("digits", "bare")) as visitor:
        answer = await visitor.http.get("/v2/models/digits")
    assert answer.status_code == 503
    assert "version 2 is corrupt: 'calibration.json' should be of the SHA-256" in answer.json()["error"]

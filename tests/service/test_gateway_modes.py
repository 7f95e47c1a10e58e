"""What a client is told: by the model's mode, by what is disclosed, and when the defense itself fails."""

import numpy as np
import pytest

from service.engines import Answers
from service.verdicts import failed_rows

LABELS = ("zero", "one", "two", "three")
EVERYTHING = (
    *("label", "class_index", "verdict", "logits", "probabilities", "score", "p_value"),
    *("undefended_class_index", "purified"),
)


@pytest.fixture
def mixed(dark, bright) -> np.ndarray:
    """Four images of which the second and the fourth are alerted."""
    return np.concatenate([dark(1), bright(1), dark(1, seed=1), bright(1, seed=1)])


ALERTED = [False, True, False, True]


async def test_flag_tells_the_protected_answer_and_the_alert(gateway, mixed, file_of):
    async with gateway(mode="flag", undefended_answer=True) as visitor:
        outputs = await visitor.outputs("digits", mixed, EVERYTHING)
        predictions = await visitor.predictions("digits", *map(file_of, mixed))
        assert outputs["verdict"] == ["alert" if alerted else "accepted" for alerted in ALERTED]
        assert outputs["class_index"].tolist() == outputs["logits"].argmax(1).tolist()
        assert outputs["label"] == [LABELS[index] for index in outputs["class_index"]]
        assert (outputs["score"] > 0).tolist() == ALERTED
        assert np.abs(outputs["purified"]).sum((1, 2, 3)).all()
        assert outputs["undefended_class_index"].tolist() != outputs["class_index"].tolist()
        for row, prediction in enumerate(predictions):
            assert prediction["label"] == outputs["label"][row]
            assert prediction["verdict"] == outputs["verdict"][row]
            assert (prediction["alert_id"] is not None) == ALERTED[row]
            assert prediction["undefended_label"] == LABELS[outputs["undefended_class_index"][row]]


async def test_enforce_withholds_the_answer_of_alerted_images_and_of_no_other(gateway, mixed, file_of):
    async with gateway(mode="enforce") as visitor:
        names = [name for name in EVERYTHING if name != "undefended_class_index"]
        outputs = await visitor.outputs("digits", mixed, names)
        predictions = await visitor.predictions("digits", *map(file_of, mixed))
        rows = await visitor.alerts(4)
    assert outputs["verdict"] == ["accepted", "alert"] * 2
    for row, alerted in enumerate(ALERTED):
        assert (outputs["label"][row] == "") == alerted
        assert (outputs["class_index"][row] == -1) == alerted
        for name in ("logits", "probabilities", "purified"):
            assert (np.abs(outputs[name][row]).max() == 0) == alerted, name
        hidden = [predictions[row][field] is None for field in ("label", "class_index", "probabilities")]
        assert hidden == [alerted] * 3
        assert (predictions[row]["alert_id"] is not None) == alerted
    assert outputs["class_index"][0] == outputs["logits"][0].argmax()
    assert {row["mode"] for row in rows} == {"enforce"}
    assert all(row["label"] in LABELS for row in rows), "operators see the answer that the client does not"


async def test_shadow_gives_the_bare_answer_and_only_records_the_alert(gateway, mixed, file_of):
    async with gateway(mode="flag", models=("bare",)) as visitor:
        bare = await visitor.outputs("bare", mixed, ["label", "class_index", "logits", "probabilities"])
    async with gateway(mode="shadow") as visitor:
        answer = await visitor.infer("digits", mixed, ["label", "class_index", "logits", "probabilities", "verdict"])
        outputs = visitor.read(answer)
        predictions = await visitor.predictions("digits", *map(file_of, mixed))
        rows = await visitor.alerts(4)
        protected = await visitor.metric("label_changes_total", model="digits")
    assert "parameters" not in answer.json()
    assert outputs["verdict"] == ["accepted"] * 4
    assert outputs["label"] == bare["label"]
    np.testing.assert_array_equal(outputs["class_index"], bare["class_index"])
    np.testing.assert_allclose(outputs["logits"], bare["logits"], atol=1e-4)
    np.testing.assert_allclose(outputs["probabilities"], bare["probabilities"], atol=1e-4)
    for row, prediction in enumerate(predictions):
        assert (prediction["label"], prediction["verdict"]) == (bare["label"][row], "accepted")
        assert prediction["alert_id"] is None
    assert [row["index"] for row in rows] == [3, 1, 3, 1]
    assert {row["mode"] for row in rows} == {"shadow"}
    for row in rows:
        assert row["undefended_class_index"] == bare["class_index"][row["index"]] != row["class_index"]
        assert row["score"] > row["threshold"] == 0
    assert protected > 0


async def test_a_mode_is_set_for_one_model_and_another_for_the_rest(gateway, bright):
    async with gateway(models=(), mode="shadow", modes={"digits": "enforce"}) as visitor:
        assert (await visitor.outputs("digits", bright(1)))["label"] == [""]
        modes = {model["name"]: model["mode"] for model in (await visitor.http.get("/v1/models")).json()["models"]}
    assert modes == {"digits": "enforce", "bare": "shadow", "fragile": "shadow", "slow": "shadow"}


@pytest.mark.parametrize(
    ("disclose", "offered"),
    [
        ("verdict", ["verdict"]),
        ("label", ["label", "class_index", "verdict"]),
        ("probabilities", ["label", "class_index", "verdict", "logits", "probabilities"]),
        ("all", list(EVERYTHING)),
    ],
)
async def test_a_client_is_told_what_is_disclosed_and_no_more(gateway, mixed, file_of, disclose, offered):
    async with gateway(disclose=disclose, undefended_answer=True) as visitor:
        metadata = (await visitor.http.get("/v2/models/digits")).json()
        assert [output["name"] for output in metadata["outputs"]] == offered
        by_default = (await visitor.infer("digits", mixed)).json()["outputs"]
        assert [output["name"] for output in by_default] == [
            name for name in ("label", "class_index", "verdict") if name in offered
        ]
        for name in EVERYTHING:
            answer = await visitor.infer("digits", mixed, [name])
            if name in offered:
                assert list(visitor.read(answer)) == [name]
            else:
                assert answer.status_code == 403
                assert answer.json() == {
                    "error": f"Output {name!r} is withheld: this gateway discloses {disclose!r} at most."
                }
        assert (await visitor.infer("digits", mixed, ["feelings"])).status_code == 400
        fields = {
            "label": "label",
            "class_index": "class_index",
            "probabilities": "probabilities",
            "score": "score",
            "p_value": "p_value",
            "undefended_label": "undefended_class_index",
        }
        for prediction in await visitor.predictions("digits", *map(file_of, mixed)):
            for field, output in fields.items():
                assert (prediction[field] is not None) == (output in offered), field
            assert prediction["verdict"] in ("accepted", "alert")
        (model,) = (await visitor.http.get("/v1/models")).json()["models"]
        assert (model["threshold"] is not None) == (disclose == "all")


async def test_outputs_that_are_not_computed_are_unknown_rather_than_withheld(gateway, mixed):
    async with gateway(disclose="all") as visitor:
        answer = await visitor.infer("digits", mixed, ["undefended_class_index"])
    assert answer.status_code == 400
    assert "No output 'undefended_class_index' is computed here; there are label," in answer.json()["error"]


async def test_listening_beyond_loopback_discloses_labels_only(gateway, dark):
    async with gateway(host="0.0.0.0") as visitor:
        assert (await visitor.infer("digits", dark(1), ["logits"])).status_code == 403
        assert (await visitor.infer("digits", dark(1), ["label"])).status_code == 200


@pytest.fixture
def unanswerable(dark) -> np.ndarray:
    """Three images for the model ``fragile``: on the second its logits are not finite."""
    pixels = dark(3)
    pixels[:, 0, 0, :2] = 0
    pixels[1, 0, 0, 1] = 255
    return pixels


@pytest.mark.parametrize("mode", ["flag", "enforce"])
async def test_a_failing_defense_fails_closed(gateway, unanswerable, file_of, mode):
    fatal = unanswerable.copy()
    fatal[1, 0, 0, :2] = 255, 0
    async with gateway(models=("fragile",), mode=mode) as visitor:
        for pixels, failed in ((unanswerable, 1), (fatal, 3)):
            for answer in (
                await visitor.infer("fragile", pixels),
                await visitor.predict("fragile", *map(file_of, pixels)),
            ):
                assert answer.status_code == 503
                assert answer.json() == {
                    "error": f"The defense of model 'fragile' failed on {failed} of the images; no answer is given."
                }
        assert (await visitor.outputs("fragile", unanswerable[:1]))["verdict"] == ["accepted"]
        assert await visitor.metric("defense_errors_total", model="fragile") == 2 * (1 + 3)
        assert await visitor.metric("requests_total", model="fragile", version="1", outcome="DefenseFailed") == 4
        assert await visitor.alerts(0) == []


@pytest.mark.parametrize(
    ("mode", "on"), [("flag", "open"), ("enforce", "open"), ("shadow", "open"), ("shadow", "closed")]
)
@pytest.mark.parametrize("fails", ["one row", "the run"])
async def test_a_failing_defense_gives_way_to_the_bare_answer_marked(gateway, unanswerable, file_of, mode, on, fails):
    pixels = np.concatenate([unanswerable, np.full((1, 1, 16, 16), 200, np.uint8)])
    pixels[3, 0, 0, 1] = 255  # bright enough for an alert, but its logits fail
    if fails == "the run":
        pixels[1, 0, 0, :2] = 255, 0
    thirds = [pixels[:, 0, :, first:last].mean((1, 2)) for first, last in ((0, 5), (5, 11), (11, 16))]
    bare = np.argmax(thirds, 0)
    lost = np.array([False, True, False, True]) if fails == "one row" else np.ones(4, bool)
    async with gateway(models=("fragile",), mode=mode, on_defense_error=on, disclose="all") as visitor:
        names = ["label", "class_index", "verdict", "logits", "probabilities", "score", "purified"]
        answers = [
            await visitor.outputs("fragile", pixels, names),
            visitor.read(await visitor.infer("fragile", pixels, names, parameters={"binary_data_output": True})),
        ]
        predictions = await visitor.predictions("fragile", *map(file_of, pixels))
        assert await visitor.alerts(0) == []
        assert await visitor.metric("predictions_total", model="fragile", verdict="undefended") == 3 * lost.sum()
        assert await visitor.metric("detector_score_count", model="fragile") == 3 * (~lost).sum()
    for outputs in answers:
        assert outputs["verdict"] == ["undefended" if failed else "accepted" for failed in lost]
        assert outputs["class_index"][lost].tolist() == bare[lost].tolist()
        assert np.isfinite(outputs["logits"]).all()
        assert np.isfinite(outputs["purified"]).all()
        assert not outputs["score"][lost].any()
        assert not outputs["purified"][lost].any()
        assert (outputs["score"][~lost] < 0).all()
    for row, prediction in enumerate(predictions):
        assert prediction["verdict"] == ("undefended" if lost[row] else "accepted")
        assert (prediction["score"] is None) == lost[row]
        assert prediction["alert_id"] is None
        assert prediction["label"] == answers[0]["label"][row]


async def test_failing_open_leaves_a_defense_that_works_alone(gateway, mixed):
    async with gateway(on_defense_error="open", disclose="all") as visitor:
        assert (await visitor.outputs("digits", mixed))["verdict"] == ["accepted", "alert"] * 2


@pytest.mark.parametrize("column", ["logits", "scores", "undefended_logits", "purified"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_with_any_number_that_is_not_finite_counts_as_failed(column, value):
    ones, images = np.ones((3, 4)), np.ones((3, 1, 2, 2))
    columns = {"logits": ones, "scores": np.ones(3), "undefended_logits": ones.copy(), "purified": images}
    assert failed_rows(Answers(**columns)).tolist() == [False, False, False]
    columns[column][1] = value
    assert failed_rows(Answers(**columns)).tolist() == [False, True, False]

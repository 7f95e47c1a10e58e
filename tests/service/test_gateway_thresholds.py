"""One threshold for each class, through the gateway: what is alerted, recorded and told."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from defenses.onnx_export import export_protected
from defenses.protected import ProtectedClassifier
from service.cli import app
from service.client import Client

LABELS = ("zero", "one", "two", "three")
QUIET = torch.zeros(())


@dataclass(frozen=True)
class Twins:
    """Two images (2, 1, 16, 16) uint8 with the same score, that the protected classifier gives different classes."""

    pixels: np.ndarray
    score: float
    classes: tuple[int, int]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds that the score is above for the first image's class alone."""
        return tuple(self.score + (-0.5 if index == self.classes[0] else 0.5 + index) for index in range(len(LABELS)))


@pytest.fixture(scope="module")
def twins(protected, bright) -> Twins:
    """An image and itself with rows and columns exchanged: equally bright, and so with the same score."""
    upright = bright(64)
    pixels = np.stack([upright, upright.swapaxes(2, 3)], 1)
    with torch.no_grad():
        output = protected(torch.from_numpy(pixels.reshape(-1, 1, 16, 16)).float() / 255, QUIET)
    highest = output.logits.topk(2).values
    clear = (highest[:, 0] - highest[:, 1]).reshape(-1, 2).min(1).values > 0.1
    classes, bare = (logits.argmax(1).reshape(-1, 2) for logits in (output.logits, output.undefended_logits))
    # The first one's bare answer is another class, whose threshold it must not be held against.
    usable = clear & (classes[:, 0] != classes[:, 1]) & (bare[:, 0] != classes[:, 0])
    row = int(usable.nonzero()[0])
    scores = output.scores.reshape(-1, 2)[row]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)
    return Twins(pixels[row], float(scores[0]), (int(classes[row, 0]), int(classes[row, 1])))


@pytest.fixture(scope="module")
def by_class(tmp_path_factory, protected, twins, published, calibration_scores) -> Path:
    """A store with the protected classifier under a threshold for each class."""
    root = tmp_path_factory.mktemp("thresholds") / "store"
    own = ProtectedClassifier(protected.classifier, protected.purifier, protected.detector, twins.thresholds).eval()
    published(root, "digits", export_protected(own), threshold=own.threshold.tolist(), calibration=calibration_scores)
    return root


async def test_of_two_images_with_one_score_only_the_one_whose_class_has_the_lower_threshold_is_alerted(
    gateway, by_class, twins, file_of
):
    async with gateway(store=by_class, disclose="all") as visitor:
        outputs = await visitor.outputs("digits", twins.pixels, ["class_index", "verdict", "score", "p_value"])
        first, second = await visitor.predictions("digits", *map(file_of, twins.pixels))
        rows = await visitor.alerts(2)
    assert outputs["class_index"].tolist() == list(twins.classes)
    assert outputs["verdict"] == ["alert", "accepted"]
    assert outputs["score"] == pytest.approx([twins.score] * 2, abs=1e-4)
    assert outputs["p_value"][0] == outputs["p_value"][1]
    assert (first["verdict"], second["verdict"]) == ("alert", "accepted")
    assert (second["alert_id"], second["p_value"]) == (None, first["p_value"])
    for row in rows:
        assert (row["index"], row["class_index"]) == (0, twins.classes[0])
        assert row["threshold"] == pytest.approx(twins.thresholds[twins.classes[0]], abs=1e-5)
        assert row["score"] > row["threshold"]


async def test_enforce_withholds_the_one_alone(gateway, by_class, twins):
    async with gateway(store=by_class, mode="enforce") as visitor:
        outputs = await visitor.outputs("digits", twins.pixels, ["class_index", "label"])
    assert outputs["class_index"].tolist() == [-1, twins.classes[1]]
    assert outputs["label"] == ["", LABELS[twins.classes[1]]]


async def test_shadow_records_the_threshold_of_the_protected_answer_and_not_of_the_bare_one(gateway, by_class, twins):
    async with gateway(store=by_class, mode="shadow") as visitor:
        outputs = await visitor.outputs("digits", twins.pixels, ["class_index", "verdict"])
        (row,) = await visitor.alerts(1)
    assert outputs["verdict"] == ["accepted"] * 2
    assert row["undefended_class_index"] == outputs["class_index"][0] != twins.classes[0]
    assert row["class_index"] == twins.classes[0]
    assert row["threshold"] == pytest.approx(twins.thresholds[twins.classes[0]], abs=1e-5)


@pytest.mark.parametrize(("disclose", "told"), [("all", True), ("probabilities", False)])
async def test_the_thresholds_are_listed_in_the_labels_order_where_scores_are_told(
    gateway, by_class, twins, disclose, told
):
    async with gateway(store=by_class, disclose=disclose) as visitor:
        (model,) = (await visitor.http.get("/v1/models")).json()["models"]
    assert model["threshold"] == (pytest.approx(list(twins.thresholds), abs=1e-5) if told else None)


def test_a_real_server_tells_a_real_client_apart_by_class(serve, by_class, twins, bright, file_of):
    with serve(store=by_class, models="digits") as server, closing(Client(server.url)) as client:
        told = client.classify("digits", twins.pixels)
        (model,) = client.get("/v1/models")["models"]
        files = [("image", file_of(one)) for one in twins.pixels]
        plain = httpx.post(f"{server.url}/v1/models/digits/predict", files=files).json()["predictions"]
    assert told.alerted.tolist() == [True, False]
    assert told.class_index.tolist() == list(twins.classes)
    assert len(model["threshold"]) == len(LABELS)
    for prediction in plain:
        threshold = model["threshold"][prediction["class_index"]]
        assert (prediction["verdict"] == "alert") == (prediction["score"] > threshold)
        assert prediction["p_value"] == 0.01


def test_the_table_of_models_shows_the_thresholds_range(by_class, twins, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["models", "--store", str(by_class)])
    assert result.exit_code == 0, result.output
    assert f"{min(twins.thresholds):.3f} to {max(twins.thresholds):.3f}, by class" in result.output

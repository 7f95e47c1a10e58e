"""P-values of scores: what they are, that torch says the same, and which files are no calibration."""

import json

import numpy as np
import pytest
import torch

from defenses.calibration import calibrate, p_values
from service.p_values import CalibrationScores, CalibrationUnreadable, write_scores


def test_p_values_match_a_case_computed_by_hand():
    calibration = CalibrationScores(np.array([4.0, 1.0, 2.0, 2.0]))
    # n = 4: not below 2 are three of them, so (1 + 3) / 5; nothing is as high as 9, so 1 / 5
    assert calibration.p_values(np.array([2.0, 9.0, 1.0, 0.0, 3.0])).tolist() == [0.8, 0.2, 1.0, 1.0, 0.4]
    assert calibration.p_values(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("ties", [False, True])
def test_the_gateways_p_values_are_those_of_the_fit(ties):
    generator = torch.Generator().manual_seed(0)
    benign, scores = torch.randn(997, generator=generator), 2 * torch.randn(3000, generator=generator)
    if ties:
        benign, scores = (benign * 10).round() / 10, (scores * 10).round() / 10
    ours = CalibrationScores(benign.numpy()).p_values(scores.numpy())
    assert ours.dtype == np.float64
    assert torch.equal(torch.from_numpy(ours.astype(np.float32)), p_values(scores, benign))


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.1])
def test_with_one_threshold_the_alerted_are_those_whose_p_value_is_within_the_budget(budget):
    generator = torch.Generator().manual_seed(1)
    benign = (torch.randn(499, generator=generator) * 20).round() / 20
    scores = (2 * torch.randn(3000, generator=generator) * 20).round() / 20
    within = CalibrationScores(benign.numpy()).p_values(scores.numpy()) <= budget
    assert within.tolist() == (scores > calibrate(benign, budget)).tolist()
    assert within.any()


def test_further_benign_images_come_out_at_most_p_no_more_often_than_p():
    random = np.random.default_rng(0)
    drawn = [CalibrationScores(random.exponential(size=49)).p_values(random.exponential(size=20)) for _ in range(3000)]
    for p in (0.02, 0.05, 0.1, 0.5):
        share = (np.concatenate(drawn) <= p).mean()
        assert share <= p + 0.005
        # n = 49: where p (n + 1) is whole, it is p itself
        assert share == pytest.approx(np.floor(50 * p) / 50, abs=0.005)


def test_scores_are_read_back_exactly_as_they_were_written(tmp_path):
    scores = np.random.default_rng(0).normal(size=500).astype(np.float32)
    write_scores(scores, tmp_path / "calibration.json")
    content = json.loads((tmp_path / "calibration.json").read_bytes())
    assert content == {"images": 500, "scores": np.sort(scores).tolist()}
    again = CalibrationScores.load(tmp_path / "calibration.json")
    assert len(again) == 500
    np.testing.assert_array_equal(again.p_values(scores), CalibrationScores(scores).p_values(scores))
    assert again.p_values(scores).min() == 2 / 501, "an image scores as high as itself"


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (np.zeros(0), r"at least one calibration image, \(n,\), got \(0,\)"),
        (np.zeros((3, 1)), r"at least one calibration image, \(n,\), got \(3, 1\)"),
        (np.array([0.0, np.nan]), "finite"),
        (np.array([0.0, np.inf]), "finite"),
    ],
)
def test_scores_that_calibrate_nothing_are_not_written(tmp_path, scores, told):
    with pytest.raises(ValueError, match=told):
        write_scores(scores, tmp_path / "calibration.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file: Invalid JSON"),
        (b"\xff\x00\x01", "the file: Invalid JSON"),
        (b'{"images": 2, "scores": [0.5, 0', "the file: Invalid JSON"),
        (b"[0.5, 0.75]", r"the file: Input should be an object, got \[0.5, 0.75\]"),
        (b'{"scores": [0.5]}', "images: Field required"),
        (b'{"images": 1}', "scores: Field required"),
        (b'{"images": 1, "scores": [0.5], "budget": 0.05}', "budget: Extra inputs are not permitted"),
        (b'{"images": 0, "scores": []}', "scores: List should have at least 1 item"),
        (b'{"images": 1, "scores": 0.5}', "scores: Input should be a valid array, got 0.5"),
        (b'{"images": 1, "scores": ["0.5"]}', "scores.0: Input should be a valid number, got '0.5'"),
        (b'{"images": 1, "scores": [true]}', "scores.0: Input should be a valid number, got True"),
        (b'{"images": 2, "scores": [0.5, null]}', "scores.1: Input should be a valid number, got None"),
        (b'{"images": 2, "scores": [0.5, NaN]}', "scores.1: Input should be a finite number, got nan"),
        (b'{"images": 2, "scores": [0.5, 1e999]}', "scores.1: Input should be a finite number, got inf"),
        (b'{"images": "2", "scores": [0.5, 1]}', "images: Input should be a valid integer, got '2'"),
        (b'{"images": 3, "scores": [0.5, 1]}', "expected the scores of 3 images, got 2"),
        (b'{"images": 3, "scores": [0.5, 0.25, 1]}', "expected ascending scores, got 0.25 after 0.5"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused_with_what_is_wrong(tmp_path, content, told):
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    with pytest.raises(CalibrationUnreadable, match=rf"calibration\.json cannot be used: {told}.*\.$") as caught:
        CalibrationScores.load(path)
    assert caught.value.path == path


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CalibrationUnreadable, match=r"calibration\.json cannot be used: No such file or directory\."):
        CalibrationScores.load(tmp_path / "calibration.json")

"""Versions on torch: the answers of ONNX Runtime, within a tolerance; noise, sizes, half the bits, buffers."""

import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch

from service.correcting import CorrectingEngine
from service.engines import GraphUnloadable, OnnxEngine
from service.engines.answers import Engine
from service.engines.opening import OnnxSource
from service.engines.torch_buffers import Slot
from service.engines.torch_engine import TorchCorrection, TorchEngine
from service.engines.torch_precision import TOLERANCE, chosen_precision, precision_difference, within_tolerance
from service.settings import Settings

CPU = torch.device("cpu")
KINDS = ("bare", "coophance", "response", "gated", "squeezing")

FP32 = 1e-4
"""How far values may be apart in float32, over the larger of 1 and the largest one."""

HALF = {torch.bfloat16: (0.03, 0.06), torch.float16: (0.004, 0.008)}
"""The same for logits and for scores in half the bits."""

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here.")


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The difference of each row, over the larger of 1 and the largest value."""
    return np.abs(one - other).reshape(len(one), -1).max(1) / max(1.0, float(np.abs(one).max()))


def gap(logits: np.ndarray) -> np.ndarray:
    """How far the second class is from the first, over the larger of 1 and the largest logit."""
    ordered = np.sort(logits, 1)
    return (ordered[:, -1] - ordered[:, -2]) / max(1.0, float(np.abs(logits).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_answers_what_onnx_runtime_answers(made, mixed, kind):
    one = made[kind]
    expected = OnnxEngine(one.graph, one.outputs, threads=1, noise=False).run(mixed)
    values = TorchEngine(one.version, one.outputs, device=CPU, noise=False).run(mixed)
    assert list(values) == list(one.outputs)
    for name, wanted in expected.items():
        assert values[name].shape == wanted.shape
        assert values[name].dtype == wanted.dtype
        if name != "alert":
            assert apart(wanted, values[name]).max() < FP32, name
    clear = gap(expected["logits"]) > FP32
    assert clear.mean() > 0.9
    assert (values["logits"].argmax(1) == expected["logits"].argmax(1))[clear].all()
    if "alert" in values:
        assert 0 < values["alert"].sum() < len(mixed), "images of both kinds"
        distance = np.abs(expected["score"] - float(one.version.threshold))
        decided = distance > FP32 * max(1.0, float(np.abs(expected["score"]).max()))
        assert decided.mean() > 0.9
        assert (values["alert"] == expected["alert"])[decided].all()


def test_alerted_images_are_corrected_alike(made, mixed):
    one = made["gated"]
    source = OnnxSource(one.graph, one.correction, Settings(threads=1, noise=False))
    expected = CorrectingEngine(source, one.outputs, failed=pytest.fail).run(mixed)

    class Source:
        def open(self, outputs: tuple[str, ...]) -> TorchEngine:
            return TorchEngine(one.version, outputs, device=CPU, noise=False)

        def open_correction(self, *, purified: bool) -> TorchCorrection:
            return TorchCorrection(one.version, device=CPU, noise=False, purified=purified)

    engine = CorrectingEngine(Source(), one.outputs, failed=pytest.fail)
    engine.try_out((1, 16, 16), 4)
    values = engine.run(mixed)
    with torch.no_grad():
        whole = one.version(torch.from_numpy(mixed).float() / 255, torch.zeros(()))
    alerted = values["alert"]
    assert alerted.tolist() == expected["alert"].tolist() == whole.alerts.tolist()
    assert 0 < alerted.sum() < len(mixed)
    uncorrected = TorchEngine(one.version, ("purified",), device=CPU, noise=False).run(mixed)["purified"]
    assert (np.abs(uncorrected - values["purified"]).max((1, 2, 3)) > 1e-3).tolist() == alerted.tolist()
    for name, wanted in (("logits", whole.logits), ("purified", whole.purified)):
        assert apart(wanted.numpy(), values[name]).max() < FP32, name
        # A ReLU near its kink may turn the gradient that a correction follows.
        assert np.mean(apart(expected[name], values[name]) < 1e-2) > 0.9, name


def test_the_bare_answer_alone_runs_the_bare_classifier_alone(made, mixed):
    version = made["coophance"].version
    alone = TorchEngine(version, ("undefended_logits",), device=CPU)
    calls: list[int] = []
    hook = version.purifier.register_forward_hook(lambda *_: calls.append(1))
    try:
        bare = alone.run(mixed)["undefended_logits"]
    finally:
        hook.remove()
    assert calls == []
    expected = OnnxEngine(made["bare"].graph, ("logits",), threads=1).run(mixed)["logits"]
    assert apart(expected, bare).max() < FP32


@pytest.mark.parametrize("open_engine", [OnnxEngine, TorchEngine])
def test_pixels_of_8_bits_stand_for_themselves_divided_by_255(made, mixed, open_engine):
    one = made["coophance"]
    engine: Engine = (
        OnnxEngine(one.graph, one.outputs, threads=1, noise=False)
        if open_engine is OnnxEngine
        else TorchEngine(one.version, one.outputs, device=CPU, noise=False)
    )
    scaled = mixed.astype(np.float32) / np.float32(255)
    scaled.flags.writeable = False
    given, expected = engine.predict(mixed), engine.predict(scaled)
    for column, wanted in zip(given.columns, expected.columns, strict=True):
        np.testing.assert_allclose(column, wanted, atol=1e-6)


def test_noise_is_drawn_afresh_and_can_be_switched_off(made, mixed):
    one = made["coophance"]
    noisy, quiet = (TorchEngine(one.version, one.outputs, device=CPU, noise=noise) for noise in (True, False))
    first, second = noisy.predict(mixed), noisy.predict(mixed)
    assert (np.abs(first.purified - second.purified).max((1, 2, 3)) > 1e-3).all()
    np.testing.assert_array_equal(first.undefended_logits, second.undefended_logits)
    for column, again in zip(quiet.predict(mixed).columns, quiet.predict(mixed).columns, strict=True):
        np.testing.assert_array_equal(column, again)


def test_more_images_than_the_largest_batch_are_computed_in_portions(made, mixed):
    one = made["coophance"]
    small, large = (TorchEngine(one.version, one.outputs, device=CPU, noise=False, max_batch=n) for n in (5, 64))
    assert (small.warm_up_sizes, large.warm_up_sizes) == ((1, 5), (1, 64))
    assert small.lanes == 1
    for name, wanted in large.run(mixed).items():
        np.testing.assert_allclose(small.run(mixed)[name], wanted, atol=1e-5)


def test_an_output_that_a_version_has_not_is_refused(made):
    with pytest.raises(ValueError, match="Expected outputs among logits, got score"):
        TorchEngine(made["bare"].version, ("logits", "score"), device=CPU)
    with pytest.raises(ValueError, match="with a corrector, got one without"):
        TorchCorrection(made["coophance"].version, device=CPU)


@pytest.mark.parametrize("reduced", HALF)
@pytest.mark.parametrize("kind", ["bare", "coophance", "squeezing"])
def test_half_the_bits_move_answers_within_a_tolerance_and_flip_no_verdict_outside_of_it(made, mixed, kind, reduced):
    one = made[kind]
    full = TorchEngine(one.version, one.outputs, device=CPU, noise=False).run(mixed)
    half = TorchEngine(one.version, one.outputs, device=CPU, noise=False, reduced=reduced).run(mixed)
    of_logits, of_scores = HALF[reduced]
    assert {half[name].dtype for name in one.outputs} <= {np.dtype(np.float32), np.dtype(np.bool_)}
    # Where two classes are as good as equal the choice between them may turn, and a score with it.
    passes = [name for name in ("logits", "undefended_logits") if name in full]
    clear = np.all([gap(full[name]) > 2 * of_logits for name in passes], axis=0)
    assert clear.mean() > 0.3
    assert all(apart(full[name], half[name]).max() < of_logits for name in passes)
    assert any(apart(full[name], half[name]).max() > 1e-6 for name in passes), "it was computed in fewer bits"
    assert (full["logits"].argmax(1) == half["logits"].argmax(1))[clear].all()
    if "score" in full:
        assert apart(full["score"], half["score"])[clear].max() < of_scores
        distance = np.abs(full["score"] - float(one.version.threshold)) / max(1.0, np.abs(full["score"]).max())
        decided = clear & (distance > of_scores)
        assert decided.mean() > 0.25
        assert (full["alert"] == half["alert"])[decided].all()
        assert (half["alert"] == (half["score"] > float(one.version.threshold))).all(), "the score that is told decides"


def test_the_finest_of_half_the_bits_is_taken_that_leaves_the_answers_what_they_are(made, monkeypatch, caplog):
    version = made["coophance"].version
    assert chosen_precision("auto", version, "digits@2", CPU) is None
    assert chosen_precision("bf16", version, "digits@2", CPU) is torch.bfloat16
    assert chosen_precision("fp32", version, "digits@2", CPU) is None
    fine, coarse = (precision_difference(version, dtype, CPU) for dtype in (torch.float16, torch.bfloat16))
    assert 0 < fine < coarse
    assert fine <= TOLERANCE
    assert within_tolerance(version, "digits@2", CPU) is torch.float16
    monkeypatch.setattr("service.engines.torch_precision.TOLERANCE", fine / 2)
    with caplog.at_level(logging.WARNING, "portcullis"):
        assert within_tolerance(version, "digits@2", CPU) is None
    assert f"digits@2 is computed in float32: fp16 moves its answers by {fine:.3g}" in caplog.text


def test_values_that_half_the_bits_cannot_hold_are_as_far_off_as_can_be(made):
    version = made["bare"].version
    weight = max(version.parameters(), key=lambda parameter: parameter.ndim)
    with torch.no_grad():
        weight.mul_(1e6)
        try:
            assert precision_difference(version, torch.float16, CPU) == float("inf")
        finally:
            weight.div_(1e6)


def test_a_batch_passes_through_buffers_that_stay_where_they_are(mixed):
    examples = [torch.zeros(1, 3), torch.zeros(1, dtype=torch.bool)]
    slot = Slot((1, 16, 16), examples, 8, CPU)
    place = slot.images.data_ptr()
    slot.send(mixed[:8], 8)
    np.testing.assert_array_equal(slot.images.numpy(), mixed[:8].astype(np.float32) / np.float32(255))
    slot.send(mixed[8:11].astype(np.float32) / np.float32(255), 4)
    np.testing.assert_array_equal(slot.images[:3].numpy(), mixed[8:11].astype(np.float32) / np.float32(255))
    assert not slot.images[3].any(), "the rows that fill a batch up are zero"
    slot.send(mixed[:3].transpose(0, 1, 3, 2), 4)
    np.testing.assert_array_equal(slot.images[:3].numpy() * 255, mixed[:3].transpose(0, 1, 3, 2))
    assert slot.images.data_ptr() == place
    slot.keep([torch.arange(12.0).reshape(4, 3), torch.tensor([True, False, True, True])])
    slot.fetch(3)
    logits, alerts = slot.answers(3)
    slot.keep([torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)])
    slot.fetch(3)
    np.testing.assert_array_equal(logits, np.arange(9.0).reshape(3, 3))
    assert alerts.tolist() == [True, False, True]


@gpu
@pytest.mark.parametrize("kind", ["bare", "coophance", "squeezing"])
def test_a_gpu_answers_what_the_processor_answers_in_every_size(made, mixed, kind):
    one = made[kind]
    expected = TorchEngine(one.version, one.outputs, device=CPU, noise=False).run(mixed)
    try:
        engine = TorchEngine(one.version, one.outputs, device=torch.device("cuda"), noise=False, max_batch=8)
        for count in (1, 2, 3, 5, 8, 48):
            for name, values in engine.run(mixed[:count]).items():
                if name != "alert":
                    assert apart(expected[name][:count], values).max() < HALF[torch.float16][0], (name, count)
    finally:
        one.version.to(CPU)


@gpu
def test_a_gpu_answers_as_many_batches_at_once_as_it_has_lanes(made, mixed):
    one = made["coophance"]
    try:
        engine = TorchEngine(one.version, ("logits",), device=torch.device("cuda"), noise=False, max_batch=8)
        batches = [mixed[start : start + size] for start in range(8) for size in (1, 3, 8)]
        expected = [engine.run(batch)["logits"] for batch in batches]
        with ThreadPoolExecutor(engine.lanes) as lanes:
            together = list(lanes.map(lambda batch: engine.run(batch)["logits"], batches))
        assert engine.lanes == 2
        for alone, beside in zip(expected, together, strict=True):
            np.testing.assert_array_equal(alone, beside)
    finally:
        one.version.to(CPU)


@gpu
def test_replays_draw_other_noise_each_time(made, mixed):
    one = made["coophance"]
    try:
        engine = TorchEngine(one.version, ("purified",), device=torch.device("cuda"), max_batch=8)
        drawn = [engine.run(mixed[:8])["purified"] for _ in range(4)]
        assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(drawn))
    finally:
        one.version.to(CPU)


@gpu
def test_onnx_runtime_captures_its_runs_on_a_gpu_and_feeds_them_noise(made, mixed, caplog):
    one = made["coophance"]
    expected = OnnxEngine(one.graph, one.outputs, noise=False).run(mixed)
    with caplog.at_level(logging.WARNING, "portcullis"):
        engine = OnnxEngine(one.graph, one.outputs, device="cuda", noise=False, max_batch=8)
        noisy = OnnxEngine(one.graph, ("purified",), device="cuda", max_batch=8)
    assert "without CUDA graphs" not in caplog.text
    for name, values in engine.run(mixed).items():
        if name != "alert":
            assert apart(expected[name], values).max() < HALF[torch.float16][0]
    drawn = [noisy.run(mixed[:8])["purified"] for _ in range(5)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(drawn))


def test_a_correction_that_does_not_fit_is_refused_by_name(made):
    one = made["gated"]

    class Source:
        def open(self, outputs: tuple[str, ...]) -> TorchEngine:
            return TorchEngine(one.version, outputs, device=CPU)

        def open_correction(self, *, purified: bool) -> TorchCorrection:
            return TorchCorrection(one.version, device=CPU, purified=purified)

    with pytest.raises(GraphUnloadable, match=r"correction.json cannot be run: expected logits of shape \(1, 7\)"):
        CorrectingEngine(Source(), one.outputs, failed=pytest.fail).try_out((1, 16, 16), 7)

"""A correction behind an alert: its direction, its place on the spine, its graph, its fit."""

import numpy as np
import pytest
import torch
from torch import nn

from defenses.checkpoint import CheckpointUnreadable, ClassifierMismatch, load_protected, save_protected
from defenses.coophance import Regulator, RegulatorConfig
from defenses.detector import NoDetector
from defenses.judge import AlertedAnswer
from defenses.nip import (
    CorrectionConfig,
    GatedPlan,
    HeadUnsuitable,
    InspectorMissing,
    InverseCorrection,
    Replaced,
    check_correction,
    export_correction,
    fit_gated,
    head_behind,
)
from defenses.onnx_export import ExportBroken, check_export, export_protected
from defenses.onnx_parity import session
from defenses.protected import ProtectedClassifier
from defenses.purifier import PurifierNotExportable
from defenses.stages import Stages

CPU, OFF = torch.device("cpu"), torch.zeros(())
QUICK = {"attacks": ("fgsm:epsilon=48/255",), "validation_examples": 60, "test_examples": 30, "budget": 0.1}


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def correction(classifier, layer_of):
    """A correction for a network: ``correction("deep", size=0.1)``."""

    def build(form: str = "linear", **choices: float) -> InverseCorrection:
        subject = classifier(form)
        layer = subject.resolve_layer(layer_of(form))
        config = CorrectionConfig(
            layer.name, layer.shape, 10, **{"k1": 2, "k2": 2, "size": 4 / 255, "noise": 5 / 255, **choices}
        )
        return InverseCorrection(config, subject, head_behind(subject, layer)).eval()

    return build


@pytest.fixture(scope="module")
def regulator() -> Regulator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Regulator(RegulatorConfig((1, 8, 8), channels=(4, 4), skip_channels=(2, 2))).eval()


@pytest.fixture(scope="module")
def x(splits) -> torch.Tensor:
    return splits.test.images[:60].float() / 255


@pytest.fixture(scope="module")
def inspected(classifier, regulator, inspector) -> ProtectedClassifier:
    subject = classifier("linear")
    return ProtectedClassifier(subject, regulator, inspector(subject, fusion=True), 0.0).eval()


@pytest.mark.parametrize("form", ["linear", "deep", "maps", "smooth"])
def test_the_class_that_was_given_loses_to_the_others(classifier, correction, x, form):
    corrector, subject = correction(form, size=0.1, noise=0.0), classifier(form)
    with torch.no_grad():
        bare = subject(x)
        out = corrector(x, bare, torch.ones(()))
    given = bare.argmax(1, keepdim=True)
    before = bare.log_softmax(1).gather(1, given)
    after = out.logits.log_softmax(1).gather(1, given)
    assert (after < before).float().mean() > (0.6 if form == "maps" else 0.8)
    assert (out.logits.argmax(1) != given.squeeze(1)).float().mean() > 0.1
    distance = (out.purified - x).flatten(1).norm(dim=1) / 8
    assert (distance <= 0.1 + 1e-5).all()
    assert distance.mean() > 0.05
    assert (out.purified.min(), out.purified.max()) >= (0, 0)


def test_the_direction_is_of_the_class_that_the_bare_classifier_gave(correction, x):
    corrector = correction(noise=0.0)
    (subject,) = corrector._classifier
    others = nn.functional.one_hot((subject(x).argmax(1) + 1) % 10, 10).float()
    own = corrector.gradient(subject, x.clone(), subject(x).detach())
    other = corrector.gradient(subject, x.clone(), others)
    assert nn.functional.cosine_similarity(own.flatten(1), other.flatten(1)).median() < 0.5


def test_front_and_tail_neurons_count_as_much_as_their_maps_are_large(classifier, correction, x):
    corrector, subject = correction("maps"), classifier("maps")
    logits, activations = subject.logits_and_features(x, corrector.config.layer)
    weights = corrector.neuron_weights(x, activations, logits, logits)
    assert weights.shape == activations.shape
    sums = weights.sum((2, 3))
    torch.testing.assert_close(
        sums.sort(1).values[:, [0, 1, 2, -3, -2, -1]], torch.tensor([[-1.0, -1, 0, 0, 1, 1]] * 60)
    )


@pytest.mark.parametrize("candidates", [None, torch.rand(4, 1, 8, 8)], ids=["noise", "candidates"])
def test_a_control_goes_as_far_elsewhere_and_cannot_be_served(classifier, correction, x, candidates):
    corrector = correction(size=0.05, noise=0.0)
    bare = classifier("linear")(x)
    own = corrector(x, bare, OFF).purified - x
    corrector.replaced = Replaced(candidates)
    other = corrector(x, bare, OFF).purified - x
    assert other.flatten(1).norm(dim=1).max() <= 8 * 0.05 + 1e-4
    assert nn.functional.cosine_similarity(own.flatten(1), other.flatten(1)).abs().median() < 0.6
    with pytest.raises(PurifierNotExportable, match="A control direction is there to be measured"):
        export_correction(corrector, classifier("linear"))


def test_only_what_is_alerted_is_corrected(classifier, correction, inspected, x):
    subject, corrector = inspected.classifier, correction(size=0.1, noise=0.0)
    parts = (subject, inspected.purifier, inspected.detector)
    plain = ProtectedClassifier(*parts, float("inf")).eval()
    with torch.no_grad():
        scores = plain(x, OFF).scores
        threshold = float(scores.median())
        whole = ProtectedClassifier(*parts, threshold, judge=AlertedAnswer(), corrector=corrector).eval()
        output, purified = whole(x, OFF), plain(x, OFF).purified
    alerted = output.alerts
    assert 20 < int(alerted.sum()) < 40
    torch.testing.assert_close(output.logits[~alerted], output.undefended_logits[~alerted])
    torch.testing.assert_close(output.purified[~alerted], purified[~alerted])
    with torch.no_grad():
        wanted = corrector(purified[alerted], output.undefended_logits[alerted], OFF)
    torch.testing.assert_close(output.logits[alerted], wanted.logits)
    torch.testing.assert_close(output.purified[alerted], wanted.purified)


@pytest.mark.parametrize("form", ["linear", "deep", "maps", "product"])
def test_the_second_graph_corrects_as_torch_does(classifier, correction, x, form):
    corrector, subject = correction(form, size=0.05), classifier(form)
    graph = export_correction(corrector, subject)
    with torch.no_grad():
        bare = subject(x)
    assert check_correction(graph, corrector, x, bare) < 1e-2
    feeds = {"purified": x.numpy(), "undefended_logits": bare.numpy()}
    loaded = session(graph)
    runs = [loaded.run(["logits", "corrected"], feeds) for _ in range(2)]
    assert np.abs(runs[0][1] - runs[1][1]).max() > 0.01, "the noise is drawn anew"
    assert (runs[0][1].min(), runs[0][1].max()) >= (0, 0)
    other = correction(form, size=0.5)
    with pytest.raises(ExportBroken, match="corrected logits"):
        check_correction(graph, other, x, bare)


def test_a_head_that_needs_autograd_cannot_be_served(classifier, correction):
    with pytest.raises(HeadUnsuitable, match="Sigmoid"):
        export_correction(correction("smooth"), classifier("smooth"))


def test_the_first_graph_answers_the_purified_image_where_it_alerts_and_the_bare_one_elsewhere(inspected, x):
    parts = (inspected.classifier, inspected.purifier, inspected.detector)
    with torch.no_grad():
        threshold = float(inspected(x, OFF).scores.median())
    whole = ProtectedClassifier(*parts, threshold, judge=AlertedAnswer()).eval()
    graph = export_protected(whole)
    assert check_export(graph, whole, x) < 1e-3
    names = ["logits", "alert", "undefended_logits", "class_index"]
    feeds = {"image": x.numpy(), "noise_scale": np.zeros((), np.float32)}
    logits, alerts, bare, classes = session(graph).run(names, feeds)
    assert 10 < alerts.sum() < 50
    np.testing.assert_allclose(logits[~alerts], bare[~alerts])
    assert np.abs(logits[alerts] - bare[alerts]).max() > 1e-2
    assert classes.tolist() == logits.argmax(1).tolist()


def test_a_threshold_for_each_class_and_a_judge_do_not_go_together(inspected):
    parts = (inspected.classifier, inspected.purifier, inspected.detector)
    with pytest.raises(ValueError, match="Expected one threshold for all classes beside a judge"):
        ProtectedClassifier(*parts, [0.0] * 10, judge=AlertedAnswer())


def test_a_fit_sets_the_alert_by_what_clean_images_lose_and_is_kept_and_resumed(inspected, splits, layer_of, tmp_path):
    plan = GatedPlan(layer=layer_of("linear"), k1=2, k2=2, accuracy_loss=0.05, **QUICK)
    stages = Stages(tmp_path / "stages")
    fitted = fit_gated(inspected, splits, plan, stages=stages, device=CPU, progress=silent)
    gate = fitted.gate
    assert gate.images == 100
    assert gate.undefended_right - gate.right <= 5
    assert gate.alerted <= gate.budgeted <= 10
    assert float(fitted.protected.threshold) == pytest.approx(gate.threshold)
    assert fitted.protected.detector.config.asks == "raw"
    torch.testing.assert_close(fitted.protected.detector.weight, inspected.detector.weight)
    assert fitted.calibration_scores.tolist() == sorted(fitted.calibration_scores.tolist())
    assert {"false_positive_rate", "alert_rate.fgsm:epsilon=48/255"} <= fitted.metrics.keys()
    again = fit_gated(inspected, splits, plan, stages=stages, device=CPU, progress=silent)
    assert (again.metrics, again.gate) == (fitted.metrics, gate)
    save_protected(fitted.protected, tmp_path / "kept")
    loaded = load_protected(inspected.classifier, tmp_path / "kept")
    x = splits.test.images.float() / 255
    with torch.no_grad():
        assert loaded.corrector.config == fitted.protected.corrector.config
        torch.testing.assert_close(loaded(x, OFF).scores, fitted.protected(x, OFF).scores)
    (tmp_path / "kept" / "correction.json").write_text("{}")
    with pytest.raises(CheckpointUnreadable, match="its configuration is not that of a correction"):
        load_protected(inspected.classifier, tmp_path / "kept")


def test_a_correction_for_another_layer_is_refused(classifier, correction, regulator, inspector, tmp_path):
    corrector = correction("linear")
    subject = classifier("linear")
    whole = ProtectedClassifier(subject, regulator, inspector(subject), 0.0, judge=AlertedAnswer(), corrector=corrector)
    save_protected(whole, tmp_path)
    path = tmp_path / "correction.json"
    path.write_text(path.read_text().replace("[32]", "[16]"))
    with pytest.raises(ClassifierMismatch, match=r"of shape \(16,\), but the classifier has \(32,\)"):
        load_protected(subject, tmp_path)


def test_a_fit_needs_an_inspector(classifier, regulator, splits, tmp_path):
    bare = ProtectedClassifier(classifier("linear"), regulator, NoDetector())
    with pytest.raises(InspectorMissing, match="got one with a NoDetector"):
        fit_gated(bare, splits, GatedPlan(), stages=Stages(tmp_path), device=CPU, progress=silent)


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"noise": -1.0}, "Expected noise of 0 or more"),
        ({"size": 0.0}, "Expected size above 0"),
        ({"k1": 0, "k2": 0}, "not both 0"),
        ({"attacks": ()}, "Expected an attack or more"),
        ({"accuracy_loss": -0.1}, "accuracy_loss of 0 or more"),
    ],
)
def test_plans_that_cannot_be(choices, told):
    with pytest.raises(ValueError, match=told):
        GatedPlan(**choices)

"""NIP on the spine: one raw pass for all that look at it, and one ONNX graph with a detector or without."""

import numpy as np
import pytest
import torch
from onnx import ModelProto

from defenses.coophance import Regulator, RegulatorConfig
from defenses.detector import Evidence, NoDetector
from defenses.evaluation import run_batched
from defenses.nip import HeadUnsuitable, InversePerturbation, NipPlan, build_pool, head_behind
from defenses.onnx_export import ExportBroken, check_export, export_protected
from defenses.onnx_parity import session
from defenses.protected import ProtectedClassifier
from defenses.purifier import PurifierNotExportable

CPU, OFF = torch.device("cpu"), torch.zeros(())
BARE = ["logits", "class_index", "undefended_logits", "undefended_class_index", "purified"]
VARIANTS = [
    ("linear", {}),
    ("linear", {"precision": "float16", "template": "class", "search": "class", "k1": 0}),
    ("linear", {"similarity": "influence", "sign": "front-tail", "k2": 0}),
    ("deep", {"template": "frequency", "template_share": 0.3, "k1": 3, "k2": 3}),
    ("maps", {"k1": 2, "k2": 2}),
]


def run(graph: ModelProto, x: torch.Tensor) -> dict[str, np.ndarray]:
    names = [value.name for value in graph.graph.output]
    return dict(zip(names, session(graph).run(names, {"image": x.numpy()}), strict=True))


@pytest.fixture(scope="module")
def x(splits) -> torch.Tensor:
    return splits.test.images.float() / 255


@pytest.mark.parametrize("inspects", ["raw", "purified"])
def test_the_raw_pass_is_computed_once_for_all_that_look_at_it(classifier, purifier, inspector, x, inspects):
    subject = classifier("linear")
    protected = ProtectedClassifier(subject, purifier(), inspector(subject, inspects), 0.0).eval()
    assert protected.purifier.layer != protected.detector.layer
    asked: list[tuple[str, ...]] = []
    hook = subject.graph.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[1]))
    try:
        with torch.no_grad():
            output = protected(x[:20])
    finally:
        hook.remove()
    tap, head = protected.detector.layer, protected.purifier.layer
    expected = [("logits", head, tap), ("logits",)] if inspects == "raw" else [("logits", head), ("logits", tap)]
    assert asked == expected
    logits, activations = subject.logits_and_features(x[:20], head)
    purified = protected.purifier(x[:20], OFF, activations, logits)
    watched = subject.features(x[:20] if inspects == "raw" else purified, tap)
    distance = (purified - x[:20]).flatten(1).norm(dim=1)
    scores = protected.detector(*Evidence(watched, subject(purified), logits, distance))
    torch.testing.assert_close(output.purified, purified)
    torch.testing.assert_close(output.undefended_logits, logits)
    torch.testing.assert_close(output.scores, scores)
    torch.testing.assert_close(protected.activations(x[:20]), watched)
    torch.testing.assert_close(protected.evidence(x[:20]).distance, distance)


def test_without_a_detector_nothing_is_ever_alerted(classifier, purifier, x):
    protected = ProtectedClassifier(classifier("linear"), purifier(), NoDetector()).eval()
    answers = run_batched(protected, x, CPU)
    assert answers.scores.abs().max() == 0
    assert not answers.alerts.any()
    assert float(protected.threshold) == float("inf")
    assert protected.activations(x[:3]).shape == (3, 0)
    with pytest.raises(ValueError, match=r"no detector, got -1\.0"):
        ProtectedClassifier(classifier("linear"), purifier(), NoDetector(), -1.0)


@pytest.mark.parametrize(("form", "choices"), VARIANTS)
def test_the_graph_without_a_detector_equals_torch(classifier, purifier, x, form, choices):
    protected = ProtectedClassifier(classifier(form), purifier(form, **choices), NoDetector()).eval()
    graph = export_protected(protected)
    assert [value.name for value in graph.graph.output] == BARE
    chosen = set()
    for start, batch in ((0, 1), (1, 7), (8, 40)):
        part = x[start : start + batch]
        values, output = run(graph, part), protected(part)
        np.testing.assert_allclose(values["undefended_logits"], output.undefended_logits, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(values["purified"], output.purified, atol=1e-5)
        np.testing.assert_allclose(values["logits"], output.logits, atol=1e-4, rtol=1e-4)
        assert values["class_index"].tolist() == output.logits.argmax(1).tolist()
        assert np.abs(values["purified"] - part.numpy()).max() > 0.01
        seen = protected.raw_pass(part)
        chosen |= set(
            protected.purifier.nearest(part, seen.activations[protected.purifier.layer], seen.logits).tolist()
        )
    assert len(chosen) > 3 or protected.purifier.config.template_sizes == (0,)
    assert check_export(graph, protected, x[:30]) < 1e-4


@pytest.mark.parametrize(("inspects", "fusion"), [("raw", False), ("purified", True)])
def test_the_graph_with_an_inspector_equals_torch(classifier, purifier, inspector, x, inspects, fusion):
    subject = classifier("linear")
    threshold = [0.1 * index for index in range(10)] if fusion else 0.3
    watching = inspector(subject, inspects, fusion=fusion)
    protected = ProtectedClassifier(subject, purifier(template="class"), watching, threshold).eval()
    graph = export_protected(protected)
    for batch in (1, 7):
        values, output = run(graph, x[:batch]), protected(x[:batch])
        np.testing.assert_allclose(values["score"], output.scores.detach(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(values["logits"], output.logits, atol=1e-4, rtol=1e-4)
        assert values["alert"].tolist() == output.alerts.tolist()
    assert check_export(graph, protected, x[:30]) < 1e-4


def test_the_last_layer_can_be_looked_at_too(classifier, x):
    subject = classifier("linear")
    layer = subject.resolve_layer("logits")
    plan = NipPlan(candidates=40, k1=2, k2=2, precision="float32")
    images = (x * 255).round().to(torch.uint8)
    made = build_pool(
        subject, layer, images, subject(x).argmax(1), plan, device=CPU, progress=lambda stage, done, total: None
    )
    moved = InversePerturbation(made.config, head_behind(subject, layer))
    moved.set_pool(made.pool)
    protected = ProtectedClassifier(subject, moved, NoDetector()).eval()
    assert check_export(export_protected(protected), protected, x[:20]) < 1e-4


def test_a_regulator_goes_without_a_detector_too(classifier, x):
    regulator = Regulator(RegulatorConfig((1, 8, 8), channels=(4, 4), skip_channels=(2, 2)))
    protected = ProtectedClassifier(classifier("linear"), regulator, NoDetector()).eval()
    graph = export_protected(protected)
    assert [value.name for value in graph.graph.output] == BARE
    assert check_export(graph, protected, x[:10]) < 1e-4


def test_the_graph_of_a_regulator_and_an_inspector_has_the_parts_it_had(classifier, inspector):
    subject = classifier("linear")
    regulator = Regulator(RegulatorConfig((1, 8, 8), channels=(4, 4), skip_channels=(2, 2)))
    protected = ProtectedClassifier(subject, regulator, inspector(subject), 0.0).eval()
    graph = export_protected(protected).graph
    assert [value.name for value in graph.input] == ["image", "noise_scale"]
    assert [value.name for value in graph.output] == [*BARE[:2], "score", "alert", *BARE[2:]]
    parts = list(dict.fromkeys(node.name.partition("/")[0] for node in graph.node))
    distance = ["difference", "flat_difference", "distance"]
    indices = ["class_index", "undefended_class_index"]
    assert parts == ["purifier", "raw", "purified", *distance, "detector", *indices, "alert"]
    assert [tensor.name for tensor in graph.initializer][-3:] == ["threshold", "columns", "noise_scale"]


def test_a_graph_with_another_pool_is_told_from_this_one(classifier, purifier, x):
    protected = ProtectedClassifier(classifier("linear"), purifier(), NoDetector()).eval()
    graph = export_protected(protected)
    protected.purifier.set_amplitude(0.5)
    with pytest.raises(ExportBroken, match="purified differs"):
        check_export(graph, protected, x[:20])
    protected.purifier.set_amplitude(1.0)
    pool = protected.purifier.pool
    protected.purifier.set_pool(pool._replace(perturbations=pool.perturbations.roll(1, 0)))
    with pytest.raises(ExportBroken, match="purified differs"):
        check_export(graph, protected, x[:20])


def test_rounding_may_tip_the_choice_for_fewer_than_half_of_the_images(classifier, purifier, x):
    protected = ProtectedClassifier(classifier("linear"), purifier(template="class"), NoDetector()).eval()
    graph = export_protected(protected)
    seen = protected.raw_pass(x[:20])
    own = protected.purifier.nearest

    def tipped(count: int):
        return lambda *shown: own(*shown).index_fill(0, torch.arange(count), 0)

    assert (own(x[:20], seen.activations[protected.purifier.layer], seen.logits) > 0).all()
    protected.purifier.nearest = tipped(9)
    assert check_export(graph, protected, x[:20]) < 1e-4
    protected.purifier.nearest = tipped(10)
    with pytest.raises(ExportBroken, match="purified differs"):
        check_export(graph, protected, x[:20])


def test_a_head_that_needs_autograd_is_measured_and_not_exported(classifier, purifier, x):
    protected = ProtectedClassifier(classifier("smooth"), purifier("smooth"), NoDetector()).eval()
    answers = run_batched(protected, x, CPU)
    assert answers.logits.isfinite().all()
    with pytest.raises(HeadUnsuitable, match=r"cannot be served as one graph.*\(Sigmoid\)"):
        export_protected(protected)


def test_a_control_is_not_exported(classifier, purifier):
    protected = ProtectedClassifier(classifier("linear"), purifier(), NoDetector()).eval()
    protected.purifier.control = "random"
    with pytest.raises(PurifierNotExportable, match="'random'"):
        export_protected(protected)

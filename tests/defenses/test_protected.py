"""The spine in torch, its checkpoint, and the one ONNX graph that it becomes."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from defenses.architectures import cifar_resnet
from defenses.checkpoint import CheckpointUnreadable, load_protected, save_protected
from defenses.classifier import Classifier
from defenses.coophance import Fluctuation, Inspector, InspectorConfig, Regulator, RegulatorConfig
from defenses.detector import Evidence
from defenses.onnx_export import ExportBroken, check_export, export_protected, save_graph
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier

pytestmark = pytest.mark.long

OFF = torch.zeros(())
SHAPE = (3, 32, 32)
SMALL = RegulatorConfig(SHAPE, channels=(8,), skip_channels=(4,))


@pytest.fixture(scope="module")
def classifier(randomised) -> Classifier:
    network = randomised(cifar_resnet(8))
    with torch.no_grad():
        network.linear.bias -= network(various(64)).mean(0)
    return Classifier(export_classifier(network, SHAPE)).eval()


@pytest.fixture(scope="module")
def exported(classifier) -> tuple[ProtectedClassifier, onnx.ModelProto]:
    """A protected classifier of the default Regulator, and its graph; both are only read."""
    protected = protect(classifier)
    return protected, export_protected(protected)


def various(count: int) -> torch.Tensor:
    """Return images of many colours, which the classifier gives many classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, *SHAPE, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator)


def protect(
    classifier: Classifier,
    *,
    config: RegulatorConfig | None = None,
    threshold: float | list[float] = 0.1,
    **inspects: Any,
) -> ProtectedClassifier:
    torch.manual_seed(1)
    regulator = Regulator(config or RegulatorConfig(SHAPE))
    for layer in regulator.confusion_layers:
        layer.imitate(Fluctuation(torch.rand_like(layer.mu), torch.rand_like(layer.sigma)))
    tap = classifier.tap
    inspector = Inspector(replace(InspectorConfig(tap.name, tap.shape, classifier.classes), **inspects))
    nn.init.normal_(inspector.weight, std=0.01)
    nn.init.normal_(inspector.bias)
    if inspector.fusion is not None:
        nn.init.normal_(inspector.fusion.linear)
        nn.init.normal_(inspector.fusion.quadratic, std=0.1)
    return ProtectedClassifier(classifier, regulator, inspector, threshold).eval()


def run(graph: onnx.ModelProto, x: torch.Tensor, *, quiet: bool) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in graph.graph.output]
    noise = {"noise_scale": np.zeros((), np.float32)} if quiet else {}
    return dict(zip(names, session.run(names, {"image": x.numpy(), **noise}), strict=True))


@pytest.mark.parametrize("inspects", ["raw", "purified"])
def test_output_composes_purifier_classifier_and_detector(classifier, inspects):
    protected = protect(classifier, inspects=inspects)
    x = torch.rand(5, *SHAPE)
    output = protected(x, OFF)
    purified = protected.purifier(x, OFF)
    watched = x if inspects == "raw" else purified
    distance = (purified - x).flatten(1).norm(dim=1)
    activations = classifier.features(watched, classifier.tap.name)
    scores = protected.detector(*Evidence(activations, classifier(purified), classifier(x), distance))
    torch.testing.assert_close(output.purified, purified)
    torch.testing.assert_close(output.logits, classifier(purified))
    torch.testing.assert_close(output.undefended_logits, classifier(x))
    torch.testing.assert_close(output.scores, scores)
    assert torch.equal(output.alerts, scores > 0.1)
    assert output.alerts.any() or scores.max() <= 0.1


@pytest.mark.parametrize("inspects", ["raw", "purified"])
def test_the_detector_is_shown_what_both_passes_leave(classifier, inspects):
    protected = protect(classifier, config=RegulatorConfig(SHAPE, confusion=False), inspects=inspects)
    x = torch.rand(5, *SHAPE)
    evidence, output = protected.evidence(x), protected(x)
    torch.testing.assert_close(evidence.logits, output.logits)
    torch.testing.assert_close(evidence.undefended_logits, output.undefended_logits)
    torch.testing.assert_close(evidence.distance, (output.purified - x).square().sum((1, 2, 3)).sqrt())
    torch.testing.assert_close(protected.activations(x), evidence.activations)
    torch.testing.assert_close(protected.detector(*evidence), output.scores)
    assert evidence.activations.shape == (5, *classifier.tap.shape)


def test_a_score_is_held_against_the_threshold_of_the_class_that_is_answered(classifier):
    x = various(64)
    # A fresh residual Regulator changes nothing, so that the answers are as various as the bare ones.
    config = replace(SMALL, output="residual", confusion=False)
    with torch.no_grad():
        scores = protect(classifier, config=config, fusion=True)(x, OFF).scores
        low, high = scores.quantile(0.25).item(), scores.quantile(0.75).item()
        thresholds = [low if index % 2 else high for index in range(classifier.classes)]
        protected = protect(classifier, config=config, fusion=True, threshold=thresholds)
        output = protected(x, OFF)
    answered = output.logits.argmax(1)
    assert output.alerts.tolist() == [
        bool(score > thresholds[c]) for score, c in zip(output.scores, answered, strict=True)
    ]
    between = (output.scores > low) & (output.scores <= high)
    assert 0 < output.alerts[between].sum() < between.sum(), "the same scores are alerted or not, by class"
    values = run(export_protected(protected), x, quiet=True)
    assert values["class_index"].tolist() == answered.tolist()
    assert values["alert"].tolist() == output.alerts.tolist()


@pytest.mark.parametrize("fusion", [False, True])
def test_a_protected_classifier_can_be_attacked_through(classifier, fusion):
    protected = protect(classifier, fusion=fusion)
    for goal in ("logits", "scores"):
        x = torch.rand(2, *SHAPE, requires_grad=True)
        getattr(protected(x), goal).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("form", "inspects"),
    [
        (RegulatorConfig, {"inspects": "raw"}),
        (RegulatorConfig, {"inspects": "purified", "fusion": True}),
        (RegulatorConfig.plain, {"inspects": "raw", "fusion": True, "pool": 4}),
        (RegulatorConfig.plain, {"inspects": "purified", "pool": 3}),
    ],
)
def test_graph_equals_torch_with_the_noise_off(classifier, form, inspects):
    protected = protect(classifier, config=form(SHAPE), **inspects)
    graph = export_protected(protected)
    for batch in (1, 7):
        x = torch.rand(batch, *SHAPE)
        values, output = run(graph, x, quiet=True), protected(x, OFF)
        np.testing.assert_allclose(values["logits"], output.logits.detach(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(values["score"], output.scores.detach(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(values["purified"], output.purified.detach(), atol=1e-5)
        np.testing.assert_allclose(values["undefended_logits"], output.undefended_logits, atol=1e-4, rtol=1e-4)
        assert values["class_index"].tolist() == output.logits.argmax(1).tolist()
        assert values["undefended_class_index"].tolist() == output.undefended_logits.argmax(1).tolist()
        assert values["alert"].tolist() == output.alerts.tolist()
    assert check_export(graph, protected, torch.rand(4, *SHAPE)) < 1e-4


def test_graph_equals_torch_in_distribution_with_the_noise_on(classifier):
    protected = protect(classifier, inspects="purified")
    graph = export_protected(protected)
    x = torch.rand(1, *SHAPE).expand(400, *SHAPE).contiguous()
    with torch.no_grad():
        output = protected(x)
    values = run(graph, x, quiet=False)
    for ours, theirs in (
        (values["score"][:, None], output.scores[:, None]),
        (values["logits"], output.logits),
        (values["purified"].mean((2, 3)), output.purified.mean((2, 3))),
    ):
        sample = torch.from_numpy(ours)
        error = (sample.var(0) / 400 + theirs.var(0) / 400).sqrt()
        assert ((sample.mean(0) - theirs.mean(0)).abs() < 4.5 * error).all()
        torch.testing.assert_close(sample.std(0), theirs.std(0), rtol=0.25, atol=0)
        assert theirs.std(0).min() > 1e-4


def test_graph_draws_fresh_noise_for_every_run_and_every_image(exported):
    _, graph = exported
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.repeat(np.random.default_rng(0).random((1, *SHAPE), np.float32), 2, axis=0)
    (first,), (second,) = (session.run(["logits"], {"image": x}) for _ in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


def test_confusion_that_is_off_leaves_no_noise_in_the_graph(classifier):
    protected = protect(classifier, config=replace(SMALL, confusion=False))
    graph = export_protected(protected)
    assert not [node for node in graph.graph.node if node.op_type.startswith("Random")]
    x = torch.rand(2, *SHAPE)
    assert np.array_equal(run(graph, x, quiet=False)["logits"], run(graph, x, quiet=False)["logits"])


def test_both_passes_share_the_classifiers_weights(classifier, exported):
    _, graph = exported
    own = {tensor.name for tensor in classifier.model.graph.initializer}
    copies = [tensor.name for tensor in graph.graph.initializer if tensor.name.startswith("classifier/")]
    assert sorted(copies) == sorted(f"classifier/{name}" for name in own)


def test_a_classifier_from_an_older_opset_is_brought_up(randomised, export_by_script):
    old = export_by_script(randomised(cifar_resnet(8)), torch.rand(2, *SHAPE), 17)
    classifier = Classifier(canonicalise(old, normalisation=None)).eval()
    assert {entry.version for entry in classifier.model.opset_import if not entry.domain} == {17}
    protected = protect(classifier, config=SMALL)
    check_export(export_protected(protected), protected, torch.rand(3, *SHAPE))


def test_a_classifier_from_a_newer_opset_than_the_noise_runs_in_is_brought_down(randomised):
    classifier = Classifier(export_classifier(randomised(cifar_resnet(8)), SHAPE, opset=23)).eval()
    protected = protect(classifier, config=SMALL)
    graph = export_protected(protected)
    check_export(graph, protected, torch.rand(3, *SHAPE))
    assert np.isfinite(run(graph, torch.rand(2, *SHAPE), quiet=False)["logits"]).all()


def test_a_graph_that_computes_something_else_is_refused(classifier, exported):
    _, graph = exported
    protected = protect(classifier)
    protected.detector.bias.data += 1
    with pytest.raises(ExportBroken, match="score differs"):
        check_export(graph, protected, torch.rand(3, *SHAPE))


@pytest.mark.parametrize("threshold", [0.1, [0.25 * index - 1 for index in range(10)]])
def test_checkpoint_gives_back_the_same_defense(classifier, tmp_path, threshold):
    protected = protect(classifier, config=RegulatorConfig.plain(SHAPE), threshold=threshold, fusion=True, pool=2)
    save_protected(protected, tmp_path / "checkpoint")
    loaded = load_protected(classifier, tmp_path / "checkpoint")
    x = torch.rand(3, *SHAPE)
    for ours, theirs in zip(loaded(x, OFF), protected(x, OFF), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.purifier.config == protected.purifier.config
    assert loaded.detector.config == protected.detector.config
    assert torch.equal(loaded.threshold, protected.threshold)
    assert loaded.threshold.tolist() == pytest.approx(threshold)
    assert [layer.sigma.sum() for layer in loaded.purifier.confusion_layers] == [
        layer.sigma.sum() for layer in protected.purifier.confusion_layers
    ]


@pytest.mark.parametrize("damage", ["absent", "garbage", "foreign"])
def test_a_damaged_checkpoint_is_refused_by_name(classifier, tmp_path, damage):
    save_protected(protect(classifier), tmp_path)
    path = tmp_path / "regulator.safetensors"
    if damage == "absent":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"not safetensors at all")
    else:
        save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises((CheckpointUnreadable, FileNotFoundError), match=r"regulator\.safetensors"):
        load_protected(classifier, tmp_path)


def test_large_weights_go_to_a_file_beside_the_graph(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("defenses.onnx_export.EXTERNAL_DATA_BYTES", 1000)
    protected, graph = exported
    written = onnx.ModelProto()
    written.CopyFrom(graph)  # what is written outside a graph is taken out of it
    save_graph(written, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size > 1_000_000
    check_export(onnx.load(tmp_path / "model.onnx"), protected, torch.rand(2, *SHAPE))

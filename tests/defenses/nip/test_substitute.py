"""A substitute learnt from a classifier that is only called: an ONNX Runtime session, which has no gradients."""

from collections import Counter
from dataclasses import replace

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from defenses.architectures import ArchitectureNotFound
from defenses.nip import InversePerturbation, NipPlan, build_pool, head_behind
from defenses.nip.black_box import AnswerUnsuitable, Asked, BlackBox, ClassesNeverAnswered
from defenses.nip.substitute import Substitute, SubstituteUnsuitable, TooFewImages, distil, untrained_substitute
from defenses.nip.substitute_training import SubstituteDiverged, SubstitutePlan, SubstituteTraining, network
from defenses.stages import Stages

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
PLAN = SubstitutePlan(epochs=5, flip=False)
SMALL = """
from torch import nn

def small(classes):
    maps = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*maps, nn.BatchNorm1d(144), nn.Dropout(0.1), nn.Linear(144, classes))
"""


class CutError(RuntimeError):
    """What ends a job half-way here."""


class Remote:
    """A classifier behind a call, which notes what it is asked and how, and fails from some image on."""

    def __init__(self, model: bytes, *, labels: bool = False, fails_after: int | None = None) -> None:
        self.session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.labels, self.fails_after = labels, fails_after
        self.asked: Counter[bytes] = Counter()
        self.gradients: set[bool] = set()
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        if self.fails_after is not None and self.asked.total() + len(x) > self.fails_after:
            raise ConnectionError("the line is dead")
        assert (x.dtype, x.device.type) == (torch.float32, "cpu")
        assert 0 <= x.min() <= x.max() <= 1
        self.gradients.add(torch.is_grad_enabled() or x.requires_grad)
        self.sizes.append(len(x))
        self.asked.update(image.numpy().tobytes() for image in x)
        logits = torch.from_numpy(self.session.run(["logits"], {"image": x.numpy()})[0])
        return logits.argmax(1) if self.labels else logits


def quiet(*_: object) -> None:
    pass


def learn(answer, splits, folder, plan: SubstitutePlan = PLAN, progress=quiet) -> Substitute:
    images, held_out = splits.fit.images, splits.validation.images
    return distil(answer, SHAPE, 10, images, held_out, plan, stages=Stages(folder), device=CPU, progress=progress)


def ask(answer, splits, folder, kind="label", progress=quiet) -> Asked:
    rows = torch.arange(300)
    return BlackBox(answer, 10, 64, Stages(folder), progress).ask(splits.fit.images, rows, kind, "answers")


def images_in(x: Tensor) -> Counter[bytes]:
    return Counter((image.float() / 255).numpy().tobytes() for image in x)


@pytest.fixture(scope="module")
def model(classifier) -> bytes:
    return classifier("linear").model.SerializeToString()


@pytest.fixture(scope="module")
def learnt(model, splits, tmp_path_factory):
    """The folder of a finished job, the substitute that it gave, and the remote classifier that was asked."""
    folder, remote = tmp_path_factory.mktemp("substitute"), Remote(model)
    return folder, learn(remote, splits, folder), remote


@pytest.fixture
def small(tmp_path, monkeypatch) -> str:
    """The spec of an architecture of the user's own, which takes digits."""
    (tmp_path / "small_substitute.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return "small_substitute:small"


def test_a_substitute_agrees_with_the_original_far_beyond_a_constant_answer(learnt, classifier, splits):
    _, substitute, _ = learnt
    x = splits.validation.images.float() / 255
    with torch.no_grad():
        original, own = classifier("linear")(x).argmax(1), substitute.classifier(x).argmax(1)
    assert substitute.agreement == pytest.approx((original == own).float().mean().item())
    assert substitute.commonest_share == pytest.approx(max(Counter(original.tolist()).values()) / 300)
    assert substitute.commonest_share < 0.25
    assert substitute.agreement > 0.8
    assert substitute.losses[-1] < substitute.losses[0]
    assert len(substitute.losses) == PLAN.epochs
    assert all(seconds > 0 for seconds in substitute.seconds.values())


def test_every_image_is_asked_once_and_no_gradient_ever(learnt, splits):
    _, substitute, remote = learnt
    assert remote.asked == images_in(torch.cat([splits.fit.images, splits.validation.images]))
    assert (substitute.training_queries, substitute.held_out_queries, substitute.queries) == (800, 300, 1100)
    assert sum(remote.sizes) == 1100
    assert max(remote.sizes) == PLAN.batch_size
    assert remote.gradients == {False}


def test_a_finished_job_asks_nothing_again_and_leaves_the_random_state_alone(learnt, model, splits):
    folder, substitute, _ = learnt
    remote = Remote(model)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = learn(remote, splits, folder)
    assert torch.equal(torch.rand(3), expected)
    assert not remote.asked
    x = splits.test.images.float() / 255
    with torch.no_grad():
        assert torch.equal(again.classifier(x), substitute.classifier(x))
    assert replace(again, classifier=substitute.classifier) == substitute


def test_inverse_perturbations_are_made_of_the_substitute_alone(learnt, model, splits):
    _, substitute, remote = learnt
    subject, before = substitute.classifier, remote.asked.total()
    layer = subject.head_layer
    assert layer.shape == (512,)
    plan = NipPlan(candidates=40, template="class", similarity="influence")
    built = build_pool(subject, layer, *splits.fit, plan, device=CPU, progress=quiet)
    purifier = InversePerturbation(built.config, head_behind(subject, layer))
    purifier.set_pool(built.pool)
    purifier.set_amplitude(0.05)
    assert remote.asked.total() == before
    x = splits.test.images[:100].float() / 255
    with torch.no_grad():
        undefended, activations = subject.logits_and_features(x, layer.name)
        moved = purifier.eval()(x, torch.ones(()), activations, undefended)
    assert not torch.equal(moved, x)
    kept = Remote(model, labels=True)
    assert (kept(moved) == kept(x)).float().mean() > 0.9


def test_labels_tell_as_much_as_logits_where_only_labels_are_learnt(model, splits, tmp_path):
    logits, labels = (ask(Remote(model, labels=flag), splits, tmp_path / str(flag)) for flag in (False, True))
    assert logits.answers.dtype == torch.int64
    assert torch.equal(logits.answers, labels.answers)


def test_probabilities_and_logits_are_told_apart(model, splits, tmp_path):
    remote = Remote(model)
    logits = ask(remote, splits, tmp_path / "logits", "probabilities")
    rounded = ask(lambda x: remote(x).softmax(1).mul(1000).round() / 1000, splits, tmp_path / "p", "probabilities")
    assert torch.equal(logits.probabilities, logits.answers.softmax(1))
    assert not torch.equal(logits.probabilities, logits.answers)
    torch.testing.assert_close(rounded.probabilities, logits.probabilities, atol=5e-3, rtol=0)
    torch.testing.assert_close(rounded.probabilities.sum(1), torch.ones(300))
    assert torch.equal(logits.labels, logits.answers.argmax(1))


def test_a_substitute_learns_probabilities_too(model, splits, small, tmp_path):
    plan = replace(PLAN, architecture=small, answers="probabilities", epochs=40, learning_rate=0.02, augmentation=False)
    rows, (held_out, _) = torch.arange(300), splits.validation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        asked = ask(Remote(model), splits, tmp_path / "stages", plan.answers)
        training = SubstituteTraining(network(SHAPE, 10, plan), splits.fit.images, rows, asked.probabilities, plan, CPU)
        training.run(Stages(tmp_path / "stages"), quiet)
    x = held_out.float() / 255
    with torch.no_grad():
        answers = training.model.eval()((x - 0.5) / 0.25).argmax(1)
    assert (answers == Remote(model, labels=True)(x)).float().mean() > 0.7


def test_answers_are_not_asked_for_again_after_the_line_broke(model, splits, tmp_path):
    whole = ask(Remote(model), splits, tmp_path / "whole")
    first, second = Remote(model, fails_after=200), Remote(model)
    with pytest.raises(ConnectionError, match="the line is dead"):
        ask(first, splits, tmp_path / "cut")
    assert first.asked.total() == 192
    assert Stages(tmp_path / "cut").names() == ["answers, partial"]
    told: list[int] = []
    asked = ask(second, splits, tmp_path / "cut", progress=lambda stage, done, total: told.append(done))
    assert told == [256, 300]
    assert first.asked + second.asked == images_in(splits.fit.images[:300])
    assert torch.equal(asked.answers, whole.answers)
    assert Stages(tmp_path / "cut").names() == ["answers"]


def test_a_training_goes_on_where_it_was_cut_off_to_the_same_result(splits, small, tmp_path, monkeypatch):
    monkeypatch.setattr("defenses.nip.substitute_training.KEEP_EVERY", 0)
    images, targets = splits.fit
    plan, rows = (
        replace(PLAN, architecture=small, epochs=4),
        torch.arange(193),
    )  # a last batch of one, which has no statistics

    def training() -> SubstituteTraining:
        torch.manual_seed(0)
        return SubstituteTraining(network(SHAPE, 10, plan), images, rows, targets[rows], plan, CPU)

    def cut(stage: str, done: int, total: int) -> None:
        if done == 3:
            raise CutError

    with torch.random.fork_rng(devices=[]):
        whole = training()
        whole.run(Stages(tmp_path / "whole"), quiet)
        with pytest.raises(CutError):
            training().run(Stages(tmp_path / "cut"), cut)
        assert Stages(tmp_path / "cut").names() == ["substitute training, partial"]
        resumed, told = training(), []
        resumed.run(Stages(tmp_path / "cut"), lambda stage, done, total: told.append(done))
    assert told == [3, 4]
    assert resumed.losses == whole.losses
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    assert Stages(tmp_path / "cut").names() == ["substitute training"]


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        (lambda x: x[:, :9], "label", r"logits of shape \(64, 10\), or labels of shape \(64,\), got torch.float32 of "),
        (lambda x: x[1:].argmax(1), "label", r"integer labels of shape \(64,\), got torch.int64 of shape \(63,\)"),
        (lambda x: x[:, 0], "label", r"integer labels of shape \(64,\), got torch.float32"),
        (lambda x: x.argmax(1) - 1, "label", r"labels from 0 to 9, got labels from -1 to 8"),
        (lambda x: x.argmax(1), "probabilities", r"logits of shape \(64, 10\), got torch.int64 of shape \(64,\)"),
        (lambda x: x.index_fill(0, torch.tensor([3]), torch.nan), "label", "finite values, got others for 1 of 64"),
        (lambda x: x.index_fill(0, torch.tensor([3, 5]), torch.inf), "probabilities", "others for 2 of 64 images"),
        (lambda x: x.numpy(), "label", "a tensor, got ndarray"),
    ],
)
def test_answers_that_nothing_can_be_learnt_from_are_refused(model, splits, tmp_path, change, kind, told):
    remote = Remote(model)
    with pytest.raises(AnswerUnsuitable, match=told):
        ask(lambda x: change(remote(x)), splits, tmp_path / "stages", kind)
    assert not (tmp_path / "stages").exists()


def test_classes_never_answered_are_named_when_the_queries_are_spent(model, splits, small, tmp_path):
    remote = Remote(model, labels=True)
    plan = replace(PLAN, architecture=small, queries=100, batch_size=32)
    with pytest.raises(ClassesNeverAnswered, match=r"100 answers to name each of 10 classes, but none named 3, 7:"):
        learn(lambda x: remote(x).apply_(lambda c: 0 if c in (3, 7) else c), splits, tmp_path / "stages", plan)
    assert remote.sizes == [32, 32, 32, 4]
    assert max(remote.asked.values()) == 1
    assert remote.asked <= images_in(splits.fit.images)
    assert Stages(tmp_path / "stages").names() == ["substitute answers"]


@pytest.mark.parametrize(
    ("choices", "fitting", "held_out", "error", "told"),
    [
        ({}, 9, 300, TooFewImages, "Expected 10 or more images to ask about, one for each class, got 9"),
        ({"queries": 8}, 800, 300, TooFewImages, "Expected 10 or more images to ask about, one for each class, got 8"),
        ({}, 800, 0, TooFewImages, "Expected 1 or more held-out images to measure agreement on, got 0"),
        ({"architecture": "cifar_resnet20"}, 800, 300, SubstituteUnsuitable, r"for images of shape \(1, 8, 8\): "),
        ({"architecture": "torch.nn:Flatten"}, 800, 300, SubstituteUnsuitable, r"of shape \(2, 10\) of two, got \(2, "),
        ({"architecture": "nowhere:net"}, 800, 300, ArchitectureNotFound, "the module 'nowhere' does not import"),
    ],
)
def test_what_cannot_be_is_refused_before_a_query_is_spent(splits, tmp_path, choices, fitting, held_out, error, told):
    def answer(x: Tensor) -> Tensor:
        raise AssertionError("nothing was to be asked")

    cut = splits._replace(
        fit=splits.fit._replace(images=splits.fit.images[:fitting]),
        validation=splits.validation._replace(images=splits.validation.images[:held_out]),
    )
    with pytest.raises(error, match=told):
        learn(answer, cut, tmp_path / "stages", replace(PLAN, **choices))
    assert not (tmp_path / "stages").exists()


def test_images_of_another_shape_are_refused(model, splits, tmp_path):
    wide = splits._replace(validation=splits.validation._replace(images=torch.zeros(20, 1, 8, 9, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"Expected images of shape \('N', 1, 8, 8\), got \(20, 1, 8, 9\)"):
        learn(Remote(model), wide, tmp_path / "stages")


def test_a_training_that_diverges_is_told(splits, small, tmp_path):
    images, targets = splits.fit
    plan = replace(PLAN, architecture=small, learning_rate=1e30)
    with torch.random.fork_rng(devices=[]):
        model = network(SHAPE, 10, plan)
        training = SubstituteTraining(model, images, torch.arange(800), targets, plan, CPU)
        with pytest.raises(SubstituteDiverged, match=r"not finite in epoch 1: .* less than 1e\+30"):
            training.run(Stages(tmp_path / "stages"), quiet)
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"answers": "features"}, "answers to be label or probabilities, got 'features'"),
        ({"queries": 1}, "queries of 2 or more, got 1"),
        ({"held_out_queries": 0}, "held_out_queries of 1 or more, got 0"),
        ({"epochs": 0}, "epochs of 1 or more, got 0"),
        ({"batch_size": 1}, "batch_size of 2 or more, got 1"),
        ({"seed": -1}, "seed of 0 or more, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate above 0, got nan"),
        ({"label_smoothing": 1.0}, "label_smoothing from 0 to below 1, got 1.0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(choices, told):
    with pytest.raises(ValueError, match=told):
        SubstitutePlan(**choices)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 224, 224), (1, 3, 5)])
def test_the_network_by_default_suits_images_small_and_large(shape):
    with torch.random.fork_rng(devices=[]):
        model = network(shape, 7, SubstitutePlan()).eval()
    shapes: list[tuple[int, ...]] = []
    for layer in model:
        layer.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        assert model(torch.zeros(2, *shape)).shape == (2, 7)
    maps = [each for each in shapes if each[2:] != (1, 1) and len(each) == 4]
    assert maps[-1][1] == 512
    assert max(maps[-1][2:]) <= 7


def test_an_untrained_substitute_has_the_layers_of_the_trained_one(learnt):
    _, substitute, _ = learnt
    untrained = untrained_substitute(SHAPE, 10, PLAN)
    assert untrained.layers() == substitute.classifier.layers()
    assert untrained.head_layer == substitute.classifier.head_layer

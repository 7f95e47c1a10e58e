"""Attacks that know the defense, on a small classifier behind a noisy Regulator and an Inspector that was fitted."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from defenses.attacks import Attack, AttackUnknown, attack, craft
from defenses.attacks.eot import expected_gradient
from defenses.attacks.evasion import Furthest
from defenses.attacks.orthogonal import direction
from defenses.attacks.transfer import transferred
from defenses.attacks.victim import DefenseOpaque, Seen, Victim
from defenses.classifier import Classifier
from defenses.coophance import Fluctuation, Inspector, InspectorConfig, Regulator, RegulatorConfig
from defenses.detector import Evidence, NoDetector
from defenses.nip.black_box import BlackBox
from defenses.nip.substitute_training import DEVIATION, MEAN, SubstitutePlan, SubstituteTraining
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier
from defenses.purifier import Purifier
from defenses.stages import Stages

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
EPSILON = 80 / 255
BALL = "epsilon=80/255,step_size=8/255"
SEARCH = "searches=2,steps=25,step_size=0.05"
SHORT = (
    f"eot-pgd:{BALL},steps=4,random_start=0,samples=2",
    f"joint:{BALL},steps=5",
    f"orthogonal-pgd:{BALL},steps=5",
    f"selective-pgd:{BALL},steps=5",
    "coophance-adaptive:searches=2,steps=4,step_size=0.1,w=1/100",
)
CRAFTED = f"eot-pgd:{BALL},steps=15,random_start=0,samples=1"
NEED_A_VICTIM = SHORT[1:]


class Digits(NamedTuple):
    """Handwritten digits, float (N, 1, 8, 8) in [0, 1] on the grid of 8 bits, and their classes (N,)."""

    x: Tensor
    y: Tensor


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = load_digits()
    return Digits(
        torch.from_numpy(data.images * 255 / 16).round().float().unsqueeze(1) / 255, torch.tensor(data.target)
    )


@pytest.fixture(scope="module")
def classifier(digits) -> Classifier:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        features = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        layers = nn.Sequential(*features, nn.Flatten(), nn.Linear(8 * 16, 10))
        optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
        for _ in range(50):
            loss = nn.functional.cross_entropy(layers(digits.x[:500]), digits.y[:500])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Classifier(canonicalise(export_classifier(layers.eval(), SHAPE))).eval()


@pytest.fixture(scope="module")
def regulator() -> Regulator:
    """A small Regulator whose confusion layers shake the image a little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = Regulator(RegulatorConfig(SHAPE, channels=(4, 4), skip_channels=(2, 2), output="residual")).eval()
        nn.init.normal_(made.to_image.weight, std=0.2)
    for layer in made.confusion_layers:
        layer.imitate(Fluctuation(torch.zeros_like(layer.mu), torch.full_like(layer.sigma, 0.5)))
    return made


@pytest.fixture(scope="module")
def protected(digits, classifier, regulator) -> ProtectedClassifier:
    """The classifier behind the Regulator, and an Inspector of regressions that tell PGD's images from clean ones."""
    tap, x, y = classifier.tap, digits.x[:150], digits.y[:150]
    with torch.no_grad():
        x_adv = attack(f"pgd:{BALL}").run(Victim(ProtectedClassifier(classifier, regulator, NoDetector())), x, y)
        seen = torch.cat([classifier.features(part, tap.name).flatten(1) for part in (x, x_adv)])
    regression = LogisticRegression(solver="liblinear").fit(seen.numpy(), [0] * 150 + [1] * 150)
    inspector = Inspector(InspectorConfig(tap.name, tap.shape, 10)).eval()
    inspector.weight.data = torch.from_numpy(regression.coef_).float().repeat(10, 1)
    inspector.bias.data = torch.from_numpy(regression.intercept_).float().repeat(10)
    whole = ProtectedClassifier(classifier, regulator, inspector).eval()
    with torch.no_grad():
        threshold = float(whole(digits.x[300:600]).scores.quantile(0.95))
    return ProtectedClassifier(classifier, regulator, inspector, threshold).eval()


@pytest.fixture(scope="module")
def quiet(protected) -> ProtectedClassifier:
    """The same without noise."""
    made = copy.deepcopy(protected)
    made.purifier.set_confusion(False)
    return made


@pytest.fixture(scope="module")
def undetected(protected) -> ProtectedClassifier:
    """The same without the Inspector."""
    return ProtectedClassifier(protected.classifier, protected.purifier, NoDetector()).eval()


@pytest.fixture(scope="module")
def images(digits, protected) -> Digits:
    """60 images that the defense accepts and gets right under most noises."""
    x, y = digits.x[900:1000], digits.y[900:1000]
    with torch.no_grad():
        seen = Victim(protected, 16).seen(x, y)
    fine = ((seen.margin < 0) & (seen.excess <= 0)).float().mean(1) > 0.9
    assert fine.sum() >= 60
    return Digits(x[fine][:60], y[fine][:60])


def run(text: str, model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return attack(text).run(model, x, y)


def on_fresh_noise(protected: ProtectedClassifier, x: Tensor, y: Tensor) -> Seen:
    with torch.no_grad():
        return Victim(protected, 32).seen(x, y)


def got_through(protected: ProtectedClassifier, x: Tensor, y: Tensor) -> Tensor:
    """Return (N,) bool which images are misclassified and not alerted under most of fresh noises."""
    return on_fresh_noise(protected, x, y).evaded.float().mean(1) > 0.5


def test_a_victim_is_seen_as_the_protected_classifier_answers(quiet, images):
    x, y = images.x[:10], (images.y[:10] + 1) % 10
    output, seen = quiet(x), Victim(quiet, 3).seen(x, y)
    torch.testing.assert_close(seen.excess, (output.scores - quiet.threshold).unsqueeze(1).expand(-1, 3))
    true = output.logits.gather(1, y.unsqueeze(1))
    others = output.logits.scatter(1, y.unsqueeze(1), -math.inf).amax(1, keepdim=True)
    torch.testing.assert_close(seen.margin, (others - true).expand(-1, 3))
    assert seen.wrong.all()
    for ours, theirs in zip(Victim(quiet, 2).output(x), output, strict=True):
        torch.testing.assert_close(ours, theirs.repeat_interleave(2, 0))
    torch.testing.assert_close(Victim(quiet, 3)(x), output.logits.log_softmax(1))


def test_every_class_has_its_own_excess_where_it_has_its_own_threshold(quiet, images):
    thresholds = [0.5 * c - 2 for c in range(10)]
    own = ProtectedClassifier(quiet.classifier, quiet.purifier, quiet.detector, thresholds).eval()
    output, seen = own(images.x), Victim(own).seen(images.x, images.y)
    expected = output.scores - torch.tensor(thresholds)[output.logits.argmax(1)]
    torch.testing.assert_close(seen.excess.squeeze(1), expected)
    assert torch.equal((seen.excess > 0).squeeze(1), output.alerts)
    assert 0 < output.alerts.sum() < len(images.x)


def test_a_score_or_a_margin_that_is_no_number_gets_nobody_through():
    nan, inf = math.nan, math.inf
    seen = Seen(torch.tensor([[1.0, 1.0, nan, 1.0, -1.0]]), torch.tensor([[-1.0, nan, -1.0, -inf, -1.0]]))
    assert seen.evaded.tolist() == [[True, False, False, True, False]]


@pytest.mark.parametrize("inspects", ["raw", "purified"])
def test_activations_are_those_of_each_noise_that_reaches_them(protected, images, inspects):
    tap = protected.classifier.tap
    detector = Inspector(InspectorConfig(tap.name, tap.shape, 10, inspects=inspects))
    victim = Victim(ProtectedClassifier(protected.classifier, protected.purifier, detector, 0.0), 3)
    found = victim.activations(images.x[:4])
    assert found.shape == (4, 3 if inspects == "purified" else 1, *tap.shape)
    spread = found.std(1, correction=0).amax((1, 2, 3))
    assert (spread > 1e-3).all() if inspects == "purified" else torch.equal(spread, torch.zeros(4))


@pytest.mark.parametrize("text", SHORT)
def test_attacks_leave_parameters_and_inputs_alone_and_stay_in_range(protected, images, text):
    x, y = images.x[:6].clone(), images.y[:6]
    x_adv = run(text, Victim(protected, 2), x, y)
    assert (x_adv.shape, x_adv.dtype) == (x.shape, x.dtype)
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert not x_adv.requires_grad
    assert torch.equal(x, images.x[:6])
    assert not torch.equal(x_adv, x)
    assert all(parameter.grad is None for parameter in protected.parameters())
    if "epsilon" in text:
        assert (x_adv - x).abs().max() <= EPSILON + 1e-6


@pytest.mark.parametrize("text", SHORT)
def test_without_noise_no_number_of_samples_and_no_neighbour_matters(quiet, images, text):
    x, y = images.x[:7], images.y[:7]
    together = run(text, Victim(quiet, 1), x, y)
    apart = torch.cat([run(text, Victim(quiet, 4), *part) for part in zip(x.split(3), y.split(3), strict=True)])
    assert ((together - apart).abs() < 1e-4).float().mean() > 0.99, "but for gradients that are all but 0"


@pytest.mark.parametrize("text", SHORT)
def test_the_same_seed_gives_the_same_examples_through_noise(protected, images, text):
    arguments = (Victim(protected, 2), images.x[:5], images.y[:5])
    assert torch.equal(run(text, *arguments), run(text, *arguments))
    assert not torch.equal(run(text, *arguments), run(text, *arguments, seed=1))


@pytest.mark.parametrize("text", NEED_A_VICTIM)
def test_what_is_no_victim_cannot_be_looked_into(classifier, images, text):
    with pytest.raises(DefenseOpaque, match=r"Expected a Victim, whose .* looks at, got a model of type Classifier\."):
        run(text, classifier, images.x[:2], images.y[:2])
    assert attack(text).facts.on == "defense"


@pytest.mark.parametrize("text", ["joint:samples=2", "eot-pgd:samples=0", "eot-pgd:random_start=2", "joint:kappa=-1"])
def test_bad_parameters_are_refused(text):
    with pytest.raises(AttackUnknown, match="eot-pgd"):
        attack(text)


class Counting(Victim):
    """Counts what it is asked, and each gradient as once more."""

    asked = 0

    def _note(self, answer: Tensor) -> None:
        self.asked += 1
        if answer.requires_grad:
            answer.register_hook(self._back)

    def _back(self, _: Tensor) -> None:
        self.asked += 1

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self._note(logits)
        return logits

    def seen(self, x: Tensor, y: Tensor) -> Seen:
        seen = super().seen(x, y)
        self._note(seen.margin)
        if seen.excess.requires_grad:
            seen.excess.register_hook(self._back)
        return seen

    def activations(self, x: Tensor) -> Tensor:
        activations = super().activations(x)
        self._note(activations)
        return activations


@pytest.mark.parametrize("name", ["eot-pgd", "joint", "orthogonal-pgd", "selective-pgd", "coophance-adaptive"])
def test_no_attack_asks_more_often_than_its_facts_say(quiet, images, name):
    # Of a twentieth of the usual length: what they ask grows with their steps.
    usual = attack(name)
    steps = usual.parameters["steps"] // 20
    counting = Counting(quiet)
    run(f"{name}:steps={steps}" + (",slack=50" if name == "joint" else ""), counting, images.x[:1], images.y[:1])
    times = 20 * usual.parameters.get("samples", 1)
    # The joint loss's one backward pass is met at both of the victim's outputs.
    met = counting.asked - (steps if name == "joint" else 0)
    assert 0.95 * usual.facts.passes <= times * met <= usual.facts.passes + times


def test_more_samples_bring_the_gradient_nearer_to_its_expectation(protected, images):
    victim, x, y = Victim(protected), images.x[:12], images.y[:12]
    torch.manual_seed(5)
    reference = expected_gradient(victim, x, y, 256)

    def nearness(samples: int) -> float:
        found = torch.stack([expected_gradient(victim, x, y, samples) for _ in range(4)])
        return float(nn.functional.cosine_similarity(found.flatten(2), reference.flatten(1).unsqueeze(0), dim=2).mean())

    one, four, many = nearness(1), nearness(4), nearness(32)
    assert one < four < many
    assert many > 0.95
    assert one < 0.93


def test_eot_pgd_starts_where_it_is_told(quiet, images):
    x, y = images.x[:8], images.y[:8]
    still, drawn = (
        [run(f"eot-pgd:{BALL},steps=1,random_start={start}", Victim(quiet), x, y, seed) for seed in (0, 1)]
        for start in (0, 1)
    )
    assert torch.equal(*still)
    assert (still[0] - x).abs().max() <= 8 / 255 + 1e-6
    assert not torch.equal(*drawn)
    assert (drawn[0] - x).abs().max() > 30 / 255


def test_eot_pgd_breaks_the_regulator_alone(undetected, images):
    x_adv = run(f"eot-pgd:{BALL},samples=4", Victim(undetected), *images)
    assert on_fresh_noise(undetected, x_adv, images.y).wrong.float().mean() > 0.9


@pytest.mark.parametrize("name", ["joint", "orthogonal-pgd", "selective-pgd"])
def test_attacks_on_label_and_score_get_through_where_pgd_is_alerted(protected, images, name):
    victim = Victim(protected, 2)
    plain = got_through(protected, run(f"pgd:{BALL},steps=15", victim, *images), images.y)
    x_adv = run(f"{name}:{BALL},steps=15", victim, *images)
    aware = got_through(protected, x_adv, images.y)
    assert (x_adv - images.x).abs().max() <= EPSILON + 1e-6
    assert aware.sum() > plain.sum() + 20
    assert aware.float().mean() > 0.8


@pytest.mark.parametrize("name", ["joint", "orthogonal-pgd", "selective-pgd"])
def test_without_a_detector_the_label_alone_is_attacked(undetected, images, name):
    x, y = images.x[:30], images.y[:30]
    x_adv = run(f"{name}:{BALL},steps=12", Victim(undetected, 2), x, y)
    assert on_fresh_noise(undetected, x_adv, y).wrong.float().mean() > 0.9


def test_the_joint_loss_knows_the_threshold_of_each_class(protected, images):
    # Alerted whatever the score but for three classes: what gets through is answered with one of those.
    thresholds = [1e6 if c in (2, 3, 8) else -1e6 for c in range(10)]
    own = ProtectedClassifier(protected.classifier, protected.purifier, protected.detector, thresholds).eval()
    others = ~torch.isin(images.y, torch.tensor([2, 3, 8]))
    x, y = images.x[others][:20], images.y[others][:20]
    x_adv = run("joint:epsilon=80/255,step_size=8/255,steps=20", Victim(own, 2), x, y)
    through = got_through(own, x_adv, y)
    assert through.any()
    with torch.no_grad():
        answers = Victim(own, 32)(x_adv[through]).argmax(1)
    assert torch.isin(answers, torch.tensor([2, 3, 8])).all()


def test_without_a_weight_the_joint_loss_forgets_the_detector(protected, images):
    victim = Victim(protected, 2)
    weighed, alone = (
        on_fresh_noise(protected, run(f"joint:{BALL},steps=10,{options}", victim, *images), images.y)
        for options in ("weight=1", "weight=0")
    )
    assert weighed.excess.mean() < alone.excess.mean() - 1
    assert alone.wrong.float().mean() > 0.9


def test_the_form_that_is_kept_got_through_most_often_then_fooled_most_often_then_gained_most():
    forms = torch.arange(1, 6).reshape(-1, 1, 1, 1).float() / 10
    furthest = Furthest(torch.zeros(1, 1, 1, 1))
    assert furthest.x_adv.item() == 0
    right, wrong, inside, outside = -1.0, 1.0, -1.0, 1.0
    offers = [
        ([right, right], [inside, inside], 9.0),
        ([wrong, wrong], [outside, outside], 1.0),
        ([wrong, right], [inside, inside], 0.0),
        ([wrong, wrong], [inside, outside], -2.0),
        ([wrong, wrong], [inside, outside], -1.0),
    ]
    for form, (margin, excess, gain) in zip(forms.split(1), offers, strict=True):
        furthest.offer(form, Seen(torch.tensor([margin]), torch.tensor([excess])), torch.tensor([gain]))
        assert torch.equal(furthest.x_adv, form)
    for form, (margin, excess, gain) in zip(forms.split(1), offers, strict=True):
        furthest.offer(form, Seen(torch.tensor([margin]), torch.tensor([excess])), torch.tensor([gain]))
    assert torch.equal(furthest.x_adv, forms[-1:])


def test_a_step_of_orthogonal_pgd_is_orthogonal_to_the_other_gradient():
    torch.manual_seed(0)
    label, unseen = torch.randn(6, *SHAPE), torch.randn(6, *SHAPE)
    label += 2 * unseen  # far from orthogonal
    label[5], unseen[4] = label[5] * 1e-30, unseen[4] * 1e-30
    second = torch.tensor([True, False, True, False, True, False])
    step = direction(label, unseen, second, projected=True)
    served = torch.where(second.reshape(-1, 1, 1, 1), unseen, label)
    other = torch.where(second.reshape(-1, 1, 1, 1), label, unseen)
    cosine = nn.functional.cosine_similarity
    scaled = [(each / each.abs().amax((1, 2, 3), keepdim=True)).flatten(1) for each in (served, other)]
    assert cosine(step.flatten(1), scaled[1]).abs().max() < 1e-5
    assert (cosine(step.flatten(1), scaled[0]) > 0.1).all()
    torch.testing.assert_close(step.square().mean((1, 2, 3)).sqrt(), torch.ones(6))
    selective = direction(label, unseen, second, projected=False)
    torch.testing.assert_close(cosine(selective.flatten(1), scaled[0]), torch.ones(6))
    assert cosine(selective.flatten(1), scaled[1]).abs().min() > 0.3


def test_where_a_gradient_is_nothing_a_step_is_nothing_or_leaves_the_other_as_it_is():
    label, nothing = torch.randn(2, *SHAPE), torch.zeros(2, *SHAPE)
    step = direction(label, nothing, torch.tensor([False, True]), projected=True)
    torch.testing.assert_close(step[0], label[0] / label[0].square().mean().sqrt())
    assert torch.equal(step[1], nothing[1])


def test_without_a_weight_the_adaptive_attack_is_c_and_w(quiet, images):
    x, y = images.x[:12], images.y[:12]
    own = run(f"coophance-adaptive:{SEARCH},w=0", Victim(quiet), x, y)
    library = run(f"cw:{SEARCH},initial_const=1", Victim(quiet), x, y)
    fooled = [on_fresh_noise(quiet, each, y).wrong.all(1) for each in (own, library)]
    assert fooled[0].float().mean() > 0.95
    assert fooled[0].sum() >= fooled[1].sum()
    both = fooled[0] & fooled[1]
    reach = [(each - x)[both].flatten(1).norm(dim=1).mean() for each in (own, library)]
    assert reach[0] < 1.05 * reach[1]


def test_the_more_the_activations_weigh_the_nearer_they_stay(protected, images):
    x, y = images.x[:8], images.y[:8]
    victim, classifier = Victim(protected, 4), protected.classifier
    clean, fooled = classifier.features(x, classifier.tap.name), torch.ones(8).bool()
    activations = []
    for w in ("0", "1/20"):
        x_adv = run(f"coophance-adaptive:{SEARCH},w={w},confidence=1", victim, x, y)
        fooled &= on_fresh_noise(protected, x_adv, y).wrong.float().mean(1) > 0.5
        moved = classifier.features(x_adv, classifier.tap.name) - clean
        activations.append(moved.square().flatten(1).sum(1))
    # Of the examples that fool alike: one that is nearer since it does not fool is no feat.
    assert fooled.sum() >= 6
    assert activations[1][fooled].mean() < 0.9 * activations[0][fooled].mean()


def test_where_the_adaptive_attack_finds_nothing_the_image_comes_back_unchanged(quiet, images):
    x_adv = run("coophance-adaptive:searches=2,steps=3,confidence=1000", Victim(quiet), images.x[:4], images.y[:4])
    assert torch.equal(x_adv, images.x[:4])


def test_confidence_carries_the_examples_through_the_noise(undetected, images):
    x, y = images.x[:12], images.y[:12]
    least, sure = (
        run(f"coophance-adaptive:{SEARCH},confidence={confidence}", Victim(undetected, 2), x, y)
        for confidence in (0, 3)
    )
    shares = [on_fresh_noise(undetected, each, y).wrong.float().mean() for each in (least, sure)]
    assert shares[1] > 0.85
    assert shares[1] > shares[0]


class Rounded(Purifier):
    """Round to few grey levels, which no gradient passes."""

    differentiable = False

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        return (x * 7).round() / 7


@pytest.mark.parametrize("text", SHORT)
def test_a_purifier_without_a_derivative_is_gone_round(protected, images, text):
    rounding = ProtectedClassifier(
        protected.classifier, Rounded(), protected.detector, float(protected.threshold)
    ).eval()
    x, y = images.x[:10], images.y[:10]
    x_adv = run(text.replace("steps=5", "steps=15").replace("steps=4,step", "steps=25,step"), Victim(rounding), x, y)
    before, after = (on_fresh_noise(rounding, each, y).wrong.float().mean() for each in (x, x_adv))
    assert after > before + 0.5


class Normalised(nn.Module):
    """Images as a substitute's network takes them."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - MEAN) / DEVIATION


def quietly(*_: object) -> None:
    pass


class Silent(nn.Module):
    """A model that must not be asked."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("The model attacked was asked.")


def test_a_transferred_attack_is_crafted_on_a_substitute_learnt_from_the_victim(protected, digits, images, tmp_path):
    pixels, rows, stages = (digits.x[:500] * 255).round().to(torch.uint8), torch.arange(500), Stages(tmp_path)
    plan = SubstitutePlan(epochs=8, learning_rate=1e-2, augmentation=False)
    labels = BlackBox(Victim(protected), 10, 64, stages, quietly).ask(pixels, rows, "label", "answers").labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        maps = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        training = SubstituteTraining(nn.Sequential(maps, nn.Linear(128, 10)), pixels, rows, labels, plan, CPU)
        training.run(stages, quietly)
    substitute = nn.Sequential(Normalised(), training.model).eval()
    stolen = transferred(attack(CRAFTED), substitute)
    assert isinstance(stolen, Attack)
    assert (stolen.name, stolen.family) == (f"transfer-{CRAFTED}", "transfer-eot-pgd")
    assert (stolen.facts.sees, stolen.facts.passes, stolen.facts.norm) == ("nothing", 0, "linf")
    assert not stolen.facts.white_box
    assert stolen.epsilon == pytest.approx(EPSILON)
    x_adv = stolen.run(Silent(), *images)
    assert torch.equal(x_adv, attack(CRAFTED).run(substitute, *images))
    noise = images.x + EPSILON * torch.randn_like(images.x).sign()
    fooled, by_chance = (
        on_fresh_noise(protected, each.clamp(0, 1), images.y).wrong.float().mean() for each in (x_adv, noise)
    )
    assert fooled > by_chance + 0.2
    white_box = on_fresh_noise(protected, run(CRAFTED, Victim(protected, 2), *images), images.y).wrong.float().mean()
    assert fooled <= white_box


def test_they_are_crafted_and_counted_as_every_attack_is(protected, digits):
    images, targets = (digits.x[1000:1040] * 255).round().to(torch.uint8), digits.y[1000:1040]
    examples = craft(
        attack(f"joint:{BALL},steps=10"), Victim(protected, 2), images, targets, limit=20, device=CPU, seed=0,
        progress=lambda done, total: None,
    )  # fmt: skip
    assert len(examples.rows) == 20
    assert examples.success_rate_rounded > 0.8
    evidence = protected.evidence(examples.rounded / 255)
    assert isinstance(evidence, Evidence)
    assert (protected.detector(*evidence) <= protected.threshold).float().mean() > 0.8

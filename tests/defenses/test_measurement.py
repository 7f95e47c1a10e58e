"""What is counted of a defense in scenario A, on a real classifier, with real attacks."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from defenses.attacks import AdversarialExamples, attack, craft
from defenses.calibration import calibrate
from defenses.classifier import Classifier
from defenses.detector import Detector
from defenses.evaluation import run_batched
from defenses.evaluation.answer_cache import AnswerCache
from defenses.evaluation.curves import ResistanceCurve
from defenses.evaluation.lottery import Draws
from defenses.evaluation.measurement import Measurement
from defenses.evaluation.rates import CleanRow, exact_interval
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.protected import ProtectedClassifier
from defenses.purifier import Purifier

CPU = torch.device("cpu")
SHAPE = (1, 16, 16)


class Smoothing(Purifier):
    """Purify by noise and a mean over neighbours."""

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        noisy = (x + noise_scale * 0.2 * torch.randn_like(x)).clamp(0, 1)
        return nn.functional.avg_pool2d(noisy, 3, stride=1, padding=1)


class Unasked(Purifier):
    """Stand where nothing may be asked any more."""

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        raise AssertionError("The defense was asked again.")


class Direction(Detector):
    """Score activations along one direction."""

    def __init__(self, layer: str, direction: Tensor) -> None:
        super().__init__(layer, "raw")
        self.direction = nn.Parameter(direction)

    def forward(self, activations: Tensor, *_: Tensor) -> Tensor:
        return activations.flatten(1) @ self.direction


class Shifted(Detector):
    """Score as another detector, each class that is answered on a scale of its own."""

    def __init__(self, detector: Direction, shifts: Tensor) -> None:
        super().__init__(detector.layer, "raw")
        self.detector = detector
        self.shifts = nn.Parameter(shifts)

    def forward(self, activations: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        return self.detector(activations, logits, *rest) + self.shifts[logits.argmax(1)]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """900 handwritten digits, uint8 (900, 1, 16, 16), and their classes."""
    data = load_digits()
    images = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8)[:900].unsqueeze(1)
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.from_numpy(data.target)[:900].long()


@pytest.fixture(scope="module")
def classifier(digits) -> Classifier:
    """A small convolutional classifier, trained on the first 500 digits."""
    images, targets = digits[0][:500].float() / 255, digits[1][:500]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(60):
            loss = nn.functional.cross_entropy(network(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Classifier(canonicalise(export_classifier(network.eval(), SHAPE))).eval()


@pytest.fixture(scope="module")
def examples(classifier, digits) -> Callable[[str], AdversarialExamples]:
    """Craft on the last 200 digits: ``examples("fgsm")``."""

    def made(text: str) -> AdversarialExamples:
        part = (digits[0][700:], digits[1][700:])
        return craft(attack(text), classifier, *part, limit=80, device=CPU, seed=0, progress=lambda done, total: None)

    return made


@pytest.fixture(scope="module")
def protected(classifier, digits) -> ProtectedClassifier:
    """The classifier behind smoothing and a detector of what FGSM does, calibrated to 10 % on other digits."""
    layer = classifier.tap.name
    fitting = craft(
        attack("fgsm:epsilon=40/255"),
        classifier,
        digits[0][:200],
        digits[1][:200],
        limit=200,
        device=CPU,
        seed=0,
        progress=lambda done, total: None,
    )
    with torch.no_grad():
        clean, adversarial = (classifier.features(x, layer).flatten(1) for x in (fitting.x / 255, fitting.x_adv))
    detector = Direction(layer, adversarial.mean(0) - clean.mean(0))
    protected = ProtectedClassifier(classifier, Smoothing(), detector, float("inf")).eval()
    protected.threshold.fill_(calibrate(run_batched(protected, digits[0][500:700], CPU).scores, 0.1))
    return protected


@pytest.fixture(scope="module")
def scenario(protected) -> Measurement:
    return Measurement(protected, CPU, seed=3)


@pytest.fixture(scope="module")
def clean(scenario, digits) -> tuple[CleanRow, Tensor]:
    return scenario.clean(digits[0][700:], digits[1][700:])


def test_clean_images_are_counted_with_alerts_as_errors_and_apart(protected, digits, clean):
    row, scores = clean
    images, targets = digits[0][700:], digits[1][700:]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        parts = [protected(batch / 255) for batch in images.split(128)]
    right = torch.cat([part.logits.argmax(1) for part in parts]) == targets
    alerts = torch.cat([part.alerts for part in parts])
    bare = protected.classifier(images / 255).argmax(1) == targets
    assert row.images == len(scores) == 200
    assert row.undefended_accuracy == bare.sum().item() / 200
    assert row.accuracy == right.sum().item() / 200
    assert row.accepted_accuracy == (right & ~alerts).sum().item() / 200
    assert row.false_positive_rate == alerts.sum().item() / 200
    assert row.undefended_accuracy > row.accuracy > row.accepted_accuracy > 0.5
    assert row.false_positive_interval[0] < row.false_positive_rate < row.false_positive_interval[1]
    assert torch.equal(scores, torch.cat([part.scores for part in parts]))


@pytest.mark.parametrize("text", ["fgsm:epsilon=40/255", "deepfool"])
def test_each_form_is_counted_over_the_images_that_fool_in_it(scenario, protected, examples, clean, text):
    made = examples(text)
    rows = scenario.attacked(made, clean[1])
    assert [row.form for row in rows] == ["as crafted", "rounded"]
    forms = ((made.x_adv, made.fooled, made.distortion), (made.rounded / 255, made.fooled_rounded, None))
    for row, (images, fooled, distortion) in zip(rows, forms, strict=True):
        assert (row.attack, row.attempted, row.fooling) == (text, 80, fooled.sum())
        assert row.fooling > 10
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(3)
            output = protected(images[fooled])
        corrected, y = output.logits.argmax(1) == made.y[fooled], made.y[fooled]
        assert (output.undefended_logits.argmax(1) != y).all()
        assert row.corrected == corrected.sum().item() / row.fooling
        assert row.alerted == output.alerts.sum().item() / row.fooling
        assert row.resisted == (corrected | output.alerts).sum().item() / row.fooling
        assert max(row.corrected, row.alerted) <= row.resisted <= row.corrected + row.alerted
        low, high = row.resisted_interval
        assert low <= row.resisted <= high
        truth = torch.cat([torch.zeros(len(clean[1])), torch.ones(row.fooling)])
        assert row.detector_auc == pytest.approx(roc_auc_score(truth, torch.cat([clean[1], output.scores])))
        surely = output.scores.masked_fill(corrected, 1e6)
        assert row.auc == pytest.approx(roc_auc_score(truth, torch.cat([clean[1], surely])))
        if distortion:
            assert row.distortion_l2 == pytest.approx(distortion)
    assert 0 < rows[0].corrected < 1
    assert rows[0].detector_auc > 0.5


def test_whole_grey_levels_give_the_same_row_in_both_forms(scenario, examples, clean):
    crafted, rounded = scenario.attacked(examples("fgsm:epsilon=40/255"), clean[1])
    assert (crafted.fooling, crafted.corrected) == (rounded.fooling, rounded.corrected)
    assert crafted.auc == pytest.approx(rounded.auc, abs=1e-3)


def test_where_nothing_fools_after_rounding_there_is_a_count_and_no_rate(scenario, digits, clean):
    x = digits[0][700:704]
    barely = x / 255 + 0.4 / 255
    none, all_four = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    made = AdversarialExamples(
        attack("deepfool"), x, barely.clamp(0, 1), digits[1][700:704], torch.arange(4), all_four, none
    )
    crafted, rounded = scenario.attacked(made, clean[1])
    assert (crafted.fooling, rounded.fooling, rounded.attempted) == (4, 0, 4)
    assert crafted.resisted is not None
    assert rounded.form == "rounded"
    assert (rounded.distortion_l2, rounded.corrected, rounded.alerted, rounded.resisted) == (None,) * 4
    assert (rounded.resisted_interval, rounded.auc, rounded.detector_auc, rounded.curve) == (None, None, None, ())


def test_the_same_seed_gives_the_same_row_whatever_went_before_and_moves_no_other_draw(
    protected, scenario, digits, examples, clean
):
    made = examples("fgsm:epsilon=40/255")
    torch.manual_seed(11)
    first = scenario.attacked(made, clean[1])
    drawn = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), drawn)
    torch.rand(100)
    assert scenario.attacked(made, clean[1]) == first
    assert scenario.clean(digits[0][700:], digits[1][700:])[0] == clean[0]
    seeds = [Measurement(protected, CPU, seed).attacked(made, clean[1]) for seed in range(4, 8)]
    assert any(rows != first for rows in seeds), "other noise should lead somewhere else"


def test_the_noise_can_be_switched_off(protected, examples, clean):
    made = examples("fgsm:epsilon=40/255")
    quiet = [Measurement(protected, CPU, seed, noise_scale=0.0).attacked(made, clean[1]) for seed in (0, 1)]
    assert quiet[0] == quiet[1]
    with torch.no_grad():
        answers = protected(made.x_adv[made.fooled], torch.zeros(())).logits.argmax(1)
    assert quiet[0][0].corrected == pytest.approx((answers == made.y[made.fooled]).float().mean().item())


def test_thresholds_of_single_classes_are_swept_together(protected, scenario, digits, examples, clean):
    made = examples("fgsm:epsilon=40/255")
    images, targets = digits[0][700:], digits[1][700:]
    shifts = torch.arange(10) * 1000.0
    apart = ProtectedClassifier(
        protected.classifier, protected.purifier, Shifted(protected.detector, shifts), float("inf")
    ).eval()
    apart.threshold = protected.threshold + shifts
    row, scores = Measurement(apart, CPU, seed=3).clean(images, targets)
    assert row == clean[0]
    crafted = Measurement(apart, CPU, seed=3).attacked(made, scores)[0]
    expected = scenario.attacked(made, clean[1])[0]
    assert (crafted.resisted, crafted.alerted) == (expected.resisted, expected.alerted)
    assert crafted.auc == pytest.approx(expected.auc, abs=1e-3)
    assert crafted.detector_auc == pytest.approx(expected.detector_auc, abs=1e-3)


def test_no_clean_images_are_refused(scenario, digits):
    with pytest.raises(ValueError, match="no clean images"):
        scenario.clean(digits[0][:0], digits[1][:0])


def test_the_curve_starts_at_the_purifiers_own_rate_and_ends_at_one():
    clean, scores = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.35, 0.15, 0.9, -5.0])
    curve = ResistanceCurve.sweep(clean, scores, torch.tensor([False, False, False, True]))
    points = list(zip(curve.false_positive_rate.tolist(), curve.resistance_rate.tolist(), strict=True))
    assert points[0] == (0, 0.25)  # the highest score is an example's own: nothing is above it
    assert points[1] == (0, 0.5)
    assert (0.25, 0.75) in points
    assert points[-1] == (1, 1)
    assert points == sorted(points)
    # By hand: 0.25 wide at 0.5, 0.5 wide at 0.75, 0.25 wide at 1.
    assert curve.area == pytest.approx(0.25 * 0.5 + 0.5 * 0.75 + 0.25)


def test_without_corrections_the_area_is_the_roc_auc_ties_included():
    generator = torch.Generator().manual_seed(0)
    clean, scores = (torch.randint(0, 12, (n,), generator=generator).float() for n in (300, 90))
    area = ResistanceCurve.sweep(clean, scores + 2, torch.zeros(90, dtype=torch.bool)).area
    truth = torch.cat([torch.zeros(300), torch.ones(90)])
    assert area == pytest.approx(roc_auc_score(truth, torch.cat([clean, scores + 2])))
    everything = ResistanceCurve.sweep(clean, scores, torch.ones(90, dtype=torch.bool))
    assert everything.area == 1


def test_a_thinned_curve_keeps_its_ends_and_its_area():
    generator = torch.Generator().manual_seed(0)
    clean, scores = torch.randn(5000, generator=generator), torch.randn(900, generator=generator) + 1
    curve = ResistanceCurve.sweep(clean, scores, torch.rand(900, generator=generator) < 0.3)
    points = curve.thinned()
    assert 150 < len(points) <= 200
    assert points[0] == (curve.false_positive_rate[0], curve.resistance_rate[0])
    assert points[-1] == (1, 1)
    across, up = torch.tensor(points, dtype=torch.float64).T
    assert torch.trapezoid(up, across).item() == pytest.approx(curve.area, abs=2e-3)
    assert (across.diff() >= 0).all()
    assert (up.diff() >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        ResistanceCurve.sweep(torch.tensor([0.0, bad]), torch.tensor([1.0]), torch.tensor([False]))


@pytest.mark.parametrize(
    ("count", "total", "interval"),
    [(0, 100, (0.0, 0.0362)), (50, 100, (0.3983, 0.6017)), (88, 100, (0.7998, 0.9364)), (1, 1, (0.025, 1.0))],
)
def test_intervals_are_clopper_and_pearsons(count, total, interval):
    counted = torch.arange(total) < count
    assert exact_interval(counted) == pytest.approx(interval, abs=5e-4)


def test_answers_that_are_kept_are_those_that_were_given_and_nothing_is_asked_twice(
    protected, scenario, clean, digits, examples, tmp_path
):
    images, targets = digits[0][700:], digits[1][700:]
    made = examples("fgsm:epsilon=40/255")
    unasked = ProtectedClassifier(
        protected.classifier, Unasked(), protected.detector, float(protected.threshold)
    ).eval()
    cache = AnswerCache(tmp_path, "smoothing", CPU)
    for asked in (protected, unasked):
        measurement, draws = replace(scenario, protected=asked, cache=cache), Draws(asked, CPU, 3, cache=cache)
        row, scores = measurement.clean(images, targets)
        assert row == clean[0]
        assert torch.equal(scores, clean[1])
        assert measurement.attacked(made, scores) == scenario.attacked(made, clean[1])
        assert draws.lottery(images[:20]) == Draws(protected, CPU, 3).lottery(images[:20])
        assert draws.success_within(made.x_adv[:20], made.y[:20]) == Draws(protected, CPU, 3).success_within(
            made.x_adv[:20], made.y[:20]
        )


@pytest.mark.parametrize(
    ("victim", "seed", "first"),
    [
        ("another defense", 3, 700),
        ("smoothing", 4, 700),
        ("smoothing", 3, 701),
    ],
)
def test_what_is_kept_answers_no_other_question(protected, digits, tmp_path, victim, seed, first):
    kept = Measurement(protected, CPU, 3, cache=AnswerCache(tmp_path, "smoothing", CPU))
    kept.answers(digits[0][700:])
    unasked = ProtectedClassifier(
        protected.classifier, Unasked(), protected.detector, float(protected.threshold)
    ).eval()
    with pytest.raises(AssertionError, match="asked again"):
        Measurement(unasked, CPU, seed, cache=AnswerCache(tmp_path, victim, CPU)).answers(digits[0][first:])


def test_one_asks_and_the_others_wait_for_its_answers(tmp_path):
    asked = []
    begun = threading.Event()

    def ask() -> dict[str, Tensor]:
        asked.append(time.monotonic())
        begun.set()
        time.sleep(0.5)
        return {"logits": torch.arange(3.0)}

    def once() -> Tensor:
        return AnswerCache(tmp_path, "slow", CPU).once(torch.zeros(1), {"seed": 0}, ask)["logits"]

    with ThreadPoolExecutor() as threads:
        first = threads.submit(once)
        assert begun.wait(10)
        others = [threads.submit(once) for _ in range(3)]
        assert all(torch.equal(each.result(), torch.arange(3.0)) for each in (first, *others))
    assert len(asked) == 1


def test_a_defense_that_fails_leaves_nothing_behind_and_is_asked_again(tmp_path):
    cache = AnswerCache(tmp_path, "failing", CPU)

    def fail() -> dict[str, Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.once(torch.zeros(1), {}, fail)
    assert cache.once(torch.zeros(1), {}, lambda: {"logits": torch.ones(1)})["logits"].item() == 1

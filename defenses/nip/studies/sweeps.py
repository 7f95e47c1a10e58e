"""Pools made anew with other numbers of neurons, other layers, and other numbers of candidates (NIP, section 7.2)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from defenses.classifier import Classifier, Layer
from defenses.nip.head import RESHAPING
from defenses.nip.influence import LayerUnsuitable, check_layer
from defenses.nip.inverse_perturbation import InversePerturbation, moved
from defenses.nip.studies.outcomes import Answer, Outcome, measure_outcomes
from defenses.nip.studies.subject import StudySubject

NEURONS = (0, 1, 3, 5, 10, 20)
"""The numbers of front neurons, and of tail neurons, that are tried (figure 7)."""

ETAS = (0.01, 0.1, 0.3, 1.0)
"""The numbers of candidates for each unknown input that are tried (figure 9)."""

MOST_LAYERS = 6
"""How many layers are tried (figure 8)."""

Varied = Literal["k1", "k2", "layer", "eta"]


@dataclass(frozen=True)
class Setting:
    """How a pool is made: all else is as in the subject's plan."""

    k1: int
    k2: int
    layer: str
    eta: float


@dataclass(frozen=True)
class SweepRow:
    """A pool that was made anew, and what it is worth at one amplitude.

    ``varied`` is what the sweep changes, ``own`` whether this is the subject's own setting. ``scope`` is the module
    that computes the layer, empty where the graph does not say, ``neurons`` how many it has. ``candidates`` are in the
    pool, ``left_out`` examples gave no gradient; ``template_size`` is how long the template is, of one for each class
    the least.
    """

    varied: Varied
    setting: Setting
    own: bool
    scope: str
    neurons: int
    candidates: int
    left_out: int
    template_size: int
    outcome: Outcome


@dataclass(frozen=True)
class SettingRefused:
    """A setting that gives no pool, and the sentence that says why."""

    varied: Varied
    setting: Setting
    reason: str


@dataclass(frozen=True)
class Sweep:
    """Two rows for each setting, at the subject's own amplitude and at one set anew; and what gave no pool."""

    rows: tuple[SweepRow, ...]
    refused: tuple[SettingRefused, ...]


def study_k(subject: StudySubject) -> Sweep:
    """Make pools with other numbers of front and of tail neurons, one of the two at a time (figure 7)."""
    own = own_setting(subject)
    width = subject.purifier.config.shape[0]
    settings: list[tuple[Varied, Setting]] = [
        ("k1", replace(own, k1=k1)) for k1 in sorted({*NEURONS, own.k1}) if 0 < k1 + own.k2 <= width
    ]
    settings += [("k2", replace(own, k2=k2)) for k2 in sorted({*NEURONS, own.k2}) if 0 < own.k1 + k2 <= width]
    return _sweep(subject, "k", settings)


def study_layer(subject: StudySubject) -> Sweep:
    """Make pools of other layers (figure 8), at most ``MOST_LAYERS`` in the order of computation."""
    own = own_setting(subject)
    layers = layers_to_try(subject.classifier, own.layer, own.k1, own.k2)
    return _sweep(subject, "layer", [("layer", replace(own, layer=layer.name)) for layer in layers])


def study_eta(subject: StudySubject) -> Sweep:
    """Make pools of fewer candidates (figure 9); never of more than there are images to fit on."""
    own = own_setting(subject)
    return _sweep(subject, "eta", [("eta", replace(own, eta=eta)) for eta in sorted({*ETAS, own.eta})])


def own_setting(subject: StudySubject) -> Setting:
    """Return how the subject's own pool was made."""
    config = subject.purifier.config
    return Setting(config.k1, config.k2, config.layer, subject.plan.eta)


def layers_to_try(classifier: Classifier, own: str, k1: int, k2: int, most: int = MOST_LAYERS) -> list[Layer]:
    """Return layers that NIP can look at, evenly spread in the order of computation, own and last among them.

    They are at most ``most``, 2 or more. Layers that hold the values of another in another shape are left out.
    """
    fitting = [
        layer
        for layer in classifier.layers()
        if layer.name == own or (layer.operator not in RESHAPING and _suits(layer, k1, k2))
    ]
    if len(fitting) <= most:
        return fitting
    here = next(place for place, layer in enumerate(fitting) if layer.name == own)
    last = len(fitting) - 1
    places = {round(each * last / (most - 1)) for each in range(most)}
    if here not in places:
        places.remove(min(places - {last}, key=lambda place: abs(place - here)))
    return [fitting[place] for place in sorted({*places, here})]


def moving_answer(classifier: Classifier, purifier: InversePerturbation) -> Answer:
    """Return the answer to images that are moved as is served, at whatever amplitude."""

    def answer(x: Tensor, amplitudes: tuple[float, ...]) -> list[Tensor]:
        logits, activations = classifier.logits_and_features(x, purifier.config.layer)
        direction = purifier.direction(x, activations, logits)
        return [classifier(moved(x, direction, each)) if each else logits for each in amplitudes]

    return answer


def _suits(layer: Layer, k1: int, k2: int) -> bool:
    try:
        check_layer(layer, k1, k2)
    except LayerUnsuitable:
        return False
    return True


def _sweep(subject: StudySubject, stage: str, settings: Iterable[tuple[Varied, Setting]]) -> Sweep:
    rows: list[SweepRow] = []
    refused: list[SettingRefused] = []
    measured: dict[Setting, list[SweepRow] | str] = {}
    wanted = list(settings)
    for done, (varied, setting) in enumerate(wanted):
        subject.progress(stage, done, len(wanted))
        if setting not in measured:
            with subject.drawing():
                measured[setting] = _measured(subject, stage, varied, setting)
        found = measured[setting]
        if isinstance(found, str):
            refused.append(SettingRefused(varied, setting, found))
        else:
            rows += [replace(row, varied=varied) for row in found]
    subject.progress(stage, len(wanted), len(wanted))
    return Sweep(tuple(rows), tuple(refused))


def _measured(subject: StudySubject, stage: str, varied: Varied, setting: Setting) -> list[SweepRow] | str:
    """Return the rows of a setting, or why it gives no pool."""
    plan = replace(subject.plan, k1=setting.k1, k2=setting.k2, eta=setting.eta)
    try:
        purifier, built = subject.pool_of(plan, setting.layer, stage)
    except ValueError as reason:
        return str(reason)
    outcomes = measure_outcomes(subject, moving_answer(subject.classifier, purifier), stage)
    return [
        SweepRow(
            varied,
            setting,
            setting == own_setting(subject),
            subject.classifier.resolve_layer(setting.layer).scope,
            built.config.shape[0],
            built.config.candidates,
            built.left_out,
            min(built.config.template_sizes),
            outcome,
        )
        for outcome in outcomes
    ]

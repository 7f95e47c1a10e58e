"""Fitting a whole defense by response for a classifier, from benign images alone."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.attacks import attack
from defenses.classifier import Classifier, Layer
from defenses.detector import NoDetector
from defenses.evaluation import Progress
from defenses.nip.directions import mean_directions
from defenses.nip.influence import check_layer
from defenses.nip.measured import Measured, measure
from defenses.nip.push import InversePush
from defenses.nip.response import Pushing, ResponseConfig, ResponseJudge
from defenses.nip.response_fit import Pushed, ResponseReport, fit_response
from defenses.nip.response_plan import ResponsePlan
from defenses.nip.substitute import Substitute, distil, untrained_substitute
from defenses.nip.substitute_training import SubstitutePlan
from defenses.pixels import to_float
from defenses.precision import full_precision
from defenses.protected import ProtectedClassifier
from defenses.splits import LabelledImages, Splits
from defenses.stages import Stages


@dataclass(frozen=True)
class FittedResponse:
    """A fitted defense on the CPU, in evaluation mode, with what it was measured to do.

    ``layer`` is that of the inverse perturbations, None where there are none, ``substitute`` says what is known of the
    classifier that they were made of where that is another one. ``seconds`` is what each stage took, however often the
    fit was taken up again.
    """

    protected: ProtectedClassifier
    layer: Layer | None
    response: ResponseReport
    substitute: Mapping[str, float] | None
    measured: Measured
    seconds: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """The rates on the test split, by name."""
        return self.measured.metrics


def fit_response_defense(
    classifier: Classifier,
    splits: Splits,
    plan: ResponsePlan,
    *,
    stages: Stages,
    device: torch.device,
    progress: Progress,
) -> FittedResponse:
    """Settle what a push shows, on the validation and calibration splits of clean images, and measure the whole.

    What is done is kept in ``stages``: a fit that was killed goes on there, to the same result. The same plan on the
    same machine gives the same result; the global random state is left as it was. Before anything is computed raises
    ``LayerNotFound``, ``LayerUnsuitable``, ``AttackUnknown`` and, without validation or calibration images,
    ``ValueError``; then ``ValueError`` for a classifier that gets nothing right or has no gradient.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), full_precision():
        torch.manual_seed(plan.seed)
        return _Fit(classifier.eval().to(device), splits, plan, stages, device, progress).run()


def response_layer(classifier: Classifier, plan: ResponsePlan) -> Layer | None:
    """Return the layer that a plan makes inverse perturbations of, None where it makes none.

    Of a substitute it is one of the same place in the classifier that is defended, which tells the push what is
    predicted. Raises ``LayerNotFound``, ``LayerUnsuitable`` and what ``untrained_substitute`` raises.
    """
    if plan.push != "inverse":
        return None
    layer = classifier.resolve_layer(plan.layer) if plan.layer else classifier.head_layer
    if plan.substitute is None:
        check_layer(layer, plan.k1, plan.k2)
    else:
        blank = untrained_substitute(classifier.image_shape, classifier.classes, plan.substitute)
        check_layer(blank.head_layer, plan.k1, plan.k2)
    return layer


def response_parts(classifier: Classifier, plan: ResponsePlan) -> tuple[Pushing, ResponseJudge]:
    """Return the parts of the defense that a plan describes, before anything is fitted."""
    layer = response_layer(classifier, plan)
    config = ResponseConfig(
        plan.push, classifier.image_shape, classifier.classes, plan.weight, plan.size, layer.name if layer else None
    )
    return Pushing(config).eval(), ResponseJudge(classifier.classes).eval()


@dataclass(frozen=True)
class _Fit:
    classifier: Classifier
    splits: Splits
    plan: ResponsePlan
    stages: Stages
    device: torch.device
    progress: Progress

    def run(self) -> FittedResponse:
        plan, splits = self.plan, self.splits
        for text in plan.attacks:
            attack(text)
        for name, part in (("validation", splits.validation), ("calibration", splits.calibration)):
            if not len(part.images):
                raise ValueError(f"Expected clean {name} images to settle the response by, got none.")
        pushing, judge = response_parts(self.classifier, plan)
        layer = self.classifier.resolve_layer(pushing.layer) if pushing.layer else None
        substitute: Mapping[str, float] | None = None
        if layer is not None:
            assert isinstance(pushing.push, InversePush)
            directions, substitute = self.directions(layer)
            pushing.push.directions.copy_(directions)
        pushing = pushing.to(self.device)
        report = self.response(pushing, judge)
        protected = ProtectedClassifier(self.classifier, pushing, NoDetector(), judge=judge).eval().to(self.device)
        measured = measure(protected, splits.test, plan, stages=self.stages, device=self.device, progress=self.progress)
        return FittedResponse(protected.cpu(), layer, report, substitute, measured, self.stages.timed())

    def directions(self, layer: Layer) -> tuple[Tensor, Mapping[str, float] | None]:
        """Return the mean inverse perturbations, and what is known of their substitute; made, or as they are kept."""
        if (kept := self.stages.load("directions")) is not None:
            return kept.tensors["directions"], kept.values["substitute"]
        plan, subject = self.plan, self.classifier
        told: Mapping[str, float] | None = None
        if plan.substitute is not None:
            substitute = self.distilled(plan.substitute)
            subject, layer = substitute.classifier.to(self.device), substitute.classifier.head_layer
            told = {
                "queries": substitute.queries,
                "agreement": substitute.agreement,
                "commonest_share": substitute.commonest_share,
            }
        start = time.perf_counter()
        directions = mean_directions(
            subject,
            layer,
            *self.splits.fit,
            k1=plan.k1,
            k2=plan.k2,
            count=plan.candidates,
            seed=plan.seed,
            batch_size=plan.batch_size,
            device=self.device,
            progress=self.progress,
        )
        values = {"substitute": told, "seconds": time.perf_counter() - start}
        self.stages.save("directions", {"directions": directions}, values)
        return directions, told

    def distilled(self, plan: SubstitutePlan) -> Substitute:
        """Train a substitute on what the classifier answers; its gradient is not asked for."""

        def answer(x: Tensor) -> Tensor:
            logits: Tensor = self.classifier(x.to(self.device))
            return logits.cpu()

        return distil(
            answer,
            self.classifier.image_shape,
            self.classifier.classes,
            self.splits.fit.images,
            self.splits.validation.images,
            plan,
            stages=self.stages,
            device=self.device,
            progress=self.progress,
        )

    def response(self, pushing: Pushing, judge: ResponseJudge) -> ResponseReport:
        """Settle the judge, or set it as it was settled."""
        if (kept := self.stages.load("response")) is not None:
            judge.load_state_dict(kept.tensors)
            return ResponseReport.from_json(kept.values["response"])
        start = time.perf_counter()
        seen = {
            name: run_pushed(self.classifier, pushing, part, self.plan.batch_size, self.device, self.progress, name)
            for name, part in (("validation", self.splits.validation), ("calibration", self.splits.calibration))
        }
        report = fit_response(judge, seen["validation"], seen["calibration"], self.plan.accuracy_loss)
        values = {"response": report.as_json(), "seconds": time.perf_counter() - start}
        self.stages.save("response", dict(judge.state_dict()), values)
        return report


@torch.no_grad()
def run_pushed(
    classifier: Classifier,
    pushing: Pushing,
    part: LabelledImages,
    batch_size: int,
    device: torch.device,
    progress: Progress,
    stage: str,
) -> Pushed:
    """Return what the classifier says of images, and of the same as pushed, on the CPU."""
    bare, pushed = [], []
    for place, batch in enumerate(part.images.split(batch_size), 1):
        x = to_float(batch.to(device))
        logits = classifier(x)
        bare.append(logits.cpu())
        pushed.append(classifier(pushing.push(x, logits)).cpu())
        progress(f"response, {stage}", min(place * batch_size, len(part.images)), len(part.images))
    return Pushed(torch.cat(bare), torch.cat(pushed), part.targets)

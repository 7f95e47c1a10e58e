"""Training a classifier adversarially and publishing it: a classifier like any other, with how it was trained."""

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defenses.architectures import build, load_state
from defenses.baselines.adversarial_outcome import AdversarialTraining
from defenses.baselines.adversarial_plan import AdversarialPlan, check_feasible
from defenses.baselines.adversarial_step import Normalised
from defenses.baselines.adversarial_training import initial_seed, precision_on, train_adversarially
from defenses.evaluation import Progress
from defenses.footprint import saved_bytes, weight_bytes
from model_store import AttackRecord, DataRecord, Draft, Manifest, Store
from service.datasets import Dataset
from service.fit import published_by, splits_of
from service.fit_draft import FIT
from service.fit_job import FITS, FORMAT, FitJob, FitJobs
from service.fit_size import PEAK, SMALLER_BATCH
from service.hardware import DeviceName, find_device
from service.libraries import library_versions
from service.register import Declaration, publish_classifier, registrable, serve_first
from service.repository import MODELS
from service.resources import Part, check_disk, check_memory, memory_available

logger = logging.getLogger("portcullis")


@dataclass(frozen=True)
class Network:
    """What is trained: an architecture by its spec (see ``defenses.architectures.build``), and weights to start from.

    Without ``weights``, a file, they are drawn with the plan's seed.
    """

    arch: str
    weights: Path | None = None

    def build(self, classes: int, seed: int) -> nn.Module:
        """Return the network of ``classes`` classes that the training starts from.

        Raises ``ArchitectureNotFound``, ``WeightsMismatch``, ``ValueError`` for a file that holds no weights, and
        ``OSError`` for one that cannot be read.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(initial_seed(seed))
            network = build(self.arch, classes)
        if self.weights is not None:
            load_state(network, self.weights)
        return network

    def described(self) -> dict[str, Any]:
        """Return what is on record of the network: the architecture, and name and SHA-256 of the weights' file."""
        weights = None
        if self.weights is not None:
            weights = {"file": self.weights.name, "sha256": hashlib.sha256(self.weights.read_bytes()).hexdigest()}
        return {"arch": self.arch, "weights": weights}


@dataclass(frozen=True)
class TrainingSize:
    """Say how large an adversarial training is.

    In bytes: what a pass over one image keeps for the backward pass (``defenses.footprint.saved_bytes``), and the
    weights.
    """

    batch_size: int
    network_pass: int
    weights: int

    @property
    def held(self) -> Sequence[Part]:
        """The weights with gradients and momentum, and weights and momentum as they were an epoch before."""
        return [Part("the network, its gradients and its momentum", 5 * self.weights, "use a smaller network")]

    @property
    def turns(self) -> Sequence[Part]:
        """The weights on their way into the graph."""
        return [Part("the graph", 4 * self.weights, "use a smaller network")]

    @property
    def batches(self) -> Sequence[Part]:
        """A training batch."""
        return [Part("a training batch", PEAK * self.batch_size * self.network_pass, SMALLER_BATCH)]

    @property
    def stored(self) -> Sequence[Part]:
        """What is kept of the training and what takes its place, and the graph as written and as published."""
        return [
            Part("the stages of the training", 4 * self.weights, "make room"),
            Part("the classifier", 2 * self.weights, "make room"),
        ]


def publish_adversarial(
    root: Path,
    name: str,
    network: Network,
    dataset: Dataset,
    declared: Declaration,
    plan: AdversarialPlan,
    *,
    device: DeviceName = "auto",
    fresh: bool = False,
    progress: Progress,
    notice: Callable[[str], None] = logger.warning,
    command: str = "",
) -> Manifest:
    """Train a classifier adversarially and publish it as ``register`` does, as the next version of ``name``.

    The first version of a name becomes the serving one. ``root`` is the store's folder; ``declared`` says the input's
    shape. The labels are the data set's. Nothing is published unless every step succeeds. Every epoch is kept in the
    store's folder ``fits``: a training that was killed goes on there when the same is asked for again, and publishes
    nothing twice; ``fresh`` begins anew. ``notice`` is called with a sentence when a training resumes, collapses, or
    leaves the classifier without any accuracy under attack.

    Before anything is trained raises ``DeviceMissing``, ``ImagesTooFew``, what ``Network.build`` and
    ``service.register.registrable`` raise, ``FitRunning`` where another process is at the same training,
    ``MemoryTooSmall`` and ``DiskTooSmall``; then ``TrainingDiverged``, ``StageNotKept``, and the store's errors.
    """
    place = find_device(device)
    check_feasible(plan, fit=len(dataset.fit.targets), validation=len(dataset.validation.targets))
    declared = replace(declared, labels=dataset.labels)
    trained = network.build(len(dataset.labels), plan.seed)
    identity = _identity(name, network, trained, dataset, declared, plan, place)
    models = Store.open(root / MODELS)
    jobs = FitJobs(root / FITS)
    with jobs.open(identity, model=name, dataset=dataset.name, command=command, fresh=fresh) as job:
        if published := published_by(root / MODELS, name, job):
            notice(f"This training was finished before: it is published as {name}@{published.version}.")
            serve_first(models, published)
            return published
        if resumed := job.told():
            notice(resumed)
        else:
            # A network that allows no export fails here, and not after the long work.
            registrable(trained, declared)
        model = _from_pixels(trained, declared)
        _check_resources(model, declared, plan, place, job)
        training = train_adversarially(
            model, splits_of(dataset), plan, stages=job.stages, device=place, progress=progress
        )
        for sentence in findings(training):
            notice(sentence)
        progress("export", 0, 1)
        made = registrable(trained, declared, command=command)
        progress("export", 1, 1)
        draft = _completed(made.draft, network, dataset, plan, training, job.record.id)
        return publish_classifier(models, name, replace(made, draft=draft))


def findings(training: AdversarialTraining) -> list[str]:
    """Return a sentence for each thing in a training that whoever asked for it should know; often none."""
    told = []
    if training.collapsed is not None:
        best = max(each.robust_accuracy for each in training.epochs[:-1])
        last = training.epochs[-1].robust_accuracy
        told.append(
            f"In epoch {training.collapsed} of {training.planned} the accuracy under PGD on validation images fell "
            f"from {100 * best:.1f} % to {100 * last:.1f} %: the classifier has learnt the one-step attack alone. The "
            f"weights of epoch {training.kept} are kept; a smaller --alpha or --epsilon may train to the end."
        )
    if training.robust_accuracy == 0:
        told.append(
            f"None of {training.attacked} test images is answered rightly under PGD: more --epochs, another "
            "--learning-rate or a smaller --epsilon may train better."
        )
    return told


def _from_pixels(network: nn.Module, declared: Declaration) -> nn.Module:
    """Return the network as one of images in [0, 1]; they share their weights."""
    normalisation = declared.normalisation
    return Normalised(network, normalisation.mean, normalisation.std) if normalisation else network


def _identity(
    name: str,
    network: Network,
    trained: nn.Module,
    dataset: Dataset,
    declared: Declaration,
    plan: AdversarialPlan,
    device: torch.device,
) -> dict[str, Any]:
    """Return all that the result of a training depends on, and under which name it is published."""
    return {
        "format": FORMAT,
        "name": name,
        "adversarial": asdict(plan),
        "network": network.described(),
        "parameters": {key: list(value.shape) for key, value in trained.state_dict().items()},
        "declared": {
            "shape": declared.shape,
            "normalisation": declared.normalisation and declared.normalisation.model_dump(),
            "resize": declared.resize,
            "labels": declared.labels,
        },
        "dataset": dataset.digest,
        "split_seed": dataset.split_seed,
        "device": device.type,
        "precision": precision_on(device),
        "libraries": library_versions(),
    }


def _check_resources(
    model: nn.Module, declared: Declaration, plan: AdversarialPlan, device: torch.device, job: FitJob
) -> None:
    """Refuse a training that is too large for this machine; raises ``MemoryTooSmall`` and ``DiskTooSmall``."""
    assert declared.shape is not None
    # Of a copy: a pass in training moves the statistics of batch norm.
    copied = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        kept = saved_bytes(copied, torch.full((1, *declared.shape), 0.5))
    size = TrainingSize(plan.batch_size, kept, weight_bytes(model))
    device_memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    check_memory(size, available=memory_available(), device_available=device_memory)
    check_disk(size, job.folder, kept=job.size)


def _completed(
    draft: Draft, network: Network, dataset: Dataset, plan: AdversarialPlan, training: AdversarialTraining, fit: str
) -> Draft:
    """Return a classifier's draft with what it was trained on and what came of it; ``fit`` is the training's id."""
    splits = {
        "fit": dataset.fit,
        "validation": dataset.validation,
        "calibration": dataset.calibration,
        "test": dataset.test,
    }
    counts = {name: len(split.targets) for name, split in splits.items()}
    measured_by = plan.measured_by
    record: dict[str, Any] = {
        "network": network.described(),
        "plan": {**asdict(plan), "alpha": plan.step_size},
        "training": {
            "planned": training.planned,
            "kept": training.kept,
            "collapsed": training.collapsed,
            "precision": training.precision,
            "epochs": [asdict(each) for each in training.epochs],
        },
        "measured_by": {"attack": measured_by.family, **measured_by.parameters, "images": training.attacked},
        "findings": findings(training),
        "seconds": dict(training.seconds),
        FIT: fit,
    }
    attack = AttackRecord(
        name="fgsm from a random start",
        parameters={"epsilon": plan.epsilon, "alpha": plan.step_size},
        examples=counts["fit"],
        success_rate=None,
    )
    rates = {"clean_accuracy": training.clean_accuracy, "robust_accuracy": training.robust_accuracy}
    return draft.model_copy(
        update={
            "data": DataRecord(name=dataset.name, digest=dataset.digest, split_seed=dataset.split_seed, counts=counts),
            "attacks": (attack,),
            "metrics": {**draft.metrics, **rates},
            "options": record,
            "seed": plan.seed,
        }
    )

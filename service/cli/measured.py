"""The kinds of measurement that `portcullis evaluate` does, each as JSON values and as something to be printed."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import RenderableType

from model_store import DataRecord, Manifest, Store, parse_reference
from service.cli.common import command_line, open_models, read_dataset, settings_with

if TYPE_CHECKING:
    from defenses.evaluation import Progress
    from defenses.evaluation.plan import EvaluationPlan
    from service.datasets import Dataset
    from service.evaluate import CraftedOn
    from service.hardware import DeviceName

Measured = tuple[dict[str, Any], RenderableType]

EVALUATIONS = "evaluations"
"""The folder of the store where examples are kept, beside the models."""


@dataclass(frozen=True)
class Asked:
    """What the command was asked of: versions, data, where things are, and how far it is."""

    names: list[str]
    data: list[str]
    data_root: Path
    store: Path | None
    seed: int
    device: "DeviceName"
    progress: "Progress"

    @property
    def models(self) -> Store:
        """The store of the models."""
        return open_models(self.store)

    def one(self) -> str:
        """Return the only version; raises ``ValueError`` where there are several."""
        if len(self.names) > 1:
            raise ValueError(f"Expected one version for this measurement, got {', '.join(self.names)}.")
        return self.names[0]

    def images(self, name: str, input_of: Manifest, fitted_on: DataRecord | None) -> "Dataset":
        """Load the data, split as it was for a version's fit; a warning is told where the images are others."""
        split_seed = fitted_on.split_seed if fitted_on else self.seed
        dataset = read_dataset(self.data, input_of, split_seed, self.data_root, self.progress)
        if fitted_on and fitted_on.digest != dataset.digest:
            typer.echo(
                f"portcullis: {name} was fitted on other images than these (digest {fitted_on.digest[:12]}, not "
                f"{dataset.digest[:12]}), so that some of these may have been fitted on.",
                err=True,
            )
        return dataset


def evaluation(
    asked: Asked, plan: "EvaluationPlan", *, cache: Path | None, minutes: float | None, report: Path | None
) -> Measured:
    """Evaluate published versions from the store; what no scenario has an attack for is told before they are read."""
    from service.evaluation import evaluate_defenses, load_subjects
    from service.hardware import find_device
    from service.tables import evaluation_tables

    plan.parsed()
    device = find_device(asked.device)
    subjects = load_subjects(asked.models, asked.names)
    if not any(subject.noisy_by_design for subject in subjects) and (plan.confusion is not None or not plan.noise):
        raise ValueError(
            f"--confusion and --noise are for a defense that has noise, and {', '.join(asked.names)} has none."
        )
    fitted = next((each.manifest for each in subjects if each.manifest.data), None)
    dataset = asked.images(subjects[0].name, subjects[0].manifest, fitted.data if fitted else None)
    evaluated = evaluate_defenses(
        subjects,
        dataset,
        plan,
        cache=cache or settings_with(store=asked.store).store / EVALUATIONS,
        minutes=minutes,
        device=device,
        progress=asked.progress,
        command=command_line(),
    )
    if report:
        from service.evaluation_report import write_page

        write_page(evaluated, report)
    return evaluated.report.as_json(), evaluation_tables(evaluated.report)


def beside_controls(asked: Asked, plan: "EvaluationPlan") -> Measured:
    """Measure a pool of inverse perturbations beside what may replace its direction."""
    from defenses.nip import InversePerturbation
    from service.defended import load_defended
    from service.hardware import find_device
    from service.nip_success import SuccessPlan, measure_success
    from service.tables import success_tables

    name = asked.one()
    device = find_device(asked.device)
    fetched, protected = load_defended(asked.models, *parse_reference(name))
    pool = isinstance(protected.purifier, InversePerturbation)
    if not pool:
        raise ValueError(f"--controls is for a defense with a pool of inverse perturbations, and {name} has none.")
    dataset = asked.images(name, fetched.manifest, fetched.manifest.data)
    wanted = SuccessPlan(plan.attacks, plan.limit, plan.seed)
    report = measure_success(
        fetched, protected, dataset, wanted, device=device, progress=asked.progress, command=command_line()
    )
    return report.as_json(), success_tables(report)


def studies(asked: Asked, names: list[str], plan: "EvaluationPlan", plots: Path | None) -> Measured:
    """Look into a NIP defense."""
    from service.defended import load_defended
    from service.hardware import find_device
    from service.nip_studies import (
        StudyPlan,
        check_folder,
        check_suitable,
        known_studies,
        run_studies,
        study_tables,
        write_plots,
    )

    if plots:
        check_folder(plots)
    wanted = StudyPlan(known_studies(names), plan.attacks, plan.limit, plan.seed)
    name = asked.one()
    device = find_device(asked.device)
    kind = asked.models.manifest(*parse_reference(name)).kind
    if kind != "nip":
        raise ValueError(f"--study is for a defense of kind nip, and {name} is of kind {kind}.")
    fetched, protected = load_defended(asked.models, *parse_reference(name))
    check_suitable(fetched.manifest, protected)
    dataset = asked.images(name, fetched.manifest, fetched.manifest.data)
    report = run_studies(
        fetched, protected, dataset, wanted, device=device, progress=asked.progress, command=command_line()
    )
    values = report.as_json()
    if plots:
        write_plots(values, plots)
    return values, study_tables(report)


def through_http(asked: Asked, url: str, plan: "EvaluationPlan", crafted_on: "CraftedOn") -> Measured:
    """Measure a running gateway as its clients see it, attacked on the bare classifier or on its own answers."""
    from defenses.classifier import Classifier
    from service.evaluate import PatientClient, Report, measure, search, seeing_labels_alone
    from service.fit import find_classifier
    from service.served import GRAPH
    from service.tables import report_table

    name = asked.one()
    if parse_reference(name)[1] is not None:
        raise ValueError(
            f"Expected a name without a version, since the gateway at {url} has its own in service, got {name}."
        )
    models = asked.models
    searching = crafted_on == "gateway"
    if searching:
        seeing_labels_alone(plan.attacks)
    with closing(PatientClient(url)) as client:
        served = client.served(name)
        if served.mode == "shadow":
            raise ValueError(f"{name} is served in shadow mode, in which clients are told nothing that can be counted.")
        bare = find_classifier(models, name, served.version)
        test = asked.images(name, bare.manifest, models.manifest(name, served.version).data).test
        measured = measure(
            client,
            name,
            Classifier.load(bare.folder / GRAPH).eval(),
            test,
            attacks=() if searching else plan.attacks,
            limit=plan.limit,
            seed=plan.seed,
            progress=asked.progress,
        )
        classes = len(bare.manifest.labels)
        found = search(client, name, classes, test, plan, progress=asked.progress) if searching else ()
    report = Report.of(name, served, measured, found, client.waits)
    return report.as_json(), report_table(report)

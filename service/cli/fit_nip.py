"""The command that fits NIP."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from model_store import Fetched, Manifest
from service.cli.common import (
    DataOption,
    DataRootOption,
    JsonOption,
    SeedOption,
    StoreOption,
    command_line,
    failures_told,
)
from service.cli.endings import exhaustion_told, interruptions_told
from service.cli.fitted import (
    ClassifierArgument,
    DeviceOption,
    FreshOption,
    PresetOption,
    PromoteOption,
    fit_and_show,
    tell,
)

if TYPE_CHECKING:
    from defenses.evaluation import Progress
    from defenses.nip import GatedPlan, NipPlan, ResponsePlan
    from service.datasets import Dataset


RESPONSE = "Of the default, which answers by response"
CORRECTION = "With --inspector, which corrects alerted images"
POOL = "With --preset paper, which keeps a pool"


def nip(
    name: ClassifierArgument,
    data: DataOption,
    preset: PresetOption = "default",
    inspector: Annotated[
        str | None,
        typer.Option(help="Correct what the Inspector of this coophance version, as NAME@VERSION, alerts."),
    ] = None,
    push: Annotated[
        Literal["smoothing", "inverse"] | None,
        typer.Option(
            help="What an image's answer is tried by: a light blur, or its class' mean inverse perturbation.",
            rich_help_panel=RESPONSE,
        ),
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(help="The blur's share of each neighbor, at most a third.", rich_help_panel=RESPONSE),
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(help="The root mean square that an inverse perturbation changes a pixel by, of 1."),
    ] = None,
    substitute: Annotated[
        bool,
        typer.Option(
            "--substitute",
            help="With --push inverse, take no gradient of the classifier, but of one that learns its answers.",
            rich_help_panel=RESPONSE,
        ),
    ] = False,
    substitute_epochs: Annotated[
        int | None, typer.Option(help="How long that is trained.", min=1, rich_help_panel=RESPONSE)
    ] = None,
    substitute_queries: Annotated[
        int | None,
        typer.Option(
            help="How many fitting images are asked about.", show_default="all", min=1, rich_help_panel=RESPONSE
        ),
    ] = None,
    substitute_answers: Annotated[
        Literal["label", "probabilities"] | None,
        typer.Option(help="What of each answer is used.", rich_help_panel=RESPONSE),
    ] = None,
    substitute_flip: Annotated[
        bool | None,
        typer.Option(
            "--substitute-flip/--substitute-no-flip",
            help="Whether a mirrored image has the same answer.",
            show_default="it has",
            rich_help_panel=RESPONSE,
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(help="The standard deviation of the noise before it, of 1.", rich_help_panel=CORRECTION),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="The share of clean images that may be alerted.", rich_help_panel=CORRECTION),
    ] = None,
    validation_examples: Annotated[
        int | None,
        typer.Option(help="Images per attack that the alert is fitted to.", min=1, rich_help_panel=CORRECTION),
    ] = None,
    accuracy_loss: Annotated[
        float | None, typer.Option(help="The share of clean images that the defense may cost.", min=0)
    ] = None,
    k1: Annotated[int | None, typer.Option(help="Front neurons, of the most influence.", min=0)] = None,
    k2: Annotated[int | None, typer.Option(help="Tail neurons, of the least influence.", min=0)] = None,
    layer: Annotated[
        str | None, typer.Option(help="The layer of the neurons, if not the one found at registering.")
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(help="How many benign images inverse perturbations are made of.", min=1, rich_help_panel=POOL),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Candidates for each unknown input, above 0 and at most 1.", rich_help_panel=POOL),
    ] = None,
    sign: Annotated[
        Literal["tail-front", "front-tail"] | None,
        typer.Option(
            help="The loss whose gradient a candidate is: as printed, or as the authors' program has it.",
            rich_help_panel=POOL,
        ),
    ] = None,
    template: Annotated[
        Literal["global", "class", "frequency"] | None,
        typer.Option(
            help="What remains in all benign images, in all of a class, or in a share of them.", rich_help_panel=POOL
        ),
    ] = None,
    template_share: Annotated[
        float | None, typer.Option(help="That share, with --template frequency.", rich_help_panel=POOL)
    ] = None,
    similarity: Annotated[
        Literal["index", "influence"] | None,
        typer.Option(
            help="Compare index sequences with the template, or the influence of the neurons.", rich_help_panel=POOL
        ),
    ] = None,
    search: Annotated[
        Literal["all", "class"] | None,
        typer.Option(help="Among all candidates, or those of the predicted class.", rich_help_panel=POOL),
    ] = None,
    amplitude: Annotated[
        float | None,
        typer.Option(help="The strength of the perturbation, in place of choosing it.", rich_help_panel=POOL),
    ] = None,
    amplitudes: Annotated[
        str | None, typer.Option(help="The strengths that are tried, as 0.05,0.1,0.2.", rich_help_panel=POOL)
    ] = None,
    precision: Annotated[
        Literal["float16", "float32"] | None,
        typer.Option(help="What candidates are kept in.", rich_help_panel=POOL),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Measure against this attack; repeat for several.", show_default="the preset's"),
    ] = None,
    test_examples: Annotated[int | None, typer.Option(help="Test images that each attack is run on.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a batch; fewer need less memory.", min=1)] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    fresh: FreshOption = False,
    promote: PromoteOption = False,
    data_root: DataRootOption = Path("var/data"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a reclassifying defense and publish it: by response, of a pool as printed, or behind an Inspector's alerts.

    By default each image is classified again after a light push, and what changes in the answer decides; benign images
    alone settle that, and no image is alerted. --preset paper makes the printed method's pool of inverse perturbations.
    --inspector uses the Regulator and the Inspector of a coophance version and moves alerted images against their own
    class; its alert is fitted to attacks. A fit that was interrupted resumes when the same command is given again.
    """
    with failures_told(), interruptions_told(), exhaustion_told():
        from service.fit_plan import chosen_nip_plan, chosen_substitute, read_amplitudes

        learnt = {
            "epochs": substitute_epochs,
            "queries": substitute_queries,
            "answers": substitute_answers,
            "flip": substitute_flip,
        }
        plan = chosen_nip_plan(
            preset,
            inspector,
            {
                "push": push,
                "substitute": chosen_substitute(substitute, learnt),
                "weight": weight,
                "size": size,
                "noise": noise,
                "budget": budget,
                "validation_examples": validation_examples,
                "candidates": candidates,
                "eta": eta,
                "k1": k1,
                "k2": k2,
                "layer": layer,
                "sign": sign,
                "template": template,
                "template_share": template_share,
                "similarity": similarity,
                "search": search,
                "amplitude": amplitude,
                "accuracy_loss": accuracy_loss,
                "amplitudes": read_amplitudes(amplitudes),
                "precision": precision,
                "attacks": attack and tuple(attack),
                "test_examples": test_examples,
                "batch_size": batch_size,
                "seed": seed,
            },
        )

        def publish(root: Path, classifier: Fetched, dataset: "Dataset", progress: "Progress") -> Manifest:
            return _published(plan, inspector, root, classifier, dataset, device, fresh, progress)

        fit_and_show(
            name,
            publish,
            data=data,
            seed=seed,
            data_root=data_root,
            store=store,
            promote=promote,
            as_json=as_json,
            advice="say with --accuracy-loss what it may cost",
        )


def _published(
    plan: "NipPlan | ResponsePlan | GatedPlan",
    inspector: str | None,
    root: Path,
    classifier: Fetched,
    dataset: "Dataset",
    device: Literal["auto", "cpu", "cuda"],
    fresh: bool,
    progress: "Progress",
) -> Manifest:
    """Fit what the plan is of, and publish it."""
    from defenses.nip import GatedPlan, ResponsePlan
    from service.fit_gated import publish_gated
    from service.fit_nip import publish_nip
    from service.fit_response import publish_response

    def publish(method: Callable[..., Manifest], *arguments: Any) -> Manifest:
        return method(
            root,
            classifier,
            dataset,
            *arguments,
            device=device,
            fresh=fresh,
            progress=progress,
            notice=tell,
            command=command_line(),
        )

    if isinstance(plan, GatedPlan):
        return publish(publish_gated, plan, inspector)
    return publish(publish_response if isinstance(plan, ResponsePlan) else publish_nip, plan)

"""Tables of studies, for people."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from defenses.nip.studies import ConsistencyStudy, InfluenceStudy, Outcome, PlaceStudy, Share, Sweep
from service.nip_studies.report import Study, StudyName, StudyReport

NOTHING = "-"

TITLES: dict[StudyName, str] = {
    "influence": "influence of the neurons",
    "tknc": "top-k neuron consistency",
    "k": "front and tail neurons",
    "layer": "layer",
    "eta": "candidates for each unknown input",
    "neurons": "added to the image, or to the activations",
}


def study_tables(report: StudyReport) -> Group:
    """Return a report as tables: its attacks, then one for each study."""
    attacks = _table(f"{report.model}, version {report.version}, attacked on the bare classifier, as crafted")
    attacks.caption = f"Layer {report.layer}, {report.candidates} candidates, amplitude {report.amplitude:g}."
    attacks.add_column("attack", overflow="fold")
    for heading in ("fooling", "L2"):
        attacks.add_column(heading, justify="right")
    for each in report.attacks:
        distance = NOTHING if each.distortion_l2 is None else f"{each.distortion_l2:.2f}"
        attacks.add_row(each.attack, f"{each.fooling}/{each.attempted}", distance)
    return Group(attacks, *(_study_table(TITLES[name], study) for name, study in report.studies.items()))


def _study_table(title: str, study: Study) -> Table:
    if isinstance(study, InfluenceStudy):
        return _influence_table(title, study)
    if isinstance(study, ConsistencyStudy):
        return _consistency_table(title, study)
    return _sweep_table(title, study) if isinstance(study, Sweep) else _place_table(title, study)


def _influence_table(title: str, study: InfluenceStudy) -> Table:
    table = _table(title)
    table.caption = (
        "Falls: images in which a group's influence on the log odds of the true class is less than on the clean image, "
        "or its output. The front neurons are those of most influence on the clean image."
    )
    for heading in ("attack", "image", "measure", "neurons"):
        table.add_column(heading, overflow="fold")
    for heading in ("before", "after", "falls"):
        table.add_column(heading, justify="right")
    for row in study.groups:
        if row.towards == "true" and row.measure in ("log odds", "output"):
            means = (f"{row.before:.3f}", f"{row.after:.3f}")
            neurons = f"{row.neurons} {row.group}"
            table.add_row(row.attack, row.moved, row.measure, neurons, *means, _told(row.suppressed))
    return table


def _consistency_table(title: str, study: ConsistencyStudy) -> Table:
    table = _table(f"{title}, k = {study.k}")
    told = {each.attack: each for each in study.correlations}
    told_all = told[None]
    table.caption = (
        "Right: answered with the true class. Spearman's correlation of the two over the images of a row; over the "
        f"{told_all.points} rows of all attacks it is {_decimal(told_all.coefficient)}"
        + "".join(
            f", over those of {name} {_decimal(each.coefficient)}" for name, each in told.items() if name is not None
        )
        + "."
    )
    for heading in ("attack", "moved by"):
        table.add_column(heading, overflow="fold")
    for heading in ("consistency", "95 %", "right", "Spearman"):
        table.add_column(heading, justify="right")
    for row in study.rows:
        interval = row.consistency_interval
        table.add_row(
            row.attack or "clean",
            row.direction or NOTHING,
            f"{row.consistency:.3f}",
            NOTHING if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
            _told(row.right),
            _decimal(row.correlation),
        )
    return table


def _sweep_table(title: str, study: Sweep) -> Table:
    table = _table(title)
    table.caption = "".join(
        [
            "With a star: the version's own setting. Clean: accuracy; the rest: defense success rate.",
            *(
                f" No pool for {each.varied} {getattr(each.setting, each.varied)}: {each.reason}"
                for each in study.refused
            ),
        ]
    )
    table.add_column("setting", overflow="fold")
    table.add_column("pool", justify="right")
    _outcome_columns(table, study.rows[0].outcome if study.rows else None)
    for row in study.rows:
        scope = f" ({row.scope})" if row.varied == "layer" and row.scope else ""
        setting = f"{row.varied} {getattr(row.setting, row.varied)}{scope}"
        table.add_row(f"{setting} *" if row.own else setting, str(row.candidates), *_outcome_cells(row.outcome))
    return table


def _place_table(title: str, study: PlaceStudy) -> Table:
    table = _table(title)
    table.caption = f"The same {study.candidates} examples. Clean: accuracy; the rest: defense success rate."
    table.add_column("place")
    _outcome_columns(table, study.rows[0].outcome)
    for row in study.rows:
        table.add_row(row.place, *_outcome_cells(row.outcome))
    return table


def _outcome_columns(table: Table, outcome: Outcome | None) -> None:
    for heading in ("amplitude", "clean", *(each.attack for each in (outcome.attacks if outcome else ()))):
        table.add_column(heading, justify="right", overflow="fold")


def _outcome_cells(outcome: Outcome) -> list[str]:
    amplitude = f"{outcome.amplitude:g} {'set anew' if outcome.recalibrated else 'own'}"
    return [amplitude, _told(outcome.clean), *(_told(each.right) for each in outcome.attacks)]


def _table(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def _told(share: Share) -> str:
    if share.rate is None or share.interval is None:
        return NOTHING
    low, high = (100 * end for end in share.interval)
    return f"{100 * share.rate:.1f} % ({low:.1f}-{high:.1f})"


def _decimal(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"

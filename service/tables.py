"""Tables for people."""

from rich.table import Table

from service.evaluate import Report


def report_table(report: Report) -> Table:
    """Return a report as a table: the share of right answers, bare and protected, of alerts and of resisted images."""
    table = Table(
        title=f"{report.model}, version {report.version}, mode {report.mode}, through HTTP",
        caption="\n".join(
            f"{row.attack}: {row.fooling_unrounded} fool it, {row.fooling} when rounded to 8 bits"
            for row in report.attacks
        ),
    )
    table.add_column("input")
    for heading in ("attacked", "sent", "bare", "gate", "alerted", "resisted", "L2"):
        table.add_column(heading, justify="right")
    clean = report.clean
    table.add_row(
        "clean",
        "",
        str(clean.images),
        _percent(clean.undefended_accuracy),
        _percent(clean.accuracy),
        _percent(clean.false_positive_rate),
    )
    for row in report.attacks:
        table.add_row(
            row.attack.partition(":")[0],
            str(row.attempted),
            str(row.fooling),
            _percent(row.undefended_accuracy),
            _percent(row.corrected),
            _percent(row.alerted),
            _percent(row.resisted),
            f"{row.distortion_l2:.2f}",
        )
    return table


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"

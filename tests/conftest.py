"""Which tests may be left out: everywhere those whose programs are missing, with --strict-skips hardly any."""

import pytest

ALLOWED_REASONS = ("The folder of real data and published weights is not here.", "There is no GPU here.")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="Fail when a test is skipped for another reason than absent data or an absent GPU.",
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--strict-skips"):
        return
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is None:
        return
    refused = [
        f"{report.nodeid}: {report.longrepr[2]}"
        for report in reporter.stats.get("skipped", [])
        if not any(reason in str(report.longrepr) for reason in ALLOWED_REASONS)
    ]
    if refused:
        reporter.write_line("Skipped, and not allowed to be:", red=True)
        for line in refused:
            reporter.write_line(f"  {line}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from loadtest import opening


@pytest.fixture
def measure(store):
    """Run the script on versions of the handmade store."""

    def run(*arguments: str) -> Result:
        command = typer.Typer()
        command.command()(opening.main)
        return CliRunner().invoke(command, [*arguments, "--store", str(store)])

    return run


def test_opening_is_told_beside_a_session_that_has_nothing_to_prepare(measure):
    told = measure("digits@1", "digits@2", "--turns", "3")
    assert told.exit_code == 0, told.output
    rows = [line.split("|") for line in told.output.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["digits@1", "digits@2"]
    for row in rows:
        engine, session, prepared = (float(cell) for cell in row[2:5])
        assert min(engine, session, prepared) > 0


def test_a_version_that_is_not_there_is_named(measure):
    told = measure("digits@99")
    assert told.exit_code == 1
    assert "99" in told.output

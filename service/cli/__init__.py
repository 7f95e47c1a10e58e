"""The command line."""

import os

import typer

from service.cli import attacks, comparing, fitting, measuring, serving, storing

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Put an image classifier behind a defense.")


@app.callback()
def main() -> None:
    """Put an image classifier behind a defense."""
    # All must be set before torch, foolbox or ONNX Runtime is imported, unless the user has set them already.
    # Threads that spin while they wait slow everything else on a machine with few cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # foolbox imports GitPython, which fails where git is not installed.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # ONNX Runtime looks up hosts at its start unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


app.command()(serving.demo)
app.command()(serving.serve)
app.command()(storing.register)
app.add_typer(fitting.app, name="fit")
app.command()(measuring.evaluate)
app.command()(comparing.compare)
app.command()(attacks.attacks)
app.command()(storing.promote)
app.command()(storing.models)
app.command()(storing.verify)
app.command()(serving.alerts)

"""Assembly of the commands. An error of the project becomes a message on stderr and an exit code."""

import atexit
import gc
import logging
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from fhir_assets.cli.commands import COMMANDS
from fhir_assets.cli.lazy_commands import build_group
from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import DEFECT_EXIT_CODE
from fhir_assets.file_modes import restrict_umask
from fhir_assets.foreign_errors import choose_error, translate_error, was_interrupted
from fhir_assets.logs import describe_error

app = typer.Typer(
    name="fhir-assets",
    cls=build_group(COMMANDS),
    help="Load FHIR data from clinical servers into Postgres tables, and operate the pipeline that does so.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(version("fhir-assets"))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Load FHIR data from clinical servers into Postgres tables, and operate the pipeline that does so."""
    context.call_on_close(_finish_audit_marks)


def _finish_audit_marks() -> None:
    """Write the mark of the audit log if the command has opened a database, and so imported the module."""
    if module := sys.modules.get("fhir_assets.deployment.audit_marker"):
        module.finish_marks()


def main() -> None:
    """Run the command line. An error becomes a message on stderr and the exit code of its kind; see ``errors``."""
    restrict_umask()
    # The interpreter frees what is left when it ends. Without this it first searches it for cycles, for 0.3 s.
    atexit.register(gc.freeze)
    # A log record that cannot be written must not print a stack trace, which may quote patient data.
    logging.raiseExceptions = False
    try:
        _run()
    except KeyboardInterrupt:
        _exit_interrupted()
    except BrokenPipeError:
        # The reader of stdout, such as head, has exited.
        _discard_stdout()
        sys.exit(1)
    except Exception as error:
        if was_interrupted(error):
            _exit_interrupted()
        known = translate_error(error, with_names=True)
        if known is not None:
            _fail(str(known), known.exit_code)
        # The message of a driver may quote a row, so only the type and the positions in the code are printed.
        facts = describe_error(error)
        message = f"unexpected {facts['type']} at {facts['at']}. This is a defect: please report this message"
        _fail(message, DEFECT_EXIT_CODE)


def _exit_interrupted() -> NoReturn:
    """End after Ctrl-C, as a shell expects it of a command that SIGINT ends."""
    typer.echo("fhir-assets: interrupted. Run the same command again to do what it had not finished", err=True)
    sys.exit(128 + signal.SIGINT)


def _run() -> None:
    """Run the command, then write what stdout has buffered. Raises OutOfResources or ConfigurationError if it fails."""
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard_stdout()
            raise choose_error(error)(
                f"cannot write to stdout: {error.strerror}. The output is incomplete: free space, then run it again"
            ) from None


def _discard_stdout() -> None:
    """Redirect stdout to the null device, because the interpreter flushes it again when it ends."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _fail(message: str, code: int) -> NoReturn:
    from rich.console import Console  # only for a failure: `--help` and a command that succeeds do not need it

    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"fhir-assets: {escape_control_characters(message)}", markup=False
    )
    sys.exit(code)

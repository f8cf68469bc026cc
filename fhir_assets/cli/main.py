"""Assembly of the commands. An error of the project becomes a message on stderr and an exit code."""

import errno
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from fhir_assets.cli.commands import COMMANDS
from fhir_assets.cli.lazy_commands import build_group
from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import ConfigurationError, FhirAssetsError
from fhir_assets.file_modes import restrict_umask
from fhir_assets.logs import describe_error

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

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
    """Run the command line. An error of the project is printed as a message on stderr, with exit code 1."""
    restrict_umask()
    # A log record that cannot be written must not print a stack trace, which may quote patient data.
    logging.raiseExceptions = False
    try:
        _run()
    except FhirAssetsError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of stdout, such as head, has exited.
        _discard_stdout()
        sys.exit(1)
    except Exception as error:
        # The message of a driver may quote a row, so only the type and the positions in the code are printed.
        facts = describe_error(error)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            _fail(f"cannot write at {facts['at']}: {os.strerror(error.errno)}. Free space, then run the command again")
        _fail(f"unexpected {facts['type']} at {facts['at']}. This is a defect: please report this message")


def _run() -> None:
    """Run the command, then write what stdout has buffered. Raises ConfigurationError if stdout cannot be written."""
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard_stdout()
            raise ConfigurationError(
                f"cannot write to stdout: {error.strerror}. The output is incomplete: free space, then run it again"
            ) from None


def _discard_stdout() -> None:
    """Redirect stdout to the null device, because the interpreter flushes it again when it ends."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _fail(message: str) -> NoReturn:
    from rich.console import Console  # only for a failure: `--help` and a command that succeeds do not need it

    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"fhir-assets: {escape_control_characters(message)}", markup=False
    )
    sys.exit(1)

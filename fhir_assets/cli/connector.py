"""`fhir-assets connector`: deliver changes of the tables in schema ``health`` to a FHIR server."""

import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Annotated

import typer

from fhir_assets import logs
from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.delivery.connector import dead_letters, outbox
from fhir_assets.delivery.connector.setup import build_connector, load_sources
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.metrics.exposition import serve_metrics
from fhir_assets.metrics.pipeline import register_database_metrics
from fhir_assets.retries import RetryPolicy
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db.connections import Connection

app = typer.Typer(help="Deliver changes of the tables in schema health to a FHIR server.", no_args_is_help=True)
dlq = typer.Typer(help="List, replay or discard changes that the FHIR server did not accept.", no_args_is_help=True)
app.add_typer(dlq, name="dlq")

_COLUMNS = ("id", "source", "record_id", "reason", "message", "attempts", "failed_at", "status")

DATABASE_WAIT = RetryPolicy(first_wait=0.5, max_wait=5, budget=60)
"""How long `connector run` waits at its start for a database that cannot be reached."""

_log = logging.getLogger(__name__)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON")]
Ids = Annotated[
    list[int] | None,
    typer.Argument(metavar="[ID…]", show_default=False, help="Ids, as `connector dlq list` prints them"),
]
All = Annotated[bool, typer.Option("--all", help="All open changes")]
Reason = Annotated[
    str | None, typer.Option(help="Only this reason: no-identifier, foreign-resource, several-matches, refused, …")
]


@app.command()
def install(
    existing: Annotated[
        bool, typer.Option("--existing", help="Also deliver the rows that the tables already contain")
    ] = False,
) -> None:
    """Install the outbox: tables and triggers in schema health. A second installation changes nothing."""
    settings = load_settings()
    with Warehouse(settings).connect() as conn:
        outbox.install(conn)
        console.print("The outbox is installed. From now on it records changes of health.patient.")
        if existing:
            for source in load_sources(settings).values():
                console.print(f"{outbox.enqueue_existing(conn, source):,} rows of {source.table} wait for delivery.")


@app.command()
def run(
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Number of worker threads; default: CONNECTOR_WORKERS")
    ] = None,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="Stop when no change is left to deliver")] = False,
) -> None:
    """Deliver changes until SIGTERM or Ctrl-C; deliveries in progress are completed first.

    Several connectors can run at the same time. If the database cannot be reached at the start, the command waits for
    it, at most for a minute.
    """
    settings = load_settings()
    logs.configure("connector", settings.log_level)
    warehouse = Warehouse(settings)
    warehouse.wait(DATABASE_WAIT, _log)
    with _connect_to_outbox(warehouse):
        pass
    with closing(build_connector(settings, warehouse.connect, workers=workers)) as connector:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: connector.stop())
        with (
            register_database_metrics(settings, warehouse.connect),
            serve_metrics(settings.metrics_host, settings.metrics_port),
        ):
            connector.run(until_empty=until_empty)


@app.command()
def status(json: Json = False) -> None:
    """Print how many changes wait, the age of the oldest, and the number of dead letters.

    The exit code is 1 if the oldest change waits longer than CONNECTOR_MAX_LAG_SECONDS.
    """
    settings = load_settings()
    with _connect_to_outbox(Warehouse(settings)) as conn:
        outbox_status = outbox.read_status(conn)
    if json:
        print_json(asdict(outbox_status))
    else:
        print_table("Outbox", [asdict(outbox_status)], asdict(outbox_status))
    if outbox_status.lag_seconds > settings.connector_max_lag_seconds:
        raise typer.Exit(1)


@dlq.command("list")
def list_dead_letters(
    reason: Reason = None,
    status: Annotated[
        str, typer.Option(help="Only this status: open, replayed, superseded, discarded; or all")
    ] = "open",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Print at most this many")] = 50,
    json: Json = False,
) -> None:
    """List changes that were not delivered, newest first."""
    if status not in ("open", "replayed", "superseded", "discarded", "all"):
        raise ConfigurationError("--status is one of open, replayed, superseded, discarded, all")
    with _connect_to_outbox(Warehouse(load_settings())) as conn:
        wanted: dead_letters.Status | None = None if status == "all" else status  # type: ignore[assignment]
        rows = [asdict(row) for row in dead_letters.find(conn, status=wanted, reason=reason, limit=limit)]
    if json:
        print_json(rows)
    else:
        print_table("Not delivered", rows, _COLUMNS)


@dlq.command()
def replay(ids: Ids = None, everything: All = False, reason: Reason = None) -> None:
    """Put changes back into the outbox. The current rows of the tables are sent."""
    _require_selection(ids, everything, reason)
    with _connect_to_outbox(Warehouse(load_settings())) as conn:
        count = dead_letters.replay(conn, ids or None, reason=reason)
    _report(ids, count, "changes are back in the outbox")


@dlq.command()
def discard(ids: Ids = None, everything: All = False, reason: Reason = None) -> None:
    """Discard changes. They stay in the table with the status discarded."""
    _require_selection(ids, everything, reason)
    with _connect_to_outbox(Warehouse(load_settings())) as conn:
        count = dead_letters.discard(conn, ids or None, reason=reason)
    _report(ids, count, "changes are discarded")


@contextmanager
def _connect_to_outbox(warehouse: Warehouse) -> Iterator[Connection]:
    with warehouse.connect() as conn:
        if not outbox.is_installed(conn):
            raise ConfigurationError(
                "the outbox is not installed, or an earlier release installed it: run `fhir-assets connector install`"
            )
        yield conn


def _require_selection(ids: list[int] | None, everything: bool, reason: str | None) -> None:
    if not ids and not everything and not reason:
        raise ConfigurationError("select changes: ids as `connector dlq list` prints them, --reason, or --all")


def _report(ids: list[int] | None, count: int, outcome: str) -> None:
    console.print(f"{count:,} {outcome}.")
    if ids and count < len(set(ids)):
        raise ConfigurationError(f"{len(set(ids)) - count} of the ids are not open dead letters of the connector")

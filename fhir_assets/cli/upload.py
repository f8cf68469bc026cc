"""`fhir-assets upload`: a folder of NDJSON to a FHIR server."""

import hashlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event
from typing import Annotated

import orjson
import psycopg
import typer

from fhir_assets import logs
from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.cli.upload_progress import Progress
from fhir_assets.delivery.tables import dead_letter
from fhir_assets.delivery.upload.files import Folder, Unusable
from fhir_assets.delivery.upload.journal import Journal
from fhir_assets.delivery.upload.uploader import NullListener, Uploader
from fhir_assets.deployment.encryption import build_cipher
from fhir_assets.deployment.targets import build_upload_client
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, FhirAssetsError
from fhir_assets.fhir import bundles
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import dead_letters

Steps = dict[str, dict[str, int]]
"""By type, in order: how many resources each file has of it."""

_UNKNOWN = "unknown"
_COLUMNS = ("type", "created", "updated", "unchanged", "failed")


def upload(
    source: Annotated[Path, typer.Option("--input", "-i", help="A folder of NDJSON files (.gz too), or one file")],
    url: Annotated[str | None, typer.Option(help="The FHIR server's base URL, in place of FHIR_BASE_URL")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Resources in a Bundle, in place of BATCH_SIZE (100)")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Bundles of a type under way at once")] = 4,
    transaction: Annotated[bool, typer.Option("--transaction", help="Send transactions in place of batches")] = False,
    skip_unchanged: Annotated[
        bool, typer.Option("--skip-unchanged", help="Ask first, and do not send what the server holds just so")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an upload of this input to this server ended")
    ] = False,
    failures: Annotated[Path, typer.Option(help="Where what was refused is written")] = Path("upload_failures.ndjson"),
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON")] = False,
) -> None:
    """Put every resource of a folder under its own id: type by type, in the order in which they refer to one another.

    Ends with 0 only if the server took all of them. What it refused is in the failure file and in the dead letters.
    """
    overrides = {"fhir_source": "search", **({"fhir_base_url": url} if url else {})}
    settings = load_settings(**overrides)
    logs.configure("upload", settings.log_level)
    size = batch_size or settings.batch_size
    folder, stop, started = Folder(source), Event(), time.perf_counter()
    with (
        build_upload_client(settings, workers=workers, stop=stop) as client,
        _journal(settings, client, source) as journal,
    ):
        say = (lambda *_: None) if json else _say
        say("Source", f"{source}, {len(folder.names)} files")
        say("Destination", client.base_url)
        kind = "transactions" if transaction else "batches"
        say("Sent as", f"{kind} of {size}, {workers} at once{', unchanged ones left out' if skip_unchanged else ''}")
        version = client.capabilities().fhir_version or "of an unnamed version"
        say("Server test", f"passed: FHIR {version} after {time.perf_counter() - started:.2f} s")
        shape = {"size": str(size), "workers": str(workers)}
        steps = _planned(folder, journal, shape, resume=resume)
        if not json:
            _show(steps)
        with nullcontext(NullListener()) if json else Progress(steps) as listener, _interruptible(stop):
            Uploader(
                client,
                journal,
                listener,
                batch_size=size,
                workers=workers,
                transaction=transaction,
                skip_unchanged=skip_unchanged,
                stop=stop,
            ).upload(steps, folder.entries)
        failed = _report(settings, journal, client, steps, failures)
        _summarize(journal, client, source, failures if failed else None, time.perf_counter() - started, json=json)
    if failed:
        raise typer.Exit(1)
    if journal.path:
        journal.path.unlink()


def _journal(settings: Settings, client: FhirClient, source: Path) -> Journal:
    """Where this upload is noted: a file for this input and this server."""
    digest = hashlib.sha256(f"{source.expanduser().resolve()}\0{client.base_url}".encode()).hexdigest()[:16]
    return Journal(settings.home / "uploads" / f"{digest}.sqlite", cipher=build_cipher(settings))


def _planned(folder: Folder, journal: Journal, shape: Mapping[str, str], *, resume: bool) -> Steps:
    """What is to be sent in which order, counted; or as it was when the upload began that goes on now."""
    state, run_id = folder.state(), str(uuid.uuid4())
    facts = journal.facts()
    if resume and facts:
        if facts["state"] != state:
            raise ConfigurationError("the files have changed since that upload began: start anew, without --resume")
        if any(facts[name] != value for name, value in shape.items()):
            raise ConfigurationError(
                f"that upload was begun with --batch-size {facts['size']} --workers {facts['workers']}: give the same"
            )
        journal.resume({"run_id": run_id})
        begun: Steps = orjson.loads(facts["steps"])
        return begun
    if resume:
        errors.print("There is no upload of this input to this server to resume: it begins anew.")
    elif facts:
        errors.print("An earlier upload of this input did not end well; this one begins anew. --resume would go on.")
    steps: Steps = {}

    def count(refuse: Callable[[Unusable], None]) -> dict[str, str]:
        counts = {name: folder.count(name, refuse) for name in folder.names}
        for name in bundles.sort_types({name for of_file in counts.values() for name in of_file}):
            steps[name] = {file: of_file[name] for file, of_file in counts.items() if name in of_file}
        return {"state": state, **shape, "run_id": run_id, "steps": orjson.dumps(steps).decode()}

    journal.begin(count)
    return steps


@contextmanager
def _interruptible(stop: Event) -> Iterator[None]:
    """What ends an upload early says that it can be resumed. SIGTERM ends it as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        stop.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (FhirAssetsError, KeyboardInterrupt):
        errors.print("The upload is not finished; what was sent is noted. The same command with --resume goes on.")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(settings: Settings, journal: Journal, client: FhirClient, steps: Steps, path: Path) -> int:
    """Write the failure file and the dead letters; how many there are. Letters of earlier uploads that are delivered
    now are resolved.
    """
    count = journal.failed_count()
    try:
        if count:
            with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.writelines(failure.line for failure in journal.failures())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}; give another --failures") from None
    if count == 0 and settings.db_url is None and not (settings.home / "postgres").exists():
        return 0
    partition = f"upload:{journal.path.stem if journal.path else ''}"
    try:
        with Warehouse(settings).connect() as conn:
            run_id = journal.facts()["run_id"]
            dead_letters.record(
                conn, run_id, (dead_letter(each, partition, unknown_type=_UNKNOWN) for each in journal.failures())
            )
            for name in (*steps, _UNKNOWN):
                dead_letters.resolve_not_repeated(conn, run_id, name, "deliver", [partition])
    except (DatabaseUnavailable, psycopg.Error):
        errors.print(f"The database is not there: the failures are in {path} only, not in ops.dead_letters.")
    return count


def _say(what: str, value: str) -> None:
    console.print(f"{what:<12} {value}", markup=False, soft_wrap=True)


def _show(steps: Steps) -> None:
    rows = [
        {"step": n, "type": name, "files": len(files), "resources": sum(files.values())}
        for n, (name, files) in enumerate(steps.items(), 1)
    ]
    print_table("In this order", rows, ("step", "type", "files", "resources"))


def _summarize(
    journal: Journal, client: FhirClient, source: Path, failures: Path | None, seconds: float, *, json: bool
) -> None:
    totals = journal.totals()
    rows = [{"type": name, **totals[name]} for name in bundles.sort_types(totals)]
    whole = {column: sum(of_type[column] for of_type in totals.values()) for column in _COLUMNS[1:]}
    if json:
        print_json(
            {
                "source": str(source),
                "destination": client.base_url,
                "success": failures is None,
                "seconds": round(seconds, 3),
                "totals": whole,
                "types": rows,
                "failures": str(failures) if failures else None,
            }
        )
        return
    print_table("Uploaded", [*rows, {"type": "all", **whole}], _COLUMNS)
    rate = sum(whole.values()) / seconds
    _say("Duration", f"{seconds:.1f} s, {rate:,.0f} resources/s")
    if failures:
        _say("Failures", f"{whole['failed']:,} in {failures} and in `fhir-assets dead-letters list --stage deliver`")

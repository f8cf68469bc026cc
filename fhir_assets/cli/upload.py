"""`fhir-assets upload`: send NDJSON files of a folder or a bucket to a FHIR server."""

import hashlib
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Annotated

import orjson
import psycopg
import typer

from fhir_assets import logs
from fhir_assets.atomic_files import replace_content, replace_file
from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.cli.upload_progress import Progress
from fhir_assets.delivery.tables import build_dead_letter
from fhir_assets.delivery.upload.download import download_files
from fhir_assets.delivery.upload.files import Folder, Unusable, rename_location
from fhir_assets.delivery.upload.journal import Journal
from fhir_assets.delivery.upload.uploader import NullListener, Uploader
from fhir_assets.deployment.encryption import build_cipher
from fhir_assets.deployment.store import build_blobs
from fhir_assets.deployment.targets import build_upload_client
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, FhirAssetsError
from fhir_assets.fhir import bundles
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.foreign_errors import choose_error
from fhir_assets.settings import Settings, load_settings
from fhir_assets.storage.blobs import ListedFile
from fhir_assets.warehouse.ops import dead_letter_resolution, dead_letters
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution

Steps = dict[str, dict[str, int]]
"""The number of resources of each file, by resource type, in the order of the upload."""

_UNKNOWN = "unknown"
_COLUMNS = ("type", "created", "updated", "unchanged", "failed")


def upload(
    source: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            help="A folder of NDJSON files (.gz too), one file, or s3://bucket/prefix; default: UPLOAD_DIR",
        ),
    ] = "",
    url: Annotated[str | None, typer.Option(help="Base URL of the FHIR server; default: FHIR_BASE_URL")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", "-s", min=1, max=10_000, help="Number of resources in a Bundle; default: BATCH_SIZE (100)"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Number of Bundles that are sent at the same time")] = 4,
    transaction: Annotated[bool, typer.Option("--transaction", help="Send transactions instead of batches")] = False,
    skip_unchanged: Annotated[
        bool,
        typer.Option(
            "--skip-unchanged", help="Do not send resources that the server already has with the same content"
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished upload of this input to this server")
    ] = False,
    failures: Annotated[Path, typer.Option(help="File for the resources that the server refused")] = Path(
        "upload_failures.ndjson"
    ),
    list_only: Annotated[
        bool, typer.Option("--list", help="Print the files and how many resources of each type they have; send nothing")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON")] = False,
) -> None:
    """Send every resource of a folder with its own id. Referenced types are sent first.

    The exit code is 0 only if the server accepted all resources. Refused resources are in the failure file and in the
    dead letters.
    """
    overrides = {"fhir_source": "search", **({"fhir_base_url": url} if url else {})}
    settings = load_settings(**overrides)
    logs.configure("upload", settings.log_level)
    location = source or settings.upload_dir
    if not location:
        raise ConfigurationError("there is nothing to upload: pass --input, or set UPLOAD_DIR")
    size, stop, started = batch_size or settings.batch_size, Event(), time.perf_counter()
    if list_only:
        with TemporaryDirectory() as temporary:
            folder = _open_folder(settings, location, Path(temporary), quiet=json)
            _print_files(folder, _find_labels(settings, folder.names), json=json)
        return
    with (
        build_upload_client(settings, workers=workers, stop=stop) as client,
        _journal(settings, client, location) as journal,
        ExitStack() as cleanup,
    ):
        downloads = settings.home / "uploads" / f"files-{_digest(location, client)}"
        # Also after a failure: the copies are not encrypted. A resumed upload downloads them again.
        cleanup.callback(shutil.rmtree, downloads, ignore_errors=True)
        folder = _open_folder(settings, location, downloads, quiet=json)
        journal.hide_names(folder.names)
        print_fact = (lambda *_: None) if json else _print_fact
        print_fact("Source", f"{location}, {len(folder.names)} files")
        print_fact("Destination", client.base_url)
        kind = "transactions" if transaction else "batches"
        print_fact(
            "Sent as", f"{kind} of {size}, {workers} at once{', without unchanged resources' if skip_unchanged else ''}"
        )
        version = client.capabilities().fhir_version or "version unknown"
        print_fact("Server test", f"passed: FHIR {version} after {time.perf_counter() - started:.2f} s")
        shape = {"size": str(size), "workers": str(workers)}
        steps = _plan(folder, journal, shape, resume=resume)
        if not json:
            _print_plan(steps)
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
        failed = _record_failures(settings, journal, steps, failures)
        _print_summary(
            journal, client, location, failures if failed else None, time.perf_counter() - started, json=json
        )
    if failed:
        raise typer.Exit(1)
    if journal.path:
        journal.path.unlink()


def _is_bucket(location: str) -> bool:
    return location.startswith("s3://")


def _digest(location: str, client: FhirClient) -> str:
    """Return a name for the upload of this input to this server."""
    name = location if _is_bucket(location) else Path(location).expanduser().resolve()
    return hashlib.sha256(f"{name}\0{client.base_url}".encode()).hexdigest()[:16]


def _open_folder(settings: Settings, location: str, downloads: Path, *, quiet: bool) -> Folder:
    """Return the files at ``location``. Those of a bucket are downloaded to ``downloads`` first.

    Raises ConfigurationError or StoreError.
    """
    if not _is_bucket(location):
        return Folder(Path(location))

    def report(file: ListedFile) -> None:
        if not quiet:
            _print_fact("Download", f"{file.name}, {file.bytes:,} bytes")

    download_files(build_blobs(settings, location), downloads, report)
    return Folder(downloads)


def _find_labels(settings: Settings, names: Sequence[str]) -> dict[str, str]:
    """Return what dead letters call the files; empty without keys, and without a database that has their secret."""
    if not settings.encrypts or not _has_database(settings):
        return {}
    try:
        warehouse = Warehouse(settings)
        return {name: _label_file(warehouse, name) for name in names}
    except DatabaseUnavailable:
        return {}


def _label_file(warehouse: Warehouse, name: str) -> str:
    """Return what dead letters call a file. With keys it is not its name, which may be that of a patient."""
    cipher = warehouse.cipher()
    return f"file-{cipher.hash_file_name(warehouse.source, 'upload', name)}" if cipher.encrypts else name


def _print_files(folder: Folder, labels: Mapping[str, str], *, json: bool) -> None:
    """Print the number of resources of each type in each file, in the order in which the types are sent."""
    unusable: list[Unusable] = []
    counts = {name: folder.count(name, unusable.append) for name in folder.names}
    order = bundles.sort_types({name for types in counts.values() for name in types})
    rows = [
        {"type": name, "file": file, "resources": types[name], **({"label": labels[file]} if labels else {})}
        for name in order
        for file, types in counts.items()
        if name in types
    ]
    lost = [{"location": item.location, "message": item.message} for item in unusable]
    if json:
        print_json({"files": rows, "unusable": lost})
        return
    print_table(
        "Resources to upload, in this order", rows, ("type", "file", "resources", *(["label"] if labels else []))
    )
    if lost:
        print_table("Lines that cannot be sent", lost, ("location", "message"))


def _journal(settings: Settings, client: FhirClient, location: str) -> Journal:
    """Open the journal of the upload of this input to this server."""
    return Journal(settings.home / "uploads" / f"{_digest(location, client)}.sqlite", cipher=build_cipher(settings))


def _plan(folder: Folder, journal: Journal, shape: Mapping[str, str], *, resume: bool) -> Steps:
    """Count the resources to send and return them in order, or the steps of the upload that is resumed."""
    state, run_id = folder.state(), str(uuid.uuid4())
    facts = journal.read_facts()
    if resume and facts:
        if facts["state"] != state:
            raise ConfigurationError("the files have changed since that upload started: start again without --resume")
        if any(facts[name] != value for name, value in shape.items()):
            raise ConfigurationError(
                f"that upload was started with --batch-size {facts['size']} --workers {facts['workers']}: use the same "
                "options"
            )
        journal.resume({"run_id": run_id})
        stored_steps: Steps = orjson.loads(facts["steps"])
        return {name: {journal.show(file): n for file, n in files.items()} for name, files in stored_steps.items()}
    if resume:
        errors.print("There is no unfinished upload of this input to this server: a new upload starts.")
    elif facts:
        errors.print(
            "An earlier upload of this input is not finished; a new upload starts. To continue it, use --resume."
        )
    steps: Steps = {}

    def count_resources(refuse: Callable[[Unusable], None]) -> dict[str, str]:
        counts = {name: folder.count(name, refuse) for name in folder.names}
        for name in bundles.sort_types({name for types in counts.values() for name in types}):
            steps[name] = {file: types[name] for file, types in counts.items() if name in types}
        hidden = {name: {journal.hide(file): n for file, n in files.items()} for name, files in steps.items()}
        return {"state": state, **shape, "run_id": run_id, "steps": orjson.dumps(hidden).decode()}

    journal.begin(count_resources)
    return steps


@contextmanager
def _interruptible(stop: Event) -> Iterator[None]:
    """Print that an interrupted or failed upload can be resumed. SIGTERM interrupts it like Ctrl-C."""

    def interrupt(*_: object) -> None:
        stop.set()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (FhirAssetsError, KeyboardInterrupt):
        errors.print("The upload is not finished. Run the same command with --resume to continue it.")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _record_failures(settings: Settings, journal: Journal, steps: Steps, path: Path) -> int:
    """Write the dead letters and the failure file, and return the number of failures.

    Dead letters of earlier uploads whose resources are delivered now are resolved. Raises OutOfResources or
    ConfigurationError, after the dead letters are written, if the file cannot be written.
    """
    count = journal.failed_count()
    recorded = _record_dead_letters(settings, journal, steps, count)
    try:
        _write_failures(journal, path, count)
    except OSError as error:
        raise choose_error(error)(
            f"cannot write {path}: {error.strerror}; free space, or run the same command with --resume and another "
            f"--failures. The failures are in {'ops.dead_letters' if recorded else 'the journal of the upload'}"
        ) from None
    if not recorded:
        errors.print(f"The database is not available: the failures are in {path} only, not in ops.dead_letters.")
    return count


def _write_failures(journal: Journal, path: Path, count: int) -> None:
    """Replace the failure file. Without failures, remove the file of an earlier upload, but not a link or a device."""
    if count:
        with replace_file(path) as file:
            file.writelines(failure.line for failure in journal.failures())
    elif path.is_symlink() and path.is_file():
        replace_content(path, b"")
    elif path.is_file():
        path.unlink()


def _record_dead_letters(settings: Settings, journal: Journal, steps: Steps, count: int) -> bool:
    """Write the dead letters and resolve earlier ones. Return False if the database is not available."""
    if count == 0 and not _has_database(settings):
        return True
    partition = f"upload:{journal.path.stem if journal.path else ''}"
    try:
        warehouse = Warehouse(settings)
        recorded_before = dead_letter_resolution.next_record_number(warehouse.connect)
        with warehouse.connect() as conn:
            run_id = journal.read_facts()["run_id"]
            dead_letters.record(
                conn,
                run_id,
                (
                    build_dead_letter(
                        replace(failure, location=rename_location(failure.location, partial(_label_file, warehouse))),
                        partition,
                        unknown_type=_UNKNOWN,
                    )
                    for failure in journal.failures()
                ),
            )
            for name in (*steps, _UNKNOWN):
                dead_letter_resolution.resolve_dead_letters(
                    conn, DeadLetterResolution(run_id, name, "deliver", [partition], recorded_before)
                )
    except (DatabaseUnavailable, psycopg.Error):
        return False
    return True


def _has_database(settings: Settings) -> bool:
    return settings.db_url is not None or (settings.home / "postgres").exists()


def _print_fact(name: str, value: str) -> None:
    console.print(f"{name:<12} {value}", markup=False, soft_wrap=True)


def _print_plan(steps: Steps) -> None:
    rows = [
        {"step": number, "type": name, "files": len(files), "resources": sum(files.values())}
        for number, (name, files) in enumerate(steps.items(), 1)
    ]
    print_table("Resources to upload, in this order", rows, ("step", "type", "files", "resources"))


def _print_summary(
    journal: Journal, client: FhirClient, location: str, failures: Path | None, seconds: float, *, json: bool
) -> None:
    totals = journal.count_resources()
    rows = [{"type": name, **totals[name]} for name in bundles.sort_types(totals)]
    total = {column: sum(counts[column] for counts in totals.values()) for column in _COLUMNS[1:]}
    if json:
        print_json(
            {
                "source": location,
                "destination": client.base_url,
                "success": failures is None,
                "seconds": round(seconds, 3),
                "totals": total,
                "types": rows,
                "failures": str(failures) if failures else None,
            }
        )
        return
    print_table("Uploaded", [*rows, {"type": "all", **total}], _COLUMNS)
    rate = sum(total.values()) / seconds
    _print_fact("Duration", f"{seconds:.1f} s, {rate:,.0f} resources/s")
    if failures:
        _print_fact(
            "Failures", f"{total['failed']:,} in {failures} and in `fhir-assets dead-letters list --stage deliver`"
        )

"""`fhir-assets keys`: create, inspect and rotate the keys that encrypt patient data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic
from typing import Annotated

import typer
from rich import progress

from fhir_assets.accounts import find_account
from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.deployment.encryption import build_cipher
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.pipeline.reencrypt.key_usage import KeyUsage, count_key_usage
from fhir_assets.pipeline.reencrypt.step import ReencryptResult, ReencryptStep
from fhir_assets.privacy.keys import new_key
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import key_rotations
from fhir_assets.warehouse.ops.key_rotations import Rotation

app = typer.Typer(help="Create, inspect and rotate the keys that encrypt patient data.", no_args_is_help=True)

_UNENCRYPTED = "in the clear"
_LINE_INTERVAL_SECONDS = 10.0


@app.command()
def new() -> None:
    """Create a key. Put it in front of the other keys in PHI_ENCRYPTION_KEYS, and keep a safe copy of it."""
    typer.echo(new_key())


@app.command()
def status(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """List the keys by id, with the amount of data that each encrypts, and whether it is still needed."""
    settings = load_settings()
    with Warehouse(settings).connect() as conn:
        usage = count_key_usage(conn, build_store(settings), build_views(settings).views)
        rotation = key_rotations.get_latest(conn)
    if json:
        facts = None
        if rotation:
            facts = {**asdict(rotation), "rate": rotation.rate, "seconds_left": rotation.seconds_left}
            facts["doing"] = facts.pop("current_step")
        print_json({"keys": _rows(settings, usage), "unbound": usage.count_unbound(), "rotation": facts})
        return
    rows = _rows(settings, usage)
    locations = [location for location, counts in usage.counts.items() if counts]
    print_table("Keys", rows, ("key", "set", "newest", *locations))
    for line in _advice(settings, usage):
        console.print(line, markup=False, soft_wrap=True)
    if rotation:
        console.print(f"Last rotation: {_describe(rotation)}", markup=False, soft_wrap=True)


@app.command()
def rotate(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Encrypt all patient data with the newest key, including data stored in the clear. Loads can run at the same time.

    Before the rotation, restart all processes with the new PHI_ENCRYPTION_KEYS: a process with the old setting encrypts
    with an older key. A stopped rotation continues when the command is run again. The exit code is 1 if some data could
    not be encrypted with the newest key.
    """
    settings = load_settings()
    with _progress(quiet=json) as show_progress:
        result = ReencryptStep(
            Warehouse(settings).connect,
            build_store(settings),
            build_views(settings).views,
            actor=f"cli:{find_account()}",
            on_progress=show_progress,
        ).run()
    if json:
        print_json(
            {
                "sealed": result.encrypted,
                "from_clear": result.from_clear,
                "refused": result.refused,
                "busy": +result.busy,
                "left_over": result.left_over,
                "keys": _rows(settings, result.usage),
                "unbound": result.usage.count_unbound(),
            }
        )
    else:
        _print_result(settings, result)
    if result.left_over:
        raise typer.Exit(1)


def _rows(settings: Settings, usage: KeyUsage) -> list[dict[str, object]]:
    """Return a row for each key that is set or used, newest first."""
    ids: list[str | None] = [key.id for key in build_cipher(settings).keys]
    return [
        {
            "key": key or _UNENCRYPTED,
            "set": key is None or key in ids,
            "newest": key is not None and key in ids[:1],
            "needed": key is not None and (key in ids[:1] or usage.is_used(key)),
            **usage.count_by_location(key),
        }
        for key in dict.fromkeys([*ids, *usage.keys])
    ]


def _advice(settings: Settings, usage: KeyUsage) -> Iterator[str]:
    """Yield the recommended next step for each key."""
    if not settings.encrypts:
        yield "Patient data is stored in the clear: put a key of `fhir-assets keys new` into PHI_ENCRYPTION_KEYS."
        return
    newest, *older = [key.id for key in build_cipher(settings).keys]
    for key in older:
        if usage.is_used(key):
            yield f"Key {key} is still needed: `fhir-assets keys rotate` encrypts its data with the newest key."
        else:
            yield f"Key {key} is no longer needed: remove it from PHI_ENCRYPTION_KEYS."
    for missing in [key for key in usage.keys if key not in (newest, *older, None)]:
        yield (
            f"Key {missing} is missing: it encrypts {_format_counts(usage.count_by_location(missing))}. Add it to "
            "the end of PHI_ENCRYPTION_KEYS, then run `fhir-assets keys rotate`. If it is lost, load the windows "
            "again with a full refresh."
        )
    if any((unbound := usage.count_unbound()).values()):
        yield (
            f"Not bound to their rows and files: {_format_counts(unbound)}. If two of them were exchanged, it would "
            "not be noticed. `fhir-assets keys rotate` binds those whose keys are set."
        )
    clear = usage.count_by_location(None)
    if not settings.phi_encrypt_store:
        del clear["parts"]
    if any(clear.values()):
        yield f"In the clear: {_format_counts(clear)}. `fhir-assets keys rotate` encrypts them."


def _print_result(settings: Settings, result: ReencryptResult) -> None:
    done = _format_counts(result.encrypted) or "nothing; all data was already encrypted with it"
    console.print(f"Encrypted with key {build_cipher(settings).keys[0].id}: {done}.", markup=False, soft_wrap=True)
    if any(result.from_clear.values()):
        console.print(f"Previously stored in the clear: {_format_counts(result.from_clear)}.", markup=False)
    for reason, count in result.refused.most_common():
        errors.print(f"{count:,} not encrypted with the newest key: {reason}", markup=False, soft_wrap=True)
    if any(result.busy.values()):
        errors.print(
            f"Locked by running loads: {_format_counts(result.busy)}. Rotate again when the loads have ended.",
            markup=False,
        )
    for line in _advice(settings, result.usage):
        console.print(line, markup=False, soft_wrap=True)


def _format_counts(counts: dict[str, int]) -> str:
    """Return counts by location as text."""
    return ", ".join(f"{count:,} {location.replace('_', ' ')}" for location, count in counts.items() if count)


def _describe(rotation: Rotation) -> str:
    share = rotation.done / rotation.total if rotation.total else 1.0
    done = f"to key {rotation.key_id}, {rotation.done:,} of {rotation.total:,} ({share:.0%})"
    if rotation.ended_at:
        left_over = f", {rotation.left_over:,} not encrypted with it" if rotation.left_over else ""
        return f"{done}, ended {rotation.ended_at:%Y-%m-%d %H:%M:%S} UTC{left_over}"
    if not rotation.at_work:
        return f"{done}, stopped {rotation.updated_at:%Y-%m-%d %H:%M:%S} UTC: `fhir-assets keys rotate` continues it"
    left = "" if rotation.seconds_left is None else f", about {rotation.seconds_left:,.0f} s left"
    return f"{done}, {rotation.current_step}, {rotation.rate:,.0f}/s{left}"


class _ProgressDisplay:
    """Shows the progress of a rotation: a bar on a terminal, otherwise a line every few seconds."""

    def __init__(self, bars: progress.Progress, *, quiet: bool) -> None:
        self._bars = bars
        self._quiet = quiet
        self._task = bars.add_task("", total=None)
        self._next_line_at = monotonic() + _LINE_INTERVAL_SECONDS

    def __call__(self, rotation: Rotation) -> None:
        self._bars.update(self._task, description=rotation.current_step, completed=rotation.done, total=rotation.total)
        if not self._quiet and self._bars.disable and monotonic() >= self._next_line_at:
            self._next_line_at = monotonic() + _LINE_INTERVAL_SECONDS
            console.print(_describe(rotation), markup=False, soft_wrap=True)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[_ProgressDisplay]:
    bars = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TaskProgressColumn(show_speed=True),
        progress.TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    with bars:
        yield _ProgressDisplay(bars, quiet=quiet)

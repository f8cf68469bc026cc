"""`fhir-assets keys`: the keys that seal patient data."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic
from typing import Annotated

import typer
from rich import progress

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

app = typer.Typer(help="The keys that seal patient data.", no_args_is_help=True)

_CLEAR = "in the clear"
_EVERY_SECONDS = 10.0


@app.command()
def new() -> None:
    """Make a key. It belongs into PHI_ENCRYPTION_KEYS, before those that are there, and where it cannot get lost."""
    typer.echo(new_key())


@app.command()
def status(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """The keys by their ids, what each one seals in the tables and the store, and which are no longer needed."""
    settings = load_settings()
    with Warehouse(settings).connect() as conn:
        found = count_key_usage(conn, build_store(settings), build_views(settings).views)
        rotation = key_rotations.get_latest(conn)
    if json:
        facts = None
        if rotation:
            facts = {**asdict(rotation), "rate": rotation.rate, "seconds_left": rotation.seconds_left}
        print_json({"keys": _rows(settings, found), "rotation": facts})
        return
    rows = _rows(settings, found)
    places = [place for place, counts in found.counts.items() if counts]
    print_table("Keys", rows, ("key", "set", "newest", *places))
    for line in _advice(settings, found):
        console.print(line, markup=False, soft_wrap=True)
    if rotation:
        console.print(f"Last rotation: {_said(rotation)}", markup=False, soft_wrap=True)


@app.command()
def rotate(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Seal everything with the newest key, also what was stored in the clear, while loads go on.

    Stopped, however, it goes on where it was when it is started again. Start whatever runs with the new keys first:
    what was started before seals with the older ones. Exit code 1 if something could not be sealed anew.
    """
    settings = load_settings()
    with _watched(quiet=json) as watch:
        rotated = ReencryptStep(
            Warehouse(settings).connect,
            build_store(settings),
            build_views(settings).views,
            actor=f"cli:{getpass.getuser()}",
            on_progress=watch,
        ).run()
    if json:
        print_json(
            {
                "sealed": rotated.encrypted,
                "from_clear": rotated.from_clear,
                "refused": rotated.refused,
                "busy": +rotated.busy,
                "left_over": rotated.left_over,
                "keys": _rows(settings, rotated.usage),
            }
        )
    else:
        _tell(settings, rotated)
    if rotated.left_over:
        raise typer.Exit(1)


def _rows(settings: Settings, found: KeyUsage) -> list[dict[str, object]]:
    """Every key that is set or needed, the newest first."""
    ids: list[str | None] = [key.id for key in build_cipher(settings).keys]
    return [
        {
            "key": key or _CLEAR,
            "set": key is None or key in ids,
            "newest": key is not None and key == build_cipher(settings).key_id,
            "needed": key is not None and (key == build_cipher(settings).key_id or found.is_used(key)),
            **found.count_by_location(key),
        }
        for key in dict.fromkeys([*ids, *found.keys])
    ]


def _advice(settings: Settings, found: KeyUsage) -> Iterator[str]:
    """What to do about each key."""
    if not settings.encrypts:
        yield "Patient data is stored in the clear: `fhir-assets keys new`, then set PHI_ENCRYPTION_KEYS."
        return
    newest, *older = [key.id for key in build_cipher(settings).keys]
    for key in older:
        if found.is_used(key):
            yield f"Key {key} is still needed: `fhir-assets keys rotate` makes it dispensable."
        else:
            yield f"Key {key} is no longer needed: take it out of PHI_ENCRYPTION_KEYS."
    for missing in [key for key in found.keys if key not in (newest, *older, None)]:
        yield (
            f"Key {missing} is missing: it seals {_counted(found.count_by_location(missing))}. Add it to "
            "PHI_ENCRYPTION_KEYS as the last one, then `fhir-assets keys rotate`; if it is lost, load the windows "
            "again with a full refresh."
        )
    clear = found.count_by_location(None)
    if not settings.phi_encrypt_store:
        del clear["parts"]
    if any(clear.values()):
        yield f"In the clear: {_counted(clear)}. `fhir-assets keys rotate` seals them."


def _tell(settings: Settings, rotated: ReencryptResult) -> None:
    done = _counted(rotated.encrypted) or "nothing was left to do"
    console.print(f"Sealed with key {build_cipher(settings).key_id}: {done}.", markup=False, soft_wrap=True)
    if any(rotated.from_clear.values()):
        console.print(f"Of these were in the clear before: {_counted(rotated.from_clear)}.", markup=False)
    for why, count in rotated.refused.most_common():
        errors.print(f"Left as they were, {count:,}: {why}", markup=False, soft_wrap=True)
    if any(rotated.busy.values()):
        errors.print(f"Held by loads: {_counted(rotated.busy)}. Run it again when they are through.", markup=False)
    for line in _advice(settings, rotated.usage):
        console.print(line, markup=False, soft_wrap=True)


def _counted(counts: dict[str, int]) -> str:
    """Counts by place in words."""
    return ", ".join(f"{count:,} {place.replace('_', ' ')}" for place, count in counts.items() if count)


def _said(rotation: Rotation) -> str:
    share = rotation.done / rotation.total if rotation.total else 1.0
    done = f"to key {rotation.key_id}, {rotation.done:,} of {rotation.total:,} ({share:.0%})"
    if rotation.ended_at:
        rest = f", {rotation.left_over:,} left over" if rotation.left_over else ""
        return f"{done}, ended {rotation.ended_at:%Y-%m-%d %H:%M:%S} UTC{rest}"
    if not rotation.at_work:
        return f"{done}, stopped {rotation.updated_at:%Y-%m-%d %H:%M:%S} UTC: `fhir-assets keys rotate` goes on"
    left = "" if rotation.seconds_left is None else f", about {rotation.seconds_left:,.0f} s left"
    return f"{done}, {rotation.current_step}, {rotation.rate:,.0f}/s{left}"


class _Watch:
    """Shows a rotation: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, bars: progress.Progress, *, quiet: bool) -> None:
        self._bars = bars
        self._quiet = quiet
        self._task = bars.add_task("", total=None)
        self._next = monotonic() + _EVERY_SECONDS

    def __call__(self, rotation: Rotation) -> None:
        self._bars.update(self._task, description=rotation.current_step, completed=rotation.done, total=rotation.total)
        if not self._quiet and self._bars.disable and monotonic() >= self._next:
            self._next = monotonic() + _EVERY_SECONDS
            console.print(_said(rotation), markup=False, soft_wrap=True)


@contextmanager
def _watched(*, quiet: bool) -> Iterator[_Watch]:
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
        yield _Watch(bars, quiet=quiet)

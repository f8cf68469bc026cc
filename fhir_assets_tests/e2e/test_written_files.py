"""Every command that writes files: killed, with a full disk, with a bad line, and with files of an earlier run.

Afterwards the earlier files are there unchanged, or the new ones are complete. No unfinished file looks like a result.
"""

import csv
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from pyarrow import parquet

from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deploy, Deployment, deploy
from fhir_assets_tests.support.interrupted_commands import (
    Commands,
    Ended,
    Mishap,
    commands,
    content_of,
    unfinished_files,
)
from fhir_assets_tests.support.scripted_server import ScriptedServer
from fhir_assets_tests.support.uploads import BatchResponder

__all__ = ["commands", "deploy"]

VIEW = {
    "resource": "Patient",
    "name": "people",
    "select": [{"column": [{"name": "id", "path": "id"}, {"name": "gender", "path": "gender"}]}],
}
IDS = [f"p{n}" for n in range(75)]
BAD_LINE = '{"resourceType": "Patient", "id": "Zaphod-4711'
BAD_LINE_NUMBER = 41

FILE_COMMANDS = {
    "view run --format csv": ("view", "run", "view.json", "data.ndjson", "--format", "csv", "-o", "out/F"),
    "view run --format ndjson": ("view", "run", "view.json", "data.ndjson", "--format", "ndjson", "-o", "out/F"),
    "view run --format parquet": ("view", "run", "view.json", "data.ndjson", "--format", "parquet", "-o", "out/F"),
    "view run --format table": ("view", "run", "view.json", "data.ndjson", "-o", "out/F"),
    "validate": ("validate", "data.ndjson", "--outcomes", "out/F"),
    "upload": ("upload", "--input", "data.ndjson", "--failures", "out/F"),
    "generate": ("generate", "-o", "out", "--patients", "2", "--seed", "2"),
}
"""Commands that write files without a database. All but ``generate`` read a file with a bad line."""

MISHAPS: tuple[Mishap, ...] = ("killed", "full")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a view, a file of 75 patients and a bad line among them, and an output of an earlier time."""
    lines = [json.dumps({"resourceType": "Patient", "id": name, "gender": "malee"}) for name in IDS]
    lines.insert(BAD_LINE_NUMBER - 1, BAD_LINE)
    (tmp_path / "data.ndjson").write_text("\n".join(lines))
    (tmp_path / "view.json").write_text(json.dumps(VIEW))
    (tmp_path / "out").mkdir()
    for name in ("F", "Patient.ndjson.gz", ".defects.json"):
        (tmp_path / "out" / name).write_bytes(b"before")
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that refuses every resource."""
    with ScriptedServer(BatchResponder(lambda identity, attempt: 422)) as server:
        yield server.url


Run = Callable[..., Ended]


@pytest.fixture
def run(commands: Commands, folder: Path, server: str) -> Run:
    """Run one of FILE_COMMANDS. ``output`` takes the place of the file that it writes."""

    def run_command(command: str, mishap: Mishap = "none", output: str | None = None) -> Ended:
        environment = {"FHIR_BASE_URL": server, "DB_URL": "postgresql://nobody@127.0.0.1:1/none"}
        arguments = [output if output and word == "out/F" else word for word in FILE_COMMANDS[command]]
        return commands(*arguments, folder=folder, mishap=mishap, environment=environment)

    return run_command


@pytest.mark.parametrize("mishap", MISHAPS)
@pytest.mark.parametrize("command", FILE_COMMANDS)
def test_a_command_that_does_not_end_leaves_what_was_there(
    command: str, mishap: Mishap, folder: Path, run: Run
) -> None:
    before = content_of(folder / "out")
    done = run(command, mishap)
    assert content_of(folder / "out") == before
    if mishap == "killed":
        assert done.code == -signal.SIGKILL
        assert all(path.name.startswith(".") for path in unfinished_files(folder / "out"))
        assert unfinished_files(folder / "out")
    else:
        assert done.code in (75, 78)
        assert "This is a defect" not in done.stderr
        assert "pace" in done.stderr  # the next step: free space
        assert unfinished_files(folder / "out") == []


@pytest.mark.parametrize("command", [command for command in FILE_COMMANDS if command != "generate"])
def test_a_bad_line_costs_itself_and_the_exit_code_says_so(command: str, folder: Path, run: Run) -> None:
    done = run(command)
    assert done.code == 1
    assert "Zaphod" not in done.stdout + done.stderr
    content = (folder / "out/F").read_text(errors="replace")
    if command == "view run --format parquet":
        content = "\n".join(map(json.dumps, parquet.read_table(folder / "out/F").to_pylist()))
    lines = content.splitlines()
    assert sum(any(word in line for word in ("malee", "data.ndjson", "gender")) for line in lines) >= len(IDS)
    if command.startswith("view run"):
        assert all(f"{name}" in content for name in IDS)
        assert f"data.ndjson:{BAD_LINE_NUMBER}" in done.stderr
        assert "1 lines or resources were skipped" in done.stderr
    else:
        assert f"data.ndjson:{BAD_LINE_NUMBER}" in content
    assert unfinished_files(folder / "out") == []


@pytest.mark.parametrize("command", [command for command in FILE_COMMANDS if command != "generate"])
def test_a_device_that_is_full_is_an_error_of_one_sentence(command: str, folder: Path, run: Run) -> None:
    before = content_of(folder / "out")
    done = run(command, output="/dev/full")
    assert done.code == 75
    assert "cannot write /dev/full: No space left on device" in done.stderr
    assert Path("/dev/full").is_char_device()
    assert content_of(folder / "out") == before


@pytest.mark.parametrize(
    "words", [("view", "run", "view.json", "data.ndjson"), ("--help",), ("view", "list", "--json")]
)
def test_a_full_disk_behind_stdout_is_an_error_of_one_sentence(
    words: tuple[str, ...], folder: Path, commands: Commands
) -> None:
    done = commands(*words, folder=folder, stdout=Path("/dev/full"))
    assert done.code == 75
    assert "No space left on device" in done.stderr
    assert "defect" not in done.stderr
    assert "Traceback" not in done.stderr


def test_stdout_gets_what_a_file_would_get(folder: Path, run: Run) -> None:
    run("view run --format csv")
    expected = (folder / "out/F").read_text()
    for output in ("-", "/dev/stdout", "/dev/fd/1"):
        assert run("view run --format csv", output=output).stdout.splitlines() == expected.splitlines()
    assert not (folder / "-").exists()


def test_a_view_may_replace_the_file_that_it_reads(folder: Path, run: Run) -> None:
    assert run("view run --format ndjson", output="data.ndjson").code == 1
    assert [json.loads(line)["id"] for line in (folder / "data.ndjson").open()] == IDS


def test_a_killed_population_is_followed_by_a_whole_one(folder: Path, run: Run) -> None:
    run("generate", "killed")
    assert run("generate").code == 0
    assert json.loads((folder / "out/.defects.json").read_bytes()) == []
    assert len(list((folder / "out").glob("*.ndjson.gz"))) == 30


@pytest.fixture
def loaded(deploy: Deploy, folder: Path) -> Deployment:
    """A deployment that has loaded 75 patients from a file with a bad line."""
    (folder / "data.ndjson").write_text((folder / "data.ndjson").read_text().replace("malee", "male"))
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(folder / "data.ndjson"),
        fhir_resource_types="Patient",
        fhir_partition="monthly",
    )
    assert all(outcome.success for outcome in deployment.ingest())
    return deployment


def test_an_export_that_does_not_end_leaves_the_earlier_export(
    loaded: Deployment, folder: Path, commands: Commands
) -> None:
    environment = {name: value for name, value in loaded.environment().items() if name != "FHIR_LAST_UPDATED_GTE"}

    def export(mishap: Mishap, form: str, *words: str) -> Ended:
        arguments = ("export", "Patient", "-o", "exported", "--format", form, *words)
        return commands(*arguments, folder=folder, mishap=mishap, environment=environment)

    done = export("none", "csv", "--raw", "--valid", "--normalized", "--dead-letters")
    assert done.code == 0, done.stderr
    before = content_of(folder / "exported")
    rows = list(csv.DictReader(before["patient.csv"].decode().splitlines()))
    assert sorted(row["id"] for row in rows) == sorted(IDS)
    assert len(before["Patient.valid.ndjson"].splitlines()) == len(IDS)
    assert json.loads(before["Patient.deadletters.ndjson"])["resource"] == BAD_LINE
    for form in ("csv", "ndjson", "parquet"):
        for mishap in MISHAPS:
            done = export(mishap, form, "--raw", "--normalized")
            assert done.code in ((-signal.SIGKILL,) if mishap == "killed" else (75, 78))
            assert content_of(folder / "exported") == before
            left = unfinished_files(folder / "exported")
            assert all(path.parent == folder / "exported" / ".spool" for path in left)
            assert (mishap == "killed") == bool(left)
            for path in left:
                path.unlink()


def add_patients(deployment: Deployment, folder: Path, *names: str) -> None:
    """Load further patients from the file of the source."""
    lines = [json.dumps({"resourceType": "Patient", "id": name, "gender": "female"}) for name in names]
    with (folder / "data.ndjson").open("a") as file:
        file.write("\n" + "\n".join(lines))
    assert all(outcome.success for outcome in deployment.ingest())


@dataclass(frozen=True)
class Writer:
    """A command that writes several files from the tables, and how a test reads them.

    ``folder`` is where it writes; ``read`` returns the ids of the patients in a file. It is killed at every ``step``-th
    flush.
    """

    words: tuple[str, ...]
    folder: str
    read: Callable[[bytes], list[str]]
    step: int = 1


def read_csv(content: bytes) -> list[str]:
    return sorted(row["id"] for row in csv.DictReader(content.decode().splitlines()))


def read_ndjson(content: bytes) -> list[str]:
    return sorted(json.loads(line)["id"] for line in content.splitlines())


def read_parquet(content: bytes) -> list[str]:
    return sorted(row["id"] for row in parquet.read_table(BytesIO(content)).to_pylist())


EXPORT = ("export", "Patient", "-o", "exported", "--normalized")
WRITERS = {
    "export --format csv": Writer((*EXPORT, "--format", "csv"), "exported", read_csv, 7),
    "export --format ndjson": Writer((*EXPORT, "--format", "ndjson"), "exported", read_ndjson, 7),
    "export --format parquet": Writer((*EXPORT, "--format", "parquet"), "exported", read_parquet, 7),
    "export --valid": Writer(("export", "Patient", "-o", "exported", "--valid"), "exported", read_ndjson),
    "lake": Writer(("lake", "--types", "Patient"), "lake", read_parquet),
}
MOST_FLUSHES = 60
"""More flushes than any of the commands makes."""


def list_environment(deployment: Deployment, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in deployment.environment().items() if name != "FHIR_LAST_UPDATED_GTE"}
    (folder / "views").mkdir(exist_ok=True)
    return {**kept, "FHIR_LAKE_URL": str(folder / "lake"), "FHIR_VIEWS": str(folder / "views")}


def is_of_patients(name: str) -> bool:
    """Return whether a file has the rows of the table of Patients, or the resources themselves."""
    return name.startswith(("patient.", "patient/", "Patient.valid"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_command_that_writes_several_files_is_killed_at_its_flushes(
    name: str, loaded: Deployment, folder: Path, commands: Commands
) -> None:
    """Each file has its earlier content or its new one. The next run replaces all of them."""
    writer, environment = WRITERS[name], list_environment(loaded, folder)

    def run(mishap: Mishap = "none", flush: int = 1) -> Ended:
        kill_at = ("os:fsync", flush)
        return commands(*writer.words, folder=folder, mishap=mishap, environment=environment, kill_at=kill_at)

    done = run()
    assert done.code == 0, done.stderr
    before = content_of(folder / writer.folder)
    old = sorted(IDS)
    assert [writer.read(content) for path, content in before.items() if is_of_patients(path)] == [old]
    add_patients(loaded, folder, "new1", "new2")
    new = sorted([*IDS, "new1", "new2"])
    full = run("full")
    assert full.code in (75, 78)
    assert "pace" in full.stderr
    assert content_of(folder / writer.folder) == before
    for flush in range(1, MOST_FLUSHES, writer.step):
        done = run("killed", flush)
        after = content_of(folder / writer.folder)
        rows = [writer.read(content) for path, content in after.items() if is_of_patients(path)]
        assert rows in ([old], [new])
        if manifest := after.get("manifest.json"):
            hashes = {file["name"]: file["sha256"] for file in json.loads(manifest)["files"]}
            assert hashes == {path: sha256(after[path]).hexdigest() for path in hashes}
        assert all(
            path.name.startswith(".") or ".spool" in path.parts for path in unfinished_files(folder / writer.folder)
        )
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL
    assert done.code == 0
    assert flush > 2
    assert rows == [new]


MIGRATE_POINTS = [
    "fhir_assets.warehouse.postgres.db.migrations:_create_partitions",
    "fhir_assets.warehouse.postgres.tables.view_tables:ensure_tables",
    "fhir_assets.pipeline.rebuild.step:RebuildStep._rebuild_batch",
    "fhir_assets.warehouse.postgres.tables.rebuilding:replace_rows",
    "fhir_assets.warehouse.ops.checkpoints:restore_loaded_parts",
    "fhir_assets.warehouse.postgres.db.roles:grant_rights",
]


@pytest.mark.slow
def test_a_migration_that_is_killed_is_completed_by_the_next_one(
    loaded: Deployment, folder: Path, commands: Commands
) -> None:
    environment = list_environment(loaded, folder)
    before = loaded.tables()
    for number, point in enumerate(MIGRATE_POINTS):
        born = {**VIEW, "name": f"born_{number}", "select": [{"column": [{"name": "id", "path": "id"}]}]}
        (folder / "views" / f"born_{number}.json").write_text(json.dumps(born))
        with connect(loaded.url) as conn:
            conn.execute("DROP TABLE IF EXISTS fhir_partitions.resource_immunization")
        done = commands("migrate", folder=folder, mishap="killed", environment=environment, kill_at=(point, 1))
        assert done.code == -signal.SIGKILL, point
        assert {name: rows for name, rows in loaded.tables().items() if name in before} == before
        done = commands("migrate", folder=folder, environment=environment)
        assert done.code == 0, done.stderr
        assert loaded.query(f"SELECT count(*) FROM fhir.born_{number}") == [(len(IDS),)], point
        assert loaded.query("SELECT to_regclass('fhir_partitions.resource_immunization') IS NOT NULL") == [(True,)]

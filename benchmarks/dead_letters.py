"""Measure dead letters: listing them among a million, and replaying a hundred thousand.

``python -m benchmarks.dead_letters [listed] [replayed]`` prints two tables. The replay is compared with a load of the
same resources under rules that accept all of them.
"""

import gzip
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter

from benchmarks.figures import Figure, report
from benchmarks.machine import scratch
from fhir_assets.definitions import build_definitions
from fhir_assets.ingestion.outcome import select_failed
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.orchestration.instance import config
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import Settings, SourceKind, load_settings
from fhir_assets.warehouse.ops import dead_letters, replays
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db import embedded, migrations
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.queries import quality
from fhir_assets.windows import Granularity

LISTED, REPLAYED = 1_000_000, 100_000
LIMIT_MS = 200
GOAL_REPLAY = 0.9
"""The least speed of a replay, as a share of that of a load of the same resources.

Fewer resources than ``REPLAYED`` are not judged, because the load is the first one of its database.
"""

_RUN = "11111111-0000-0000-0000-000000000007"
_INSERT_DEAD_LETTERS = """
    INSERT INTO ops.dead_letters (fingerprint, resource_type, resource_id, stage, rule, path, message, issues, resource,
        partition_key, run_id, first_run_id, status, occurrences, attempts, first_failure, last_failure, ruleset)
    SELECT decode(md5(n::text), 'hex'), (ARRAY['Patient', 'Encounter', 'Condition', 'Observation'])[n %% 4 + 1],
        'r' || n, (ARRAY['validate', 'validate', 'validate', 'transform', 'load', 'fetch'])[n %% 6 + 1],
        (ARRAY['required-binding', 'cardinality', 'invariant:obs-6', 'structure', 'primitive'])[n %% 5 + 1],
        'Resource.element', 'a message', '[]', convert_to(repeat(md5(n::text), 30), 'UTF8'),
        to_char(timestamptz '2024-01-01' + (n / 5000) * interval '1 day', 'YYYY-MM-DD'), run, run,
        (ARRAY['open', 'open', 'open', 'open', 'resolved', 'discarded'])[(n / 7) %% 6 + 1],
        1, 1, moment, moment, 'rules'
    FROM generate_series(1, %s) n, LATERAL (SELECT timestamptz '2024-01-01' + n * interval '5 seconds' AS moment,
        '11111111-0000-0000-0000-' || lpad((n %% 100)::text, 12, '0') AS run) generated
"""


def measure_listing(url: str, dead_letter_count: int) -> float:
    """Print the durations of queries over the dead letters. Return the longest, in milliseconds."""
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    middle = begin + timedelta(seconds=5 * dead_letter_count / 2)
    selections = {
        "the newest": Selection(),
        "open": Selection(status="open"),
        "a type": Selection(resource_type="Observation", status="open"),
        "a stage": Selection(stage="load", status="open"),
        "a rule": Selection(rule="primitive", status="open"),
        "a type and a rule": Selection(resource_type="Claim", rule="primitive", status="open"),
        "a run": Selection(run_id=_RUN, status="open"),
        "a run, a rule, a stage": Selection(run_id=_RUN, rule="structure", stage="load"),
        "a date range in the past": Selection(since=begin, until=begin + timedelta(hours=1)),
        "a date range, half of all": Selection(since=middle),
        "a type in a date range": Selection(resource_type="Patient", since=middle, until=middle + timedelta(hours=2)),
        "a window": Selection(resource_type="Patient", partition_keys=["2024-01-05"], status="open"),
        "the last page": Selection(status="open", until=begin + timedelta(minutes=30)),
    }
    longest = 0.0
    with connect(url) as conn:
        for title, selection in selections.items():
            milliseconds = _median(
                lambda selection=selection: dead_letters.find(conn, selection, limit=50)  # type: ignore[misc]
            )
            rows = len(dead_letters.find(conn, selection, limit=50))
            print(f"{title:<32}{milliseconds:>8.1f} ms   {rows} rows")
            longest = max(longest, milliseconds)
        milliseconds = _median(lambda: quality.count_unresolved_dead_letters(conn, "Patient", ["2024-01-05"]))
        print(f"{'counts by rule of one window':<32}{milliseconds:>8.1f} ms")
        rulesets = [(name, "validate", "rules") for name in ("Patient", "Encounter", "Condition", "Observation")]
        milliseconds = _median(lambda: replays.find_outdated(conn, rulesets, limit=1000))
        print(f"{'dead letters of older rulesets':<32}{milliseconds:>8.1f} ms")
    return longest


def _median(work: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        started = perf_counter()
        work()
        times.append((perf_counter() - started) * 1000)
    return statistics.median(times)


def measure_replay(home: Path, resources: int) -> tuple[float, float]:
    """Return the resources per second of a load without dead letters, and of a replay that resolves as many."""
    source = home / "Patient.ndjson.gz"
    with gzip.open(source, "wb", 1) as file:
        for number in range(resources):
            moment = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
            patient = {
                "resourceType": "Patient",
                "id": f"p{number}",
                "meta": {"versionId": "1", "lastUpdated": moment.isoformat()},
                "name": [{"use": "official", "family": f"Family {number}", "given": ["A", "B"]}],
                "gender": "unheard-of",
                "birthDate": "1980-05-05",
                "address": [{"line": ["A street 1"], "city": "A city", "postalCode": "12345", "country": "DE"}],
            }
            file.write(json.dumps(patient).encode() + b"\n")
    lenient = {"validation_warn_rules": "required-binding:Patient.gender"}
    plain = _load(_settings(home / "plain", source, **lenient))
    strict = _settings(home / "strict", source)
    _load(strict)
    os.environ.pop("DAGSTER_HOME", None)
    os.environ.pop("DAGSTER_POSTGRES_URL", None)
    relaxed = _settings(home / "strict", source, **lenient)
    instance = config.open_instance(relaxed)
    ingestion = Ingestion(relaxed, build_definitions(relaxed), instance)
    started = perf_counter()
    outcomes = ingestion.replay(Selection(), triggered_by="benchmark")
    seconds = perf_counter() - started
    with connect(embedded.ensure(relaxed.home)) as conn:
        resolved = replays.count_outcome(conn, [outcome.run_id for outcome in outcomes]).resolved
        (loaded,) = conn.execute("SELECT count(*) FROM fhir.patient").fetchone() or (0,)
    instance.dispose()
    if select_failed(outcomes) or resolved != resources or loaded != resources:
        raise SystemExit("the replay failed: there is nothing to measure")
    return resources / plain, resources / seconds


def _settings(home: Path, source: Path, **settings: object) -> Settings:
    home.mkdir(exist_ok=True)
    home.chmod(0o711)
    return load_settings(
        fhir_base_url=str(source),
        fhir_source=SourceKind.NDJSON,
        fhir_resource_types="Patient",
        fhir_partition=Granularity.MONTHLY,
        fhir_assets_home=home,
        db_url=None,
        **settings,
    )


def _load(settings: Settings) -> float:
    for name in ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL"):
        os.environ.pop(name, None)
    migrations.upgrade(embedded.ensure(settings.home))
    instance = config.open_instance(settings)
    ingestion = Ingestion(settings, build_definitions(settings), instance)
    due = ingestion.due_loads.find()
    ingestion.due_loads.begin_checkpoints(due)
    started = perf_counter()
    outcomes = [ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="benchmark") for windows in due]
    seconds = perf_counter() - started
    instance.dispose()
    if select_failed(outcomes):
        raise SystemExit("the load failed: there is nothing to measure")
    return seconds


def main(listed: int, replayed: int) -> int:
    """Print both tables. Return 1 if a query took longer than the limit, or the replay misses its goal."""
    with scratch() as home:
        url = embedded.ensure(home)
        migrations.upgrade(url)
        with connect(url, autocommit=True) as conn:
            conn.execute(_INSERT_DEAD_LETTERS, [listed])
            conn.execute("ANALYZE ops.dead_letters")
        print(f"A page of 50 among {listed:,} dead letters, median of 7")
        longest = measure_listing(url, listed)
        print(f"limit {LIMIT_MS} ms: {'kept' if longest < LIMIT_MS else 'exceeded'}")
    with scratch() as home, ExitStack() as stack:
        for name in ("plain", "strict"):
            stack.callback(embedded.stop, home / name)
        plain, replay_rate = measure_replay(home, replayed)
    print(f"\n{replayed:,} Patients loaded          {plain:>8,.0f} resources/s")
    print(f"{replayed:,} dead letters replayed    {replay_rate:>8,.0f} resources/s, ratio {replay_rate / plain:.2f}")
    work = f"{replayed:,} dead letters replayed"
    goal = GOAL_REPLAY if replayed >= REPLAYED else None
    missed = report(Figure(6, work, replay_rate / plain, goal, " of the speed of a load", True))
    return int(longest >= LIMIT_MS or missed)


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(arguments[0] if arguments else LISTED, arguments[1] if len(arguments) > 1 else REPLAYED))

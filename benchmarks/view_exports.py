"""Measure views from NDJSON to Parquet, compared with DuckDB and SQL written by hand.

``python -m benchmarks.view_exports [resources ...]``. ``fhir-assets view run`` and DuckDB read the same file, each in a
process of its own, in turn: their CPU seconds count, with the start of the process. The rows of both must be equal.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import population
from benchmarks.duckdb_peer import PROGRAM, summarize
from benchmarks.figures import Figure, report
from benchmarks.machine import scratch
from benchmarks.processes import Spent, run
from benchmarks.views import ENCOUNTER_FLAT, PATIENT_NAMES

COUNTS = (10_000, 100_000)
LARGE = 2_000_000
GOAL_SECONDS_MORE = 1.0
"""The most CPU seconds beyond DuckDB's at 10,000 resources, which are mostly the start of the process."""
GOAL_TIMES = 1.0
"""The most CPU seconds as a multiple of DuckDB's at ``LARGE`` resources."""

_ROUNDS = 3
_OURS = "from fhir_assets.cli import main; main()"
_OBSERVATION_CODINGS: dict[str, Any] = {
    "resource": "Observation",
    "select": [
        {
            "column": [
                {"name": "id", "path": "id"},
                {"name": "value", "path": "value.ofType(Quantity).value"},
                {"name": "effective", "path": "effective.ofType(dateTime)"},
            ]
        },
        {"forEach": "code.coding", "column": [{"name": "code", "path": "code"}]},
        {
            "forEachOrNull": "component",
            "column": [
                {"name": "component_code", "path": "code.coding.code.first()"},
                {"name": "component_value", "path": "value.ofType(Quantity).value"},
            ],
        },
    ],
}


@dataclass(frozen=True, slots=True)
class Case:
    """A view, and the same in DuckDB's SQL over ``{source}``, a call that reads the file with the given columns."""

    title: str
    definition: Mapping[str, Any]
    columns: str
    sql: str

    @property
    def resource_type(self) -> str:
        """The type of the view's resources."""
        return str(self.definition["resource"])


CASES = (
    Case(
        "Encounter, 9 columns flat",
        ENCOUNTER_FLAT,
        "{id: 'VARCHAR', status: 'VARCHAR', class: 'STRUCT(code VARCHAR)',"
        " type: 'STRUCT(coding STRUCT(code VARCHAR)[], text VARCHAR)[]', subject: 'STRUCT(reference VARCHAR)',"
        " period: 'STRUCT(\"start\" VARCHAR, \"end\" VARCHAR)', serviceProvider: 'STRUCT(reference VARCHAR)'}",
        """
        SELECT id, status, class.code AS class_code, type[1].coding[1].code AS type_code, type[1].text AS type_text,
               subject.reference AS subject, period."start" AS period_start, period."end" AS period_end,
               serviceProvider.reference AS provider
        FROM {source}
        """,
    ),
    Case(
        "Patient names unnested",
        PATIENT_NAMES,
        "{id: 'VARCHAR', name: 'STRUCT(\"use\" VARCHAR, family VARCHAR, given VARCHAR[])[]'}",
        """
        SELECT id, n."use" AS "use", n.family AS family, n.given[1] AS given
        FROM (SELECT id, unnest(name) AS n FROM {source})
        """,
    ),
    Case(
        "Observation by coding by component",
        _OBSERVATION_CODINGS,
        "{id: 'VARCHAR', valueQuantity: 'STRUCT(\"value\" DOUBLE)', effectiveDateTime: 'VARCHAR',"
        " code: 'STRUCT(coding STRUCT(code VARCHAR)[])', component: "
        "'STRUCT(code STRUCT(coding STRUCT(code VARCHAR)[]), valueQuantity STRUCT(\"value\" DOUBLE))[]'}",
        """
        SELECT id, value, effective, coding.code AS code, c.code.coding[1].code AS component_code,
               c.valueQuantity."value" AS component_value
        FROM (
            SELECT id, value, effective, coding, unnest(coalesce(component, [NULL])) AS c
            FROM (
                SELECT id, valueQuantity."value" AS value, effectiveDateTime AS effective, component,
                       unnest(code.coding) AS coding
                FROM {source}
            )
        )
        """,
    ),
)


def main(counts: tuple[int, ...] = COUNTS) -> int:
    """Print the table. Return 1 if a goal is missed."""
    return max(_measure(case, count) for count in counts for case in CASES)


def _measure(case: Case, count: int) -> int:
    with scratch() as folder:
        data, view = folder / "data.ndjson", folder / "view.json"
        population.write_type(data, case.resource_type, count)
        view.write_text(json.dumps({"name": "measured", "status": "active", **case.definition}))
        rounds = 1 if count > max(COUNTS) else _ROUNDS
        pairs = [(_run_ours(folder, view, data), _run_duckdb(folder, case, data)) for _ in range(rounds)]
        mine, theirs = summarize(folder / "ours.parquet"), summarize(folder / "duckdb.parquet")
    if mine != theirs or not mine[0]:
        raise SystemExit(f"{case.title}: the rows differ, {mine} and {theirs}: there is nothing to measure")
    ours, peer = sorted(pairs, key=lambda pair: pair[0].processor - pair[1].processor)[len(pairs) // 2]
    title = f"{case.title}, {count:,} resources"
    print(f"{title:<60} {mine[0]:>9,} rows\n  ours    {ours}\n  DuckDB  {peer}", flush=True)
    work, value, unit = f"view run, {title}", ours.processor / peer.processor, " times the CPU of DuckDB"
    limit = GOAL_TIMES if count >= LARGE else None
    if count <= min(COUNTS):
        value, limit, unit = ours.processor - peer.processor, GOAL_SECONDS_MORE, " s CPU more than DuckDB"
    return report(Figure(5, work, value, limit, unit, ours=ours, peer=peer, peer_name="DuckDB"))


def _run_ours(folder: Path, view: Path, data: Path) -> Spent:
    arguments = ["view", "run", str(view), str(data), "--format", "parquet", "-o", str(folder / "ours.parquet")]
    return run([sys.executable, "-c", _OURS, *arguments], {"FHIR_ASSETS_HOME": str(folder)})[1]


def _run_duckdb(folder: Path, case: Case, data: Path) -> Spent:
    source = f"read_json('{data}', format = 'newline_delimited', columns = {case.columns})"
    statement = f"COPY ({case.sql.format(source=source)}) TO '{folder / 'duckdb.parquet'}' (FORMAT parquet)"
    return run([sys.executable, "-c", PROGRAM, statement])[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="*", default=COUNTS, help=f"Goals: to {COUNTS[0]} and at {LARGE}")
    sys.exit(main(tuple(parser.parse_args().resources)))

"""A question has SQL that runs on Postgres and DuckDB, and a function that computes its answer from the resources.

The functions below read FHIR's JSON as R4 defines it, and use no code of ``fhir_assets``.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

Resource = dict[str, Any]
Row = tuple[Any, ...]

SNOMED = "http://snomed.info/sct"
LOINC = "http://loinc.org"
RXNORM = "http://www.nlm.nih.gov/research/umls/rxnorm"
ICD10 = "http://hl7.org/fhir/sid/icd-10-cm"
CVX = "http://hl7.org/fhir/sid/cvx"
ERROR = "entered-in-error"


class Hospital:
    """Resources by type, read from lines of NDJSON."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._by_type: dict[str, list[Resource]] = defaultdict(list)
        for line in lines:
            resource = json.loads(line, parse_float=Decimal)
            self._by_type[resource["resourceType"]].append(resource)

    def all(self, resource_type: str) -> list[Resource]:
        """Return the resources of a type."""
        return self._by_type[resource_type]

    def valid(self, resource_type: str) -> Iterator[Resource]:
        """Yield the resources of a type that were not entered in error."""
        return (resource for resource in self.all(resource_type) if resource.get("status") != ERROR)

    def by_id(self, resource_type: str) -> dict[str, Resource]:
        """Return the resources of a type by id."""
        return {resource["id"]: resource for resource in self.all(resource_type)}


@dataclass(frozen=True)
class Question:
    """A question in words, its SQL, and the function that computes its answer from the resources."""

    text: str
    statement: str
    answer: Callable[[Hospital], Iterable[Row]]

    def list_tables(self) -> set[str]:
        """Return the names of the tables of schema fhir that the SQL reads."""
        return set(re.findall(r"\bfhir\.(\w+)", self.statement))


QUESTIONS: dict[str, Question] = {}
"""All questions by name; the modules of this package add theirs."""


def question(
    statement: str,
) -> Callable[[Callable[[Hospital], Iterable[Row]]], Callable[[Hospital], Iterable[Row]]]:
    """Return a decorator that adds a question. The function computes its answer, and its docstring is the text."""

    def add(answer: Callable[[Hospital], Iterable[Row]]) -> Callable[[Hospital], Iterable[Row]]:
        QUESTIONS[answer.__name__] = Question(answer.__doc__ or "", statement, answer)
        return answer

    return add


def tally(keys: Iterable[Hashable]) -> Iterator[Row]:
    """Yield each key, as columns, with the number of times that it occurs."""
    for key, count in Counter(keys).items():
        yield (*(key if isinstance(key, tuple) else (key,)), count)


def key(reference: Resource | None, resource_type: str) -> str | None:
    """Return the id that a relative reference to a resource of this type contains."""
    found = re.fullmatch(rf"{resource_type}/([^/#]+)", (reference or {}).get("reference", ""))
    return found[1] if found else None


def codings(concept: Resource | None, system: str | None = None) -> list[Resource]:
    """Return the codings of a CodeableConcept, of one system if it is given."""
    found = (concept or {}).get("coding", [])
    return [coding for coding in found if system in (None, coding.get("system"))]


def code(concept: Resource | None, system: str | None = None) -> str | None:
    """Return the first code of a CodeableConcept, of one system if it is given."""
    return next((coding.get("code") for coding in codings(concept, system)), None)


def day(text: str | None) -> date | None:
    """Return the day of a date or dateTime as it was written; the first day if only a year or month is known."""
    return date.fromisoformat(f"{text}{'-01-01'[len(text) - 10 :]}" if len(text) < 10 else text[:10]) if text else None


def precision(text: str) -> str:
    """Return how exact a date or dateTime is."""
    return {4: "year", 7: "month", 10: "day"}.get(len(text), "instant")


def offset(text: str) -> str | None:
    """Return the offset of a dateTime as it was written, that of UTC in digits."""
    found = re.search(r"T.*(Z|[+-]\d\d:\d\d)$", text)
    return found[1].replace("Z", "+00:00") if found else None


def instant(text: str) -> datetime:
    """Return the instant of a dateTime, in UTC. Dates begin at midnight in UTC."""
    if len(text) <= 10:
        start = day(text)
        assert start
        return datetime(start.year, start.month, start.day, tzinfo=UTC)
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)

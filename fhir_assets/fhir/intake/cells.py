"""Values of intake records that a spreadsheet damaged, and implausible dates. No message contains a value."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta

NUMBERS = ("mrn", "visit_account_number")
"""The members that identify a person or a visit. Two records with the same value become one."""

_NAMES = ("first_name", "last_name")
EARLIEST_BIRTH = "1800-01-01"
EARLIEST_VISIT = "1900-01-01"
LATEST_VISIT = timedelta(days=366)
"""How far in the future a planned visit may be."""

_has_invisible = re.compile(
    "[\u007f-\u00a0\u00ad\u061c\u1680\u180e\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u206f\u3000\ufe00-\ufe0f\ufeff"
    "\ufff9-\ufffc]"
).search
"""Characters that are invisible or look like a blank. The joiners U+200C and U+200D occur in names of some scripts."""

_JOINERS = re.compile("[\u200c\u200d]")
_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_NO_NUMBER = (
    (re.compile(r"[+-]?\d+(?:[.,]\d+)?[eE][+-]\d+"), "is a number in scientific notation, which lost digits"),
    (re.compile(r"[+-]?\d+[.,]0+"), "is a decimal number"),
    (re.compile(r"\d{15}0{3,}"), "has only its first 15 digits"),
    (re.compile(rf"\d{{1,2}}-(?:{_MONTHS})|(?:{_MONTHS})-\d{{2}}"), "was turned into a date"),
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d.*|\d{1,2}/\d{1,2}/\d{4}"), "was turned into a date"),
    (re.compile(r"#[^\d\s][^\s]*"), "is the error value of a spreadsheet"),
    (
        re.compile(
            r"(?i)<?\(?(?:n/?a|nan|nat|null|nil|none|inf|-inf|infinity|undefined|unknown|missing|empty|true|false)\)?>?|\\n"
        ),
        "states that there is no value",
    ),
    (re.compile(r"[\W_]+|0{2,}"), "consists of zeros or punctuation"),
)
_ADVICE = "format the column as text in the spreadsheet, and export again"
_WRAPPED = re.compile(r'="((?:[^"]|"")*)"')
_is_error = re.compile(r"#[A-ZÄÖÜ0/]+[!?A]?").fullmatch


def unwrap(value: str) -> str:
    """Return the text in ``="00123"``, which keeps leading zeros in a spreadsheet; any other value unchanged."""
    match = _WRAPPED.fullmatch(value)
    return match[1].replace('""', '"') if match else value


_is_suspicious = re.compile(
    "|".join(f"(?:{pattern.pattern.removeprefix('(?i)')})" for pattern, _ in _NO_NUMBER), re.IGNORECASE
).fullmatch
"""Return whether a text may match one of the patterns: one call instead of one for each pattern."""


def compile_visit_check(today: date | None = None) -> Callable[[Mapping[str, str]], bool]:
    """Return a fast function that is true only for rows in which ``find_visit_problems`` finds nothing."""
    latest = _latest_visit(today)

    def check(row: Mapping[str, str]) -> bool:
        mrn, number, first, last = row["mrn"], row["visit_account_number"], row["first_name"], row["last_name"]
        if _is_suspicious(mrn) or _is_suspicious(number) or _is_error(first) or _is_error(last):
            return False
        text = f"{mrn} {number} {first} {last}"
        if not text.isascii() and (_has_invisible(text) or _JOINERS.search(mrn + number)):
            return False
        return (
            EARLIEST_BIRTH <= row["birth_date"] <= row["visit_date"] <= latest and row["visit_date"] >= EARLIEST_VISIT
        )

    return check


def find_number_problem(value: str) -> str | None:
    """Return why a text cannot be a record number; None if it can be one."""
    for pattern, message in _NO_NUMBER:
        if pattern.fullmatch(value):
            return f"{message}: {_ADVICE}"
    if found := _JOINERS.search(value):
        return _describe_character(found[0])
    return None


def find_invisible(value: str) -> str | None:
    """Return the name of the first invisible character in a text; None if there is none."""
    found = _has_invisible(value)
    return _describe_character(found[0]) if found else None


def find_visit_problems(row: Mapping[str, str], today: date | None = None) -> Iterator[tuple[str, str]]:
    """Yield the problems of a visit that conforms to the schema, as pairs of a member and a message."""
    for name in (*NUMBERS, *_NAMES):
        value = row[name]
        problem = find_invisible(value)
        if problem is None and name in NUMBERS:
            problem = find_number_problem(value)
        elif problem is None and _is_error(value):
            problem = f"is the error value of a spreadsheet: {_ADVICE}"
        if problem:
            yield name, problem
    born, visited = row["birth_date"], row["visit_date"]  # dates in ISO 8601, which sort as text
    if born < EARLIEST_BIRTH:
        yield "birth_date", f"is before {EARLIEST_BIRTH}: does the year have four digits?"
    if visited < EARLIEST_VISIT:
        yield "visit_date", f"is before {EARLIEST_VISIT}: does the year have four digits?"
    elif visited > _latest_visit(today):
        yield "visit_date", "is more than a year ahead"
    if born > visited:
        yield "birth_date", "is after visit_date: does the year have the right century?"


def find_patient_problems(record: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the problems of a patient record that conforms to its schema, as pairs of a member and a message."""
    yield from _find_mrn_problem(record)
    born = str(record.get("birthDate", EARLIEST_BIRTH))
    if born < EARLIEST_BIRTH:
        yield "birthDate", f"is before {EARLIEST_BIRTH}: does the year have four digits?"
    elif born > (datetime.now(UTC) + timedelta(days=1)).date().isoformat():
        yield "birthDate", "is in the future: does the year have the right century?"


def find_observation_problems(record: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the problems of an observation that conforms to its schema, as pairs of a member and a message."""
    yield from _find_mrn_problem(record)
    value = record["value"]
    if "unit" in record and (isinstance(value, str | bool)):
        yield "unit", "needs a value that is a number"
    if isinstance(value, str) and not value.strip():
        yield "value", "must not be blank"


def find_clinical_problems(record: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the problems of a clinical record that conforms to its schema, as pairs of a member and a message."""
    yield from _find_mrn_problem(record)


def _find_mrn_problem(record: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    mrn = str(record["mrn"])
    if problem := find_invisible(mrn) or find_number_problem(mrn):
        yield "mrn", problem


def _latest_visit(today: date | None) -> str:
    return ((today or datetime.now(UTC).date()) + LATEST_VISIT).isoformat()


def _describe_character(character: str) -> str:
    name = unicodedata.name(character, "a control character")
    return f"contains U+{ord(character):04X} ({name}), which cannot be seen: remove it or replace it by a blank"

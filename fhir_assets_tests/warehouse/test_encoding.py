"""Postgres accepts every value that is encoded for COPY; all other values raise UnstorableValue."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import Connection, errors

from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.tables.encoding import UnstorableValue, build_row_encoder, check_escapes
from fhir_assets_tests.support.views import column, view

TYPES = {
    "boolean": "boolean",
    "integer": "integer",
    "decimal": "numeric",
    "date": "date",
    "dateTime": "timestamptz",
    "instant": "timestamptz",
    "time": "time",
    "string": "text",
}
VALUES: dict[str, list[object]] = {
    "boolean": [True, False],
    "integer": [0, -(2**31), 2**31 - 1, 2**31, 2**70, 1.5, "1", True],
    "decimal": [
        *(1, 1.5, "1", True, 10**5000, float("inf"), Decimal("1.10"), Decimal("1E+10"), Decimal("1E+131071")),
        *(Decimal("1E+131072"), Decimal("1E-16383"), Decimal("1E-16384"), Decimal("NaN"), Decimal("Infinity")),
    ],
    "date": [
        *("2024", "2024-02", "2024-02-29", "2023-02-29", "0001", "0000", "9999-12-31", "2024-13", "24", "", 2024),
        *("2024-W01-1", "20240101", "2024-01-01T00:00:00Z"),
    ],
    "dateTime": [
        *("2024", "2024-01-01T00:00:00Z", "2016-12-31T23:59:60Z", "2024-01-01T24:00:00Z", "2024-01-01T10:00Z"),
        *("2024-01-01T00:00:00", "9999-12-31T23:59:59.999999999-14:00", "0001-01-01T00:00:00+14:00"),
        *("2024-01-01T00:00:00+15:59", "2024-01-01T00:00:00+16:00", "2024-01-01 00:00:00Z", "2024-01-01T00:00:61Z"),
        *("2024-01-01T00:00:00+14:60", "2024-01-01T10", "now", "infinity"),
    ],
    "instant": ["2024-01-01T00:00:00.123456789Z", "2024-01-01"],
    "time": ["00:00:00", "23:59:60", "24:00:00", "10:00", "10:00:00.5", "1:00:00", "25:00:00", "allballs"],
    "string": [
        *("", "\\N", "a\tb\nc\rd\\", "\\.", "'\"{}", "\0", "\ud800", "😀", 1, True, Decimal("1.10")),
    ],
}
CASES = [
    pytest.param(kind, value, id=f"{kind}-{n}") for kind, values in VALUES.items() for n, value in enumerate(values)
]


@pytest.mark.parametrize(("kind", "value"), CASES)
def test_postgres_accepts_every_encoded_value(conn: Connection[Any], kind: str, value: object) -> None:
    encoder = build_row_encoder(view("v", "Patient", column("x", "birthDate", kind)), NO_ENCRYPTION, "default")
    precision = ", p text" if kind in ("date", "dateTime") else ""
    day = ", d date, o text" if kind in ("dateTime", "instant") else ""
    conn.execute(f"CREATE TEMP TABLE t (x {TYPES[kind]}{precision}{day})".encode())
    try:
        line = encoder((value,), "id")
    except UnstorableValue:
        return
    with conn.cursor() as cursor, cursor.copy("COPY t FROM STDIN") as copy:
        copy.write(f"{line}\n")
    [(stored,)] = conn.execute("SELECT x::text FROM t").fetchall()
    assert stored is not None
    assert "infinity" not in stored.lower()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("integer", 2**31),
        ("integer", True),
        ("boolean", "true"),
        ("decimal", Decimal("1E+131072")),
        ("decimal", float("nan")),
        ("date", "2023-02-29"),
        ("date", "20240101"),
        ("dateTime", "2024-01-01T00:00:00+16:00"),
        ("instant", "2024-01-01"),
        ("time", "25:00:00"),
        ("string", "\0"),
    ],
)
def test_an_unstorable_value_is_rejected_and_the_message_does_not_contain_it(kind: str, value: object) -> None:
    encoder = build_row_encoder(view("v", "Patient", column("x", "birthDate", kind)), NO_ENCRYPTION, "default")
    with pytest.raises(UnstorableValue) as exc_info:
        encoder((value,), "id")
    message, column_index = exc_info.value.args
    assert column_index == 0
    assert str(value) not in message


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["\\", "u", "\\u0000", "\\ud83d", "\\ude00", "\\u0041", "\\\\", "\\n", "a", "😀"])))
def test_check_escapes_agrees_with_a_json_parser(pieces: list[str]) -> None:
    text = f'"{"".join(pieces)}"'
    try:
        value = json.loads(text)
    except ValueError:
        return
    storable = "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
    if storable:
        check_escapes(text.encode())
    else:
        with pytest.raises(UnstorableValue):
            check_escapes(text.encode())


def test_check_escapes_agrees_with_postgres(conn: Connection[Any]) -> None:
    for text in ('"\\ud83d\\ude00"', '"\\\\u0000"', '"\\ud83d"', '"\\ude00"', '"\\u0000"', '"\\ud83dx\\ude00"'):
        try:
            check_escapes(text.encode())
        except UnstorableValue:
            with pytest.raises(errors.DataError), conn.transaction():
                conn.execute("SELECT %s::jsonb", [text])
        else:
            conn.execute("SELECT %s::jsonb", [text])

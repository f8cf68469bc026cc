"""Comparison and boundaries of dates, times and decimals."""

from decimal import Decimal

import pytest

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.path import date_times


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("2024-01-15", "2024-01-15", 0),
        ("2024-01-15", "2024-01-16", -1),
        ("2024", "2025-01-01", -1),
        ("2024", "2024-05", None),
        ("2024-05", "2024", None),
        ("2024-01-15T10:00:00Z", "2024-01-15T11:00:00+01:00", 0),
        ("2024-01-15T10:00:00Z", "2024-01-15T10:00:00.000Z", 0),
        ("2024-01-15T10:00:00Z", "2024-01-15T10:00:00.500Z", -1),
        ("2024-01-15T10:00Z", "2024-01-15T10:00:30Z", None),
        ("2024-01-15", "2024-01-15T10:00:00Z", None),
        ("2024-01-15", "2024-01-17T10:00:00Z", -1),
        ("2024-01-15T23:00:00-05:00", "2024-01-16", None),
        ("2024-01-15T10:00:00", "2024-01-15T10:00:00", 0),
        ("2024-01-15T10:00:00", "2024-01-15T10:00:00Z", None),
        ("2024-02-29", "2024-03", -1),
    ],
)
def test_partial_dates_compare_as_intervals(left: str, right: str, expected: int | None) -> None:
    assert date_times.compare(left, right) == expected
    assert date_times.compare(right, left) == (None if expected is None else -expected)
    assert date_times.equal(left, right) is (None if expected is None else expected == 0)


@pytest.mark.parametrize(
    ("left", "right"), [("2024-13", "2024-12"), ("yesterday", "2024"), ("2023-02-29T10:00Z", "2024")]
)
def test_an_invalid_date_cannot_be_compared(left: str, right: str) -> None:
    with pytest.raises(FhirPathError) as error:
        date_times.compare(left, right)
    assert left not in str(error.value)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("1970", "1970-01-01", "1970-12-31"),
        ("2024-02", "2024-02-01", "2024-02-29"),
        ("2024-02-10", "2024-02-10", "2024-02-10"),
    ],
)
def test_boundaries_of_a_date(value: str, low: str, high: str) -> None:
    assert (date_times.date_boundary(value, False), date_times.date_boundary(value, True)) == (low, high)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("2010-10-10", "2010-10-10T00:00:00.000+14:00", "2010-10-10T23:59:59.999-12:00"),
        ("2010", "2010-01-01T00:00:00.000+14:00", "2010-12-31T23:59:59.999-12:00"),
        ("2010-10-10T12:30Z", "2010-10-10T12:30:00.000Z", "2010-10-10T12:30:59.999Z"),
        ("2010-10-10T12:30:15.1+02:00", "2010-10-10T12:30:15.100+02:00", "2010-10-10T12:30:15.199+02:00"),
    ],
)
def test_boundaries_of_a_date_time(value: str, low: str, high: str) -> None:
    assert (date_times.date_time_boundary(value, False), date_times.date_time_boundary(value, True)) == (low, high)


def test_boundaries_of_a_time() -> None:
    assert date_times.time_boundary("12:34", False) == "12:34:00.000"
    assert date_times.time_boundary("12:34", True) == "12:34:59.999"


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [(1.0, "0.95", "1.05"), (Decimal("1.50"), "1.495", "1.505"), (3, "2.5", "3.5"), (Decimal("-2"), "-2.5", "-1.5")],
)
def test_boundaries_of_a_number_are_half_a_unit_of_its_last_digit_away(
    value: float | Decimal, low: str, high: str
) -> None:
    assert date_times.decimal_boundary(value, False) == Decimal(low)
    assert date_times.decimal_boundary(value, True) == Decimal(high)

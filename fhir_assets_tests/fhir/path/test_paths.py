"""Results of FHIRPath expressions, by example."""

from decimal import Decimal
from typing import Any

import pytest

from fhir_assets.fhir.path import compile_path
from fhir_assets_tests.support.fhirpath_sample import OBSERVATION, PATIENT

ON_PATIENT: list[tuple[str, list[Any]]] = [
    # elements
    ("id", ["p1"]),
    ("Patient.id", ["p1"]),
    ("DomainResource.id", ["p1"]),
    ("Patient", [PATIENT]),
    ("name.family", ["Olsen", "Berg"]),
    ("name.given", ["Ann", "Bo", "Annie"]),
    ("contact.telecom.value", ["a@b"]),
    ("deceased", [False]),
    ("deceased.ofType(boolean)", [False]),
    ("deceased as boolean", [False]),
    ("deceased.ofType(dateTime)", []),
    ("multipleBirth is integer", [True]),
    ("multipleBirth is boolean", [False]),
    ("photo is Attachment", []),
    ("contained.name.family", ["Inner"]),
    ("contained.ofType(Practitioner).id", ["inside"]),
    ("contained.ofType(Organization)", []),
    ("contained.first() is Practitioner", [True]),
    # subsets
    ("name.first().use", ["official"]),
    ("name.last().use", ["maiden"]),
    ("name[1].given", ["Annie"]),
    ("name[7]", []),
    ("name[-1]", []),
    ("name[multipleBirth.ofType(integer) - 1].use", ["usual"]),
    ("name.given.first()", ["Ann"]),
    ("name.given[2]", ["Bo"]),
    ("name.given.last()", ["Annie"]),
    ("name.tail().use", ["usual", "maiden"]),
    ("name.skip(2).use", ["maiden"]),
    ("name.skip(-1).use.count()", [3]),
    ("name.take(2).use", ["official", "usual"]),
    ("name.where(use = 'usual').single().given", ["Annie"]),
    ("gender[0]", ["female"]),
    ("gender[1]", []),
    # filters and projections
    ("name.where(use = 'official').family", ["Olsen"]),
    ("name.where(family.exists() and period.empty()).use", ["official"]),
    ("name.where($index > 0).use", ["usual", "maiden"]),
    ("name.given.where($this.startsWith('Ann'))", ["Ann", "Annie"]),
    ("name.select(given.first())", ["Ann", "Annie"]),
    ("name.select(use & '!')", ["official!", "usual!", "maiden!"]),
    ("name.select(given.select($this & %resource.id))", ["Annp1", "Bop1", "Anniep1"]),
    ("contact.where(name.family = 'Kin').telecom.system", ["email"]),
    ("name.repeat(period).end", ["2002"]),
    ("iif(active, 'yes', 'no')", ["yes"]),
    ("iif(photo.exists(), name, contact.name).family", ["Kin"]),
    ("iif(photo.exists(), 'yes')", []),
    ("name.iif(count() > 1, 'several', 'one')", ["several"]),
    ("name.trace('names').use.first()", ["official"]),
    # existence
    ("name.exists()", [True]),
    ("photo.exists()", [False]),
    ("photo.empty()", [True]),
    ("name.exists(use = 'maiden')", [True]),
    ("name.all(use.exists())", [True]),
    ("name.all(family.exists())", [False]),
    ("photo.all(url.exists())", [True]),
    ("name.count()", [3]),
    ("name.given.count()", [4]),
    ("gender.count()", [1]),
    ("photo.count()", [0]),
    ("name.use.isDistinct()", [True]),
    ("name.use.distinct().count()", [3]),
    ("(active | active.not()).anyTrue()", [True]),
    ("(active | active.not()).allTrue()", [False]),
    ("active.allFalse()", [False]),
    ("active.not().anyFalse()", [True]),
    ("name.where(use = 'usual').given.subsetOf(name.given)", [True]),
    ("name.given.supersetOf(name.family)", [False]),
    # a primitive without a value exists, but has no value
    ("telecom.value", []),
    ("telecom.value.exists()", [True]),
    ("telecom.value.count()", [1]),
    ("telecom.value.hasValue()", [False]),
    ("birthDate.hasValue()", [True]),
    ("name.given[1].exists()", [False]),
    ("birthDate.extension('http://example.org/accuracy').value.ofType(code)", ["month"]),
    ("birthDate.extension.url", ["http://example.org/accuracy"]),
    ("name[0].given.extension.exists()", [True]),
    # collections
    ("name.family | contact.name.family | name.family", ["Olsen", "Berg", "Kin"]),
    ("name.family.union(name.family)", ["Olsen", "Berg"]),
    ("name.family.combine(name.family).count()", [4]),
    ("name.use.intersect('usual' | 'old')", ["usual"]),
    ("name.use.exclude('usual')", ["official", "maiden"]),
    ("'usual' in name.use", [True]),
    ("name.use contains 'old'", [False]),
    ("gender in ('male' | 'female')", [True]),
    ("photo.title in ('male' | 'female')", []),
    ("name.given.join(', ')", ["Ann, Bo, Annie"]),
    ("name.given.join()", ["AnnBoAnnie"]),
    ("photo.title.join(',')", [""]),
    # trees
    ("contact.children().count()", [2]),
    ("contact.descendants().count()", [5]),
    ("contact.descendants().system", ["email"]),
    ("descendants().ofType(Practitioner).id", ["inside"]),
    ("descendants().ofType(ContactPoint).system", ["phone", "email"]),
    # FHIR
    ("extension('http://example.org/sex').value", ["F"]),
    ("extension('http://example.org/race').extension('text').value.ofType(string)", ["mixed"]),
    ("getResourceKey()", ["p1"]),
    ("generalPractitioner.getReferenceKey()", ["d1"]),
    ("generalPractitioner.getReferenceKey(Practitioner)", ["d1"]),
    ("managingOrganization.getReferenceKey(Organization)", ["o1"]),
    ("managingOrganization.getReferenceKey(Patient)", []),
    ("generalPractitioner.resolve().id", ["d1", "inside"]),
    ("generalPractitioner.resolve().ofType(Practitioner).name.family", ["Inner"]),
    ("managingOrganization.resolve() is Organization", [True]),
    # constants
    ("%ucum", ["http://unitsofmeasure.org"]),
    ("%`vs-administrative-gender`", ["http://hl7.org/fhir/ValueSet/administrative-gender"]),
    ("%resource.id = %context.id", [True]),
    ("{}", []),
    # boundaries
    ("birthDate.lowBoundary()", ["1970-06-01"]),
    ("birthDate.highBoundary()", ["1970-06-30"]),
]

ON_OBSERVATION: list[tuple[str, list[Any]]] = [
    ("value.unit", ["mg"]),
    ("value.ofType(Quantity).value", [Decimal("1.50")]),
    ("(value as Quantity).code", ["mg"]),
    ("value is Quantity", [True]),
    ("value is string", [False]),
    ("component.value.ofType(Quantity).value", [2.5]),
    ("component.value.count()", [2]),
    ("component.where(value is string).code.text", ["b"]),
    ("effective < @2024-01-15T10:00:00Z", [True]),
    ("effective.ofType(dateTime) = @2024-01-15T09:30:00Z", [True]),
    ("effective.ofType(dateTime) > @2024", []),
    ("referenceRange.low < referenceRange.high", [True]),
    ("referenceRange.low.comparable(referenceRange.high)", [True]),
    ("value.ofType(Quantity) > 1 'mg'", [True]),
    ("value.ofType(Quantity) > 1 'kg'", []),
    ("value.ofType(Quantity).value.lowBoundary()", [Decimal("1.495")]),
    ("value.ofType(Quantity).value.highBoundary()", [Decimal("1.505")]),
    ("value.ofType(Quantity).value + component.value.ofType(Quantity).value", [Decimal("4.0")]),
    ("value.ofType(Quantity).value = 1.5", [True]),
    ("component.value.ofType(Quantity).value = 2.5", [True]),
    ("code.coding.where(system = %loinc).code", ["8867-4"]),
]

WITHOUT_ELEMENTS: list[tuple[str, list[Any]]] = [
    # numbers
    ("1 + 2 * 3", [7]),
    ("(1 + 2) * 3", [9]),
    ("7 / 2", [Decimal("3.5")]),
    ("7 / 0", []),
    ("7 div 2", [3]),
    ("-7 div 2", [-3]),
    ("7 mod 3", [1]),
    ("7 mod 0", []),
    ("0.1 + 0.2 = 0.3", [True]),
    ("-(3)", [-3]),
    ("(-3).abs()", [3]),
    ("1.2.ceiling()", [2]),
    ("1.8.floor()", [1]),
    ("(-1.8).truncate()", [-1]),
    ("2.5.round()", [Decimal(3)]),
    ("3.14159.round(2)", [Decimal("3.14")]),
    ("9.sqrt()", [Decimal(3)]),
    ("(-9).sqrt()", []),
    ("2.power(3)", [8]),
    ("100.log(10)", [Decimal(2)]),
    ("0.ln()", []),
    ("0.exp()", [Decimal(1)]),
    # text
    ("'abc' + 'd'", ["abcd"]),
    ("'abc' & {}", ["abc"]),
    ("'abc' + {}", []),
    ("'abc'.upper()", ["ABC"]),
    ("'ABC'.lower()", ["abc"]),
    ("' a '.trim()", ["a"]),
    ("'abc'.length()", [3]),
    ("'abc'.substring(1)", ["bc"]),
    ("'abc'.substring(0, 2)", ["ab"]),
    ("'abc'.substring(7)", []),
    ("'abc'.indexOf('c')", [2]),
    ("'abc'.indexOf('x')", [-1]),
    ("'abc'.startsWith('a')", [True]),
    ("'abc'.endsWith('a')", [False]),
    ("'abc'.contains('b')", [True]),
    ("'abc'.contains({})", []),
    ("'a-b'.replace('-', '+')", ["a+b"]),
    ("'abc'.matches('b')", [True]),
    ("'abc'.matches('^b')", [False]),
    ("'abc'.matchesFull('b')", [False]),
    ("'a1b22'.replaceMatches('[0-9]+', '#')", ["a#b#"]),
    ("'2024-01'.replaceMatches('(\\\\d+)-(\\\\d+)', '$2/$1')", ["01/2024"]),
    ("'a,b'.split(',')", ["a", "b"]),
    ("'ab'.toChars()", ["a", "b"]),
    ("'ab'.encode('base64')", ["YWI="]),
    ("'YWI='.decode('base64')", ["ab"]),
    ("'ab'.encode('hex').decode('hex')", ["ab"]),
    ("'<'.escape('html')", ["&lt;"]),
    # conversion
    ("'12'.toInteger()", [12]),
    ("'x'.toInteger()", []),
    ("true.toInteger()", [1]),
    ("'1.5'.toDecimal()", [Decimal("1.5")]),
    ("1.50.toString()", ["1.50"]),
    ("true.toString()", ["true"]),
    ("'yes'.toBoolean()", [True]),
    ("0.toBoolean()", [False]),
    ("'maybe'.toBoolean()", []),
    ("'2024-02-30'.toDate()", []),
    ("'2024-01-15T10:00:00Z'.toDate()", ["2024-01-15"]),
    ("'2024-01-15'.toDateTime()", ["2024-01-15"]),
    ("'10:30'.toTime()", ["10:30"]),
    ("'12'.convertsToInteger()", [True]),
    ("'x'.convertsToDecimal()", [False]),
    # equality
    ("1 = 1.0", [True]),
    ("1 = '1'", [False]),
    ("1 != 2", [True]),
    ("{} = 1", []),
    ("{} != {}", []),
    ("(1 | 2) = (1 | 2)", [True]),
    ("(1 | 2) = (2 | 1)", [False]),
    ("(1 | 2) = 1", [False]),
    ("(1 | 2) ~ (2 | 1)", [True]),
    ("'A  b' ~ 'a B'", [True]),
    ("1.01 ~ 1.0", [True]),
    ("{} ~ {}", [True]),
    ("1 !~ 2", [True]),
    ("@2024 = @2024-01", []),
    ("@2024-01 = @2024-02", [False]),
    ("@T10:30 < @T10:31", [True]),
    ("'a' < 'b'", [True]),
    ("true = 1", [False]),
    # types
    ("1 is integer", [True]),
    ("1 is Integer", [True]),
    ("'a' is System.String", [True]),
    ("1.0 is integer", [False]),
    ("'a' and true", [True]),
    ("1.hasValue()", [True]),
    ("{}.hasValue()", [False]),
]


@pytest.mark.parametrize(("expression", "expected"), ON_PATIENT)
def test_on_a_patient(expression: str, expected: list[Any]) -> None:
    path = compile_path(expression, root_type="Patient")
    assert not path.fallback
    assert path(PATIENT) == expected


@pytest.mark.parametrize(("expression", "expected"), ON_OBSERVATION)
def test_on_an_observation(expression: str, expected: list[Any]) -> None:
    assert compile_path(expression, root_type="Observation")(OBSERVATION) == expected


@pytest.mark.parametrize(("expression", "expected"), WITHOUT_ELEMENTS)
def test_without_elements(expression: str, expected: list[Any]) -> None:
    path = compile_path(expression, root_type="Patient")
    assert not path.fallback
    result = path({"resourceType": "Patient"})
    assert [(type(value), value) for value in result] == [(type(value), value) for value in expected]


UNTYPED = (
    "id",
    "name.family",
    "name.given",
    "deceased",
    "name.where(use = 'official').family",
    "name.given.join(', ')",
)


@pytest.mark.parametrize(("expression", "expected"), [case for case in ON_PATIENT if case[0] in UNTYPED])
def test_elements_of_a_root_of_unknown_type_are_looked_up_by_name(expression: str, expected: list[Any]) -> None:
    assert compile_path(expression, root_type=None)(PATIENT) == expected

"""JSON itself: what is broken has rule ``json``, and never raises."""

from decimal import Decimal

import pytest

from fhir_assets.fhir.validation import Validator

PATIENT = b'{"resourceType":"Patient","active":true'

BROKEN = {
    "nothing": b"",
    "not UTF-8": PATIENT + b',"id":"\xff"}',
    "byte order mark": b"\xef\xbb\xbf" + PATIENT + b"}",
    "UTF-16": (PATIENT + b"}").decode().encode("utf-16"),
    "a name twice": PATIENT + b',"active":true}',
    "a name twice, blanks before colons": PATIENT + b',"id" :"x","active" : true}',
    "a name twice, deep": PATIENT + b',"name":[{"text":"a","text":"b"}]}',
    "a name twice, a colon escaped": PATIENT + b',"name":[{"text":"\\u003a","text":"b:"}]}',
    "an escaped name twice": PATIENT + b',"\\u0061ctive":true}',
    "a name twice in an extension": PATIENT + b',"extension":[{"url":"http://x","url":"http://x","valueString":"a"}]}',
    "a name twice in a contained resource": PATIENT
    + b',"contained":[{"resourceType":"Organization","id":"o","name":"a","name":"b"}]'
    + b',"generalPractitioner":[{"reference":"#o"}]}',
    "NaN": PATIENT + b',"multipleBirthInteger":NaN}',
    "Infinity": PATIENT + b',"multipleBirthInteger":-Infinity}',
    "leading zero": PATIENT + b',"multipleBirthInteger":01}',
    "number out of range": PATIENT + b',"multipleBirthInteger":1e99999999999999999999}',
    "digits without end": PATIENT + b',"multipleBirthInteger":' + b"9" * 5000 + b"}",
    "trailing data": PATIENT + b"} {}",
    "trailing comma": PATIENT + b",}",
    "comment": PATIENT + b"/* */}",
    "single quotes": b"{'resourceType':'Patient'}",
    "lone surrogate": PATIENT + b',"id":"\\ud800"}',
    "raw control character": PATIENT + b',"id":"\x01"}',
    "bottomless arrays": b"[" * 100_000,
    "bottomless objects": b'{"a":' * 100_000,
    "deeper than allowed": b"[" * 101 + b"]" * 101,
    "unfinished": PATIENT,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json_has_rule_json_and_no_resource(name: str) -> None:
    result = Validator(warn_rules=["json"]).check(BROKEN[name])
    assert not result.valid
    assert [issue.rule for issue in result.issues] == ["json"]
    assert result.resource is None


def test_a_name_twice_is_reported_at_its_object() -> None:
    (issue,) = Validator().check(BROKEN["a name twice, deep"]).issues
    assert issue.path == "Patient.name[0]"


def test_size_and_depth_limits_are_settings() -> None:
    body = PATIENT + b',"name":[{"text":"x"}]}'
    assert Validator(max_bytes=len(body), max_depth=3).check(body).valid
    assert Validator(max_bytes=len(body) - 1).check(body).issues[0].rule == "json"
    assert Validator(max_depth=2).check(body).issues[0].rule == "json"


def test_fractions_keep_their_digits() -> None:
    body = (
        b'{"resourceType":"Observation","status":"final","code":{"text":"x"},"valueQuantity":{"value":1.10,"unit":"g"}}'
    )
    result = Validator().check(body)
    assert result.valid
    assert result.resource is not None
    value = result.resource["valueQuantity"]["value"]
    assert isinstance(value, Decimal)
    assert str(value) == "1.10"


def test_white_space_escapes_and_colons_in_text_are_fine() -> None:
    body = b' {\n "resourceType" : "Patient" ,\t"name" : [ { "text" : "a\\u003a: \\"b\\": {}" } ] }\r\n'
    assert Validator().check(body).issues == ()


@pytest.mark.parametrize(
    "body", [b"null", b"[]", b"1", b'"x"', b"{}", b'{"resourceType":1}', b'{"resourceType":"Foo"}']
)
def test_json_that_is_no_resource_is_an_issue_of_structure(body: bytes) -> None:
    assert [issue.rule for issue in Validator().check(body).issues] == ["structure"]

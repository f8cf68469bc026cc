"""Invalid JSON is reported with the rule ``json`` and never raises."""

from decimal import Decimal

import pytest

from fhir_assets.fhir.validation import Validator

PATIENT = b'{"resourceType":"Patient","active":true'

INVALID = {
    "nothing": b"",
    "not UTF-8": PATIENT + b',"id":"\xff"}',
    "byte order mark": b"\xef\xbb\xbf" + PATIENT + b"}",
    "UTF-16": (PATIENT + b"}").decode().encode("utf-16"),
    "a duplicate name": PATIENT + b',"active":true}',
    "a duplicate name, blanks before colons": PATIENT + b',"id" :"x","active" : true}',
    "a duplicate name, deep": PATIENT + b',"name":[{"text":"a","text":"b"}]}',
    "a duplicate name, a colon escaped": PATIENT + b',"name":[{"text":"\\u003a","text":"b:"}]}',
    "an escaped duplicate name": PATIENT + b',"\\u0061ctive":true}',
    "a duplicate name in an extension": PATIENT
    + b',"extension":[{"url":"http://x","url":"http://x","valueString":"a"}]}',
    "a duplicate name in a contained resource": PATIENT
    + b',"contained":[{"resourceType":"Organization","id":"o","name":"a","name":"b"}]'
    + b',"generalPractitioner":[{"reference":"#o"}]}',
    "NaN": PATIENT + b',"multipleBirthInteger":NaN}',
    "Infinity": PATIENT + b',"multipleBirthInteger":-Infinity}',
    "leading zero": PATIENT + b',"multipleBirthInteger":01}',
    "number out of range": PATIENT + b',"multipleBirthInteger":1e99999999999999999999}',
    "endless digits": PATIENT + b',"multipleBirthInteger":' + b"9" * 5000 + b"}",
    "trailing data": PATIENT + b"} {}",
    "trailing comma": PATIENT + b",}",
    "comment": PATIENT + b"/* */}",
    "single quotes": b"{'resourceType':'Patient'}",
    "lone surrogate": PATIENT + b',"id":"\\ud800"}',
    "raw control character": PATIENT + b',"id":"\x01"}',
    "endless arrays": b"[" * 100_000,
    "endless objects": b'{"a":' * 100_000,
    "deeper than allowed": b"[" * 101 + b"]" * 101,
    "unfinished": PATIENT,
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_json_has_rule_json_and_no_resource(name: str) -> None:
    result = Validator(warn_rules=["json"]).check(INVALID[name])
    assert not result.valid
    assert [issue.rule for issue in result.issues] == ["json"]
    assert result.resource is None


def test_a_duplicate_name_is_reported_at_its_object() -> None:
    (issue,) = Validator().check(INVALID["a duplicate name, deep"]).issues
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


def test_white_space_escapes_and_colons_in_text_are_valid() -> None:
    body = b' {\n "resourceType" : "Patient" ,\t"name" : [ { "text" : "a\\u003a: \\"b\\": {}" } ] }\r\n'
    assert Validator().check(body).issues == ()


@pytest.mark.parametrize(
    "body", [b"null", b"[]", b"1", b'"x"', b"{}", b'{"resourceType":1}', b'{"resourceType":"Foo"}']
)
def test_json_that_is_not_a_resource_has_rule_structure(body: bytes) -> None:
    assert [issue.rule for issue in Validator().check(body).issues] == ["structure"]

"""Credentials as they stand in a request."""

import pytest
import requests

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.auth.credentials import Credentials, build_credentials


def header_of(auth: Credentials) -> str | None:
    return requests.Request("GET", "http://fhir.example/", auth=auth).prepare().headers.get("Authorization")


def test_basic_is_utf_8() -> None:
    assert header_of(build_credentials("änne", "pässwort:1")) == "Basic w6RubmU6cMOkc3N3b3J0OjE="


def test_a_token_goes_before_a_user_name() -> None:
    assert header_of(build_credentials("anna", "secret", "t0ken")) == "Bearer t0ken"


@pytest.mark.parametrize("token", ["t0ken", "Bearer t0ken", " bearer  t0ken\n"])
def test_a_token_may_come_with_its_scheme_and_a_line_end(token: str) -> None:
    assert header_of(build_credentials(token=token)) == "Bearer t0ken"


@pytest.mark.parametrize("token", ["sec ret", "secret\r\nX-Other: 1", "secrét", "secret\u2603", " "])
def test_what_is_no_token_is_a_bad_setting_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigurationError, match="the token is not a token") as caught:
        build_credentials(token=token)
    assert "sec" not in str(caught.value)


def test_a_user_name_with_a_colon_cannot_be_sent() -> None:
    with pytest.raises(ConfigurationError, match="the user name has a colon"):
        build_credentials("anna:x", "secret")


def test_no_settings_make_no_header() -> None:
    assert header_of(build_credentials()) is None


@pytest.mark.parametrize(
    "auth", [build_credentials(), build_credentials("anna", "secret"), build_credentials(token="secret")]
)
def test_fixed_credentials_cannot_be_renewed_and_do_not_show_themselves(auth: Credentials) -> None:
    assert not auth.renew()
    assert "secret" not in repr(auth)

"""The headers that credentials add to a request."""

import pytest
import requests

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.auth.credentials import Credentials, build_credentials


def header_of(auth: Credentials) -> str | None:
    return requests.Request("GET", "http://fhir.example/", auth=auth).prepare().headers.get("Authorization")


def test_basic_credentials_are_encoded_as_utf_8() -> None:
    assert header_of(build_credentials("änne", "pässwort:1")) == "Basic w6RubmU6cMOkc3N3b3J0OjE="


def test_a_token_has_precedence_over_a_user_name() -> None:
    assert header_of(build_credentials("anna", "secret", "t0ken")) == "Bearer t0ken"


@pytest.mark.parametrize("token", ["t0ken", "Bearer t0ken", " bearer  t0ken\n"])
def test_a_token_may_include_its_scheme_and_a_line_end(token: str) -> None:
    assert header_of(build_credentials(token=token)) == "Bearer t0ken"


@pytest.mark.parametrize("token", ["sec ret", "secret\r\nX-Other: 1", "secrét", "secret\u2603", " "])
def test_an_invalid_token_is_a_configuration_error_and_is_not_shown(token: str) -> None:
    with pytest.raises(ConfigurationError, match="the token is not a token") as exc_info:
        build_credentials(token=token)
    assert "sec" not in str(exc_info.value)


def test_a_user_name_with_a_colon_cannot_be_sent() -> None:
    with pytest.raises(ConfigurationError, match="the user name has a colon"):
        build_credentials("anna:x", "secret")


def test_no_credentials_send_no_header() -> None:
    assert header_of(build_credentials()) is None


@pytest.mark.parametrize(
    "auth", [build_credentials(), build_credentials("anna", "secret"), build_credentials(token="secret")]
)
def test_fixed_credentials_cannot_be_renewed_and_are_not_in_their_repr(auth: Credentials) -> None:
    assert not auth.renew()
    assert "secret" not in repr(auth)

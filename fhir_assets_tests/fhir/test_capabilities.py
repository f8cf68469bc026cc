"""Capabilities of a FHIR server, and servers that are not FHIR R4."""

from collections.abc import Callable

import pytest

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets_tests.support.fhir_clients import build_client
from fhir_assets_tests.support.scripted_server import Reply, ScriptedServer, reply

STATEMENT = {
    "resourceType": "CapabilityStatement",
    "fhirVersion": "4.0.1",
    "rest": [
        {
            "mode": "server",
            "resource": [
                {"type": "Patient", "interaction": [{"code": "read"}, {"code": "search-type"}]},
                {"type": "Binary", "interaction": [{"code": "read"}]},
                {"type": "Observation"},
            ],
        },
        {"mode": "client", "resource": [{"type": "Goal"}]},
    ],
}


def test_capabilities_list_the_types_by_interaction() -> None:
    with ScriptedServer([reply(STATEMENT)]) as server:
        capabilities = build_client(server.url).capabilities()
        assert server.requests[0].path == "/fhir/metadata"
    assert capabilities.fhir_version == "4.0.1"
    assert capabilities.list_types("search-type") == frozenset({"Patient", "Observation"})
    assert capabilities.list_types("read") == frozenset({"Patient", "Binary", "Observation"})


def test_null_in_place_of_a_list_is_read_as_no_list() -> None:
    rest = [{"mode": "server", "resource": [{"type": "Patient", "interaction": None}]}, {"resource": None}]
    with ScriptedServer([reply(STATEMENT | {"rest": rest}), reply(STATEMENT | {"rest": None})]) as server:
        client = build_client(server.url)
        assert client.capabilities().list_types("search-type") == frozenset({"Patient"})
        assert client.capabilities().list_types("search-type") is None


def test_capabilities_without_types_offer_none_instead_of_an_empty_set() -> None:
    with ScriptedServer([reply({"resourceType": "CapabilityStatement"})]) as server:
        assert build_client(server.url).capabilities().list_types("read") is None


def _raises(kind: type[Exception], match: str, response: Reply) -> Callable[[], None]:
    def check() -> None:
        with ScriptedServer([response] * 9) as server:
            with pytest.raises(kind, match=match):
                build_client(server.url).capabilities()

    return check


@pytest.mark.parametrize(
    "check",
    [
        _raises(ServerUnavailable, "no /metadata .404.; is the base URL right", Reply(status=404)),
        _raises(NotFhir, "HTML, not FHIR", Reply(b"<html><body>Welcome</body></html>")),
        _raises(NotFhir, "XML, not FHIR", Reply(b'<CapabilityStatement xmlns="http://hl7.org/fhir"/>')),
        _raises(NotFhir, "not FHIR in JSON", Reply(b"hello")),
        _raises(NotFhir, "not a CapabilityStatement", reply({"status": "up"})),
        _raises(NotFhir, "not a CapabilityStatement", reply({"resourceType": "CapabilityStatement", "rest": 7})),
        _raises(NotFhir, "a resource other than", reply({"resourceType": "Patient"})),
        _raises(NotFhir, "a FHIR version other than R4", reply({**STATEMENT, "fhirVersion": "5.0.0"})),
        _raises(NotFhir, "a FHIR version other than R4", reply({**STATEMENT, "fhirVersion": "3.0.2"})),
    ],
)
def test_a_server_that_is_not_fhir_r4_is_an_error_that_says_which(check: Callable[[], None]) -> None:
    check()

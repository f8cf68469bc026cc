"""A server that lies at random gets no credential to another server, no memory and no time without end.

The client is another process with 500 MB; the server is real HTTP. A share of the examples runs with every test run.
HOSTILE_EXAMPLES=5000 runs more of them on each road, as `make hostile` does.
"""

import gzip
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from fhir_assets_tests.support.hostile_answers import CODINGS, HEADERS, LINKS, PACES, STATUSES, Lie, serve_lies
from fhir_assets_tests.support.hostile_server import BODIES, ROLES, HostileServer
from fhir_assets_tests.support.limited_process import LimitedProcess

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "10"))
SECRETS = (b"canary-token", b"canary-user", b"canary-password")

_rarely = st.none() | st.none()
_lies = st.builds(
    Lie,
    status=_rarely | st.sampled_from(STATUSES),
    link=st.none() | st.sampled_from(LINKS),
    body=_rarely | st.sampled_from(BODIES) | st.binary(max_size=50),
    coding=_rarely | st.sampled_from(CODINGS),
    pace=_rarely | st.sampled_from(PACES),
    headers=st.tuples() | st.tuples() | st.tuples(st.sampled_from(HEADERS)),
)
_servers = st.dictionaries(st.sampled_from(ROLES), _lies, min_size=1, max_size=3)
_webhooks = st.dictionaries(st.just("write"), _lies, min_size=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileServer]:
    canary = tmp_path_factory.mktemp("outside") / "patients.ndjson"
    canary.write_text('{"resourceType":"Patient","id":"canary-file"}\n')
    with serve_lies(HostileServer(canary=str(canary))) as hostile:
        yield hostile


@pytest.fixture(scope="module")
def client() -> Iterator[LimitedProcess]:
    process = LimitedProcess("fhir_assets_tests.support.hostile_client")
    yield process
    process.stop()


def _check(server: HostileServer, outcome: str) -> None:
    assert outcome == "ok" or outcome.startswith("told "), outcome
    assert "canary" not in outcome
    # The server may name the token endpoint, which then gets the assertion, and nothing else.
    names_endpoint = server.lies.get("discovery", Lie()).link is not None
    assert server.private_connections == 0 or names_endpoint, "a private address was connected to"
    for request in server.received:
        assert not any(secret in request for secret in SECRETS), "a credential went to another server"
        assert b"client_assertion" not in request or names_endpoint, "an assertion went to another server"
        assert b"authorization" not in request.lower()


@pytest.mark.timeout(600 + 2 * EXAMPLES)
@pytest.mark.parametrize("road", ["search", "bulk", "target", "webhook"])
def test_a_hostile_server_gets_nothing_and_does_not_last(
    road: str, server: HostileServer, client: LimitedProcess, database: str
) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=_PHASES)
    @given(_webhooks if road == "webhook" else _servers, st.sampled_from(["token", "password", "smart"]))
    def check(lies: dict[str, Lie], credentials: str) -> None:
        server.lies = lies
        server.received.clear()
        server.private_connections = 0
        outcome = client.run(road, url=f"{server.origin}/fhir", credentials=credentials, database=database)
        event(outcome.partition(" ")[0])
        _check(server, outcome)

    check()


_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)


ENTRY = b'{"type":"Patient","url":"/fhir/file/%07d"}'
MANIFEST = b'{"transactionTime":"2024-01-05T00:00:00Z","requiresAccessToken":false,"output":[%s]}'
LARGE = {
    "a gzip bomb": ("search", "search", Lie(body=gzip.compress(bytes(1 << 24)) * 64), "larger than"),
    "a page of nothing": ("search", "search", Lie(body=b'{"entry":[' + b"[]," * 25_000_000 + b"0]}"), "elements"),
    "a page without end": ("search", "search", Lie(pace="endless"), "larger than"),
    "a manifest without end": ("bulk", "status", Lie(pace="endless"), "larger than"),
    "a large manifest": ("bulk", "status", Lie(body=MANIFEST % b",".join(ENTRY % n for n in range(640_000))), "files"),
    "a line without end": ("bulk", "file", Lie(body=b"x", pace="endless line"), "larger than"),
    "an answer of a webhook": ("webhook", "write", Lie(pace="endless"), "ok"),
    "a gzip bomb of a webhook": ("webhook", "write", Lie(body=gzip.compress(bytes(1 << 24)) * 64), "ok"),
    "an answer to a write": ("target", "write", Lie(pace="endless"), "larger than"),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_limits_of_an_installation_without_settings_need_less_than_500_mb(
    name: str, server: HostileServer, client: LimitedProcess, database: str
) -> None:
    road, role, lie, reason = LARGE[name]
    server.lies = {role: lie}
    outcome = client.run(
        road, url=f"{server.origin}/fhir", credentials="none", database=database, limits={"file_bytes": 1 << 27}
    )
    assert outcome == reason == "ok" or outcome.startswith("told "), outcome
    assert reason in outcome


@pytest.mark.parametrize("credentials", ["token", "password", "smart"])
@pytest.mark.parametrize("road", ["search", "bulk", "target", "webhook"])
def test_a_server_that_does_not_lie_is_read(
    road: str, server: HostileServer, client: LimitedProcess, database: str, credentials: str
) -> None:
    server.lies = {}
    assert client.run(road, url=f"{server.origin}/fhir", credentials=credentials, database=database, limits={}) == "ok"

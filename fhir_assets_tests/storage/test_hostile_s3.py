"""A server of S3 that lies at random costs no memory and no time without end, and nothing is written outside.

The client is another process with 500 MB; the server is real HTTP. HOSTILE_EXAMPLES=5000 runs more examples.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from fhir_assets_tests.support.hostile_answers import CODINGS, HEADERS, LINKS, PACES, STATUSES, Lie, serve_lies
from fhir_assets_tests.support.hostile_s3 import (
    BODIES,
    ETAGS,
    KEYS,
    LINE,
    ROLES,
    SIZES,
    TIMES,
    TOKENS,
    HostileS3,
    S3Lie,
)
from fhir_assets_tests.support.limited_process import LimitedProcess

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "3"))
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)

_rarely = st.none() | st.none() | st.none()
_lies = st.builds(
    S3Lie,
    status=_rarely | st.sampled_from(STATUSES),
    link=_rarely | st.sampled_from(LINKS),
    body=_rarely | st.sampled_from(BODIES) | st.binary(max_size=50),
    coding=_rarely | st.sampled_from(CODINGS),
    pace=_rarely | st.sampled_from((*PACES, "endless line")),
    headers=st.tuples() | st.tuples() | st.tuples(st.sampled_from(HEADERS)),
    keys=st.lists(st.sampled_from(KEYS), max_size=5).map(tuple),
    token=_rarely | st.sampled_from(TOKENS),
    truncated=st.booleans(),
    size=st.just(str(len(LINE))) | st.sampled_from(SIZES),
    modified=st.just(TIMES[0]) | st.sampled_from(TIMES),
    etag=st.just('"e"') | st.sampled_from(ETAGS),
)
_servers = st.dictionaries(st.sampled_from(ROLES), _lies, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileS3]:
    with serve_lies(HostileS3(canary=str(tmp_path_factory.mktemp("outside")))) as hostile:
        yield hostile


@pytest.fixture(scope="module")
def client() -> Iterator[LimitedProcess]:
    process = LimitedProcess("fhir_assets_tests.support.hostile_s3_client")
    yield process
    process.stop()


@pytest.mark.timeout(600 + 2 * EXAMPLES)
@pytest.mark.parametrize("road", ["landing", "store", "write", "download"])
def test_a_hostile_bucket_gets_nothing_and_does_not_last(road: str, server: HostileS3, client: LimitedProcess) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=_PHASES)
    @given(_servers)
    def check(lies: dict[str, Lie]) -> None:
        server.lies = lies
        server.received.clear()
        server.private_connections = 0
        outcome = client.run(road, url=server.origin)
        event(outcome.partition(" ")[0])
        assert outcome == "ok" or outcome.startswith("told "), outcome
        assert "canary" not in outcome
        assert not server.received
        assert not server.private_connections

    check()


@pytest.mark.parametrize("road", ["landing", "store", "write", "download"])
def test_a_bucket_that_does_not_lie_is_read(road: str, server: HostileS3, client: LimitedProcess) -> None:
    server.lies = {}
    assert client.run(road, url=server.origin) == "ok"

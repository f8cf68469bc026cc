"""Uploads, deliveries and the connector authenticate with SMART Backend Services and renew expired tokens."""

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from joserfc.jwk import ECKey
from requests import PreparedRequest

from fhir_assets.delivery.connector import outbox
from fhir_assets.delivery.connector.server import FhirServer, TransientFailure
from fhir_assets.delivery.connector.setup import build_connector
from fhir_assets.errors import ServerUnavailable
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.sandbox.smart import Smart
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy
from fhir_assets_tests.support.hospital import MRN
from fhir_assets_tests.support.uploads import Upload, write

DAY = datetime(2024, 1, 5, tzinfo=UTC)
SLOW = Fault(
    kind=FaultKind.SLOW, on=frozenset({RequestKind.BATCH, RequestKind.UPDATE, RequestKind.CREATE}), seconds=0.1
)
WRITE = "system/*.read system/*.write"


class KeyPair(NamedTuple):
    """The file of a private key, and the public key as a JWK."""

    private_key_file: Path
    public_jwk: dict[str, object]


@pytest.fixture
def key_pair(tmp_path: Path) -> KeyPair:
    """Return a new key pair of a client."""
    private_key = ECKey.generate_key("P-384")
    file = tmp_path / "key.pem"
    file.write_bytes(private_key.as_pem(private=True))
    return KeyPair(file, dict(private_key.as_dict(private=False)))


def test_an_upload_continues_when_its_token_expires(
    upload: Upload,
    key_pair: KeyPair,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smart = Smart({"client": key_pair.public_jwk}, lifetime=0.3)
    write(upload.input / "Patient.ndjson", [patient(f"p{n}", DAY) for n in range(60)])
    monkeypatch.setenv("FHIR_AUTH_CLIENT_ID", "client")
    monkeypatch.setenv("FHIR_AUTH_PRIVATE_KEY_FILE", str(key_pair.private_key_file))
    with SandboxServer(smart=smart, faults=(SLOW,)) as server:
        summary = upload("--batch-size", "5", "--workers", "2", url=server.url)
        assert summary["success"]
        assert server.stats()["resources"] == {"Patient": 60}
    assert smart.issued > 1
    assert smart.scopes == {WRITE}


def test_the_delivery_uses_its_own_credentials(deploy: Deploy, key_pair: KeyPair) -> None:
    smart = Smart({"research": key_pair.public_jwk}, lifetime=0.2)
    with (
        SandboxServer([patient(f"p{n}", DAY) for n in range(40)]) as source,
        SandboxServer(smart=smart, faults=(SLOW,)) as target,
    ):
        deployment = deploy(
            fhir_base_url=source.url,
            fhir_delivery_url=target.url,
            fhir_delivery_client_id="research",
            fhir_delivery_private_key_file=key_pair.private_key_file,
            fhir_resource_types="Patient",
            fhir_partition="monthly",
            batch_size=2,
        )
        assert all(outcome.success for outcome in deployment.ingest())
        assert target.stats()["resources"] == {"Patient": 40}
        assert not [line for line in source.stats()["recent"] if "smart-configuration" in line]
    assert smart.issued > 1
    assert smart.scopes == {WRITE}


def test_the_connector_continues_when_its_token_expires(database: str, tmp_path: Path) -> None:
    smart = Smart({"client": "s3cret"}, lifetime=0.3)
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        outbox.install(conn)
        for n in range(30):
            conn.execute(
                "INSERT INTO health.patient (identifier_system, identifier_value, name_family) VALUES (%s, %s, 'Test')",
                [MRN, f"m{n}"],
            )
    with SandboxServer(smart=smart, faults=(SLOW,)) as server:
        settings = load_settings(
            db_url=database,
            fhir_base_url=server.url,
            fhir_assets_home=tmp_path,
            fhir_auth_client_id="client",
            fhir_auth_client_secret="s3cret",
        )
        with closing(
            build_connector(settings, lambda: connect(database, cipher=NO_ENCRYPTION), workers=2)
        ) as connector:
            connector.run(until_empty=True)
        assert server.stats()["resources"] == {"Patient": 30}
    assert smart.issued > 1
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        assert conn.execute("SELECT count(*) FROM health.fhir_dlq").fetchone() == (0,)


def test_an_unavailable_token_server_is_a_transient_failure_of_all_requests() -> None:
    class NoToken(Credentials):
        def __call__(self, request: PreparedRequest) -> PreparedRequest:
            raise ServerUnavailable("the token server does not respond")

    with (
        closing(FhirServer("http://127.0.0.1:9/fhir", NoToken(), timeout=1, connections=1)) as server,
        pytest.raises(TransientFailure, match="no token: the token server") as failure,
    ):
        server.call("GET", "Patient")
    assert failure.value.server_wide

"""A whole load by a user who has no rights but those of ``fhir_loader``."""

import uuid
from datetime import UTC, datetime

import pytest
from psycopg import sql
from pydantic import SecretStr

from fhir_assets.deployment.views import build_views
from fhir_assets.ingestion.outcome import select_failed
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets_tests.support.content import add, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)


@pytest.mark.slow
def test_a_loader_fetches_validates_and_loads_with_dead_letters_consent_and_checks(deploy: Deploy) -> None:
    name = f"loader_{uuid.uuid4().hex}"
    with SandboxServer([]) as server:
        add(server, *(patient(f"p{n}", DAY) for n in range(3)), patient("bad", DAY, gender="malee"))
        owner = deploy(
            fhir_base_url=server.url,
            fhir_last_updated_gte="2024-01-05",
            fhir_resource_types="Patient,Consent",
            consent_policy="opt-out",
        )
        with connect(owner.url, autocommit=True, cipher=NO_ENCRYPTION) as conn:
            conn.execute(sql.SQL("CREATE ROLE {} LOGIN IN ROLE fhir_loader").format(sql.Identifier(name)))
            view_tables.ensure_tables(conn, build_views(owner.settings).views[:20])
        try:
            url = SecretStr(owner.url.replace("postgres@", f"{name}@"))
            loader = Deployment(owner.settings.model_copy(update={"db_url": url}), owner.instance)
            [outcome] = loader.ingest(first=DAY, last=DAY)
            assert not select_failed([outcome])
            assert loader.unreconciled(outcome) == []
            assert (owner.count_loaded(), owner.count_dead_letters()) == ({"Patient": 3}, {"required-binding": 1})
        finally:
            with connect(owner.url, autocommit=True, cipher=NO_ENCRYPTION) as conn:
                conn.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))

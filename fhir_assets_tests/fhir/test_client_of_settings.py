"""Sources that are built from settings, against a real server and real files."""

from pathlib import Path

import pytest

from fhir_assets.deployment.source import open_source
from fhir_assets.errors import ConfigurationError, ServerUnavailable
from fhir_assets.fhir.source import Source
from fhir_assets.settings import Settings, SourceKind
from fhir_assets.windows import Interval
from fhir_assets_tests.support.scripted_server import Reply, ScriptedServer, reply
from fhir_assets_tests.support.search_bundles import DAY, bundle, patient


def settings(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg,arg-type]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_settings_decide_page_size_and_token(database: str) -> None:
    with ScriptedServer([reply(bundle([patient(1)]))]) as server:
        source = open_source(
            settings(db_url=database, fhir_base_url=server.url, fhir_page_size=7, fhir_auth_token="t0ken")
        )
        assert source.name == "search"
        assert len(list(source.fetch(["Patient"], DAY))) == 1
        (request,) = server.requests
    assert request.all("_count") == ["7"]
    assert request.headers["Authorization"] == "Bearer t0ken"


def test_the_settings_decide_user_name_and_password(database: str) -> None:
    with ScriptedServer([reply(bundle([]))]) as server:
        source = open_source(
            settings(db_url=database, fhir_base_url=server.url, fhir_auth_username="anna", fhir_auth_password="secret")
        )
        assert list(source.fetch(["Patient"], DAY)) == []
        assert server.requests[0].headers["Authorization"] == "Basic YW5uYTpzZWNyZXQ="


def test_the_settings_decide_the_number_of_attempts(database: str) -> None:
    with ScriptedServer([Reply(status=503)] * 9) as server:
        source = open_source(settings(db_url=database, fhir_base_url=server.url, fhir_max_attempts=1))
        with pytest.raises(ServerUnavailable, match="tried once"):
            list(source.fetch(["Patient"], DAY))
        assert len(server.requests) == 1


def test_the_settings_decide_the_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "Patient.ndjson").write_bytes(b'{"resourceType":"Patient","id":"a"}')
    source: Source = open_source(settings(fhir_base_url=str(tmp_path), fhir_source=SourceKind.NDJSON))
    assert source.name == "ndjson"
    assert len(list(source.fetch(["Patient"], Interval(None, DAY.end.replace(year=9000))))) == 1


@pytest.mark.parametrize("kind", list(SourceKind))
def test_a_missing_location_is_a_configuration_error(kind: SourceKind) -> None:
    with pytest.raises(ConfigurationError, match="FHIR_BASE_URL"):
        open_source(settings(fhir_source=kind))

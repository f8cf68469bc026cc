"""Passwords of logins in variables of their own, where no character is escaped."""

from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from fhir_assets.metrics.pipeline import dagster_url
from fhir_assets.orchestration.instance.config import build_environment
from fhir_assets.settings import load_settings

PASSWORD = "p@ss:w/rd#%&? [ü]"


@pytest.mark.parametrize(
    ("url", "user"),
    [
        ("postgresql://loader@db:5432/fhir_assets", "loader"),
        ("postgresql+psycopg2://loader@/fhir_assets?host=/run/postgres", "loader"),
        ("postgresql://loader@[::1]:5432/fhir_assets", "loader"),
        ("postgresql://loader@one,two:5433/fhir_assets", "loader"),
        ("postgresql://db/fhir_assets", None),
    ],
)
def test_the_drivers_get_the_password_as_it_is(url: str, user: str | None) -> None:
    settings = load_settings(db_url=url, db_password=PASSWORD)
    assert settings.db_url
    read = psycopg.conninfo.conninfo_to_dict(settings.db_url.get_secret_value().replace("+psycopg2", ""))
    assert (read.get("user"), read["password"], read["dbname"]) == (user, PASSWORD, "fhir_assets")
    assert PASSWORD not in repr(settings)


def test_a_url_keeps_its_own_password_and_one_without_any_stays_as_it_is() -> None:
    own = "postgresql://loader:own@db/fhir_assets"
    for settings in (load_settings(db_url=own, db_password=PASSWORD), load_settings(db_url=own)):
        assert settings.db_url
        assert settings.db_url.get_secret_value() == own
    assert load_settings(db_password=PASSWORD, db_url=None).db_url is None


def test_dagsters_database_has_a_login_and_a_password_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql+psycopg2://fhir_assets_dagster@db:5432/dagster")
    settings = load_settings(
        db_url="postgresql://fhir_assets_loader@db/fhir_assets",
        db_password="other",
        dagster_postgres_password=PASSWORD,
        fhir_assets_home=tmp_path,
    )
    for _ in range(2):
        environment = build_environment(settings)
        assert make_url(environment["DAGSTER_POSTGRES_URL"]).password == PASSWORD
        assert psycopg.conninfo.conninfo_to_dict(dagster_url(settings))["password"] == PASSWORD
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", environment["DAGSTER_POSTGRES_URL"])

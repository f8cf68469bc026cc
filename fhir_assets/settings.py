"""Every environment variable the project reads: typed, documented and checked at start.

``.env`` of the working folder is read too; the environment wins over it.
"""

import os
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fhir_assets.catalog import BY_NAME, CATALOG
from fhir_assets.errors import ConfigurationError
from fhir_assets.windows import Granularity, WindowScheme

EARLIEST_WINDOW = datetime(2020, 1, 1, tzinfo=UTC)
"""Where windows begin when FHIR_LAST_UPDATED_GTE is unset; the first one then takes all that is older."""


class SourceKind(StrEnum):
    """How resources come in."""

    SEARCH = "search"
    NDJSON = "ndjson"
    BULK = "bulk"


class Executor(StrEnum):
    """Where runs work that the Dagster UI, its schedule or a backfill started."""

    IN_PROCESS = "in_process"
    """Beside the code location, a process a run."""
    MULTIPROCESS = "multiprocess"
    """The same; runs of chosen assets have a process a step."""
    CELERY = "celery"
    """On workers: `fhir-assets worker`, on any machine."""
    K8S = "k8s"
    """A Kubernetes Job a run; runs of chosen assets have a Job a step."""


class Settings(BaseSettings):
    """The settings of one deployment. ``load_settings`` makes one with readable errors."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True, env_ignore_empty=True
    )

    fhir_base_url: str = Field("", description="The FHIR server's base URL; for `ndjson` a folder, a file or a glob")
    fhir_source: SourceKind = Field(SourceKind.SEARCH, description="`search`, `bulk` or `ndjson`")
    fhir_page_size: int = Field(500, ge=1, le=10_000, description="`_count` of a search")
    fhir_last_updated_gte: datetime | None = Field(
        None,
        description="Load nothing older than this date. Unset: everything, the oldest in the first window",
    )
    fhir_resource_types: Annotated[tuple[str, ...], NoDecode] = Field(
        tuple(t.name for t in CATALOG), description="Comma-separated subset of the catalog"
    )
    fhir_partition: Granularity = Field(Granularity.DAILY, description="`hourly`, `daily` or `monthly` windows")
    fhir_overlap_seconds: int = Field(
        120, ge=0, description="How far back an extension of the open window reads again, for late commits"
    )
    fhir_schedule: str = Field("*/15 * * * *", description="Cron of the schedule `incremental_load`, UTC")
    fhir_timeout_seconds: float = Field(60, gt=0, description="How long one call to the FHIR server may take")
    fhir_max_attempts: int = Field(8, ge=1, description="How often a call that failed in passing is tried")
    fhir_max_connections: int = Field(
        4, ge=1, description="Calls to the FHIR server at once, over all runs on all machines"
    )
    fhir_max_loaders: int = Field(4, ge=1, description="Loads into the tables at once, over all runs on all machines")
    fhir_max_runs: int = Field(4, ge=1, description="Runs that Dagster's daemon has at work at once")
    fhir_windows_per_run: int = Field(
        100,
        ge=1,
        le=1000,
        description="Windows of one run of a backfill or a catch-up; several workers want it smaller",
    )
    fhir_executor: Executor = Field(
        Executor.IN_PROCESS, description="Where runs work: `in_process`, `multiprocess`, `celery` or `k8s`"
    )
    celery_broker_url: SecretStr | None = Field(None, description="Redis of the workers: redis://host:6379/0")
    fhir_workers: int | None = Field(
        None, ge=1, description="Processes of one run that validate and make rows; unset: a core each, 1: none besides"
    )
    fhir_bulk_level: str = Field("system", description="What is exported: `system`, `patient` or `group/<id>`")
    fhir_bulk_type_filter: str = Field("", description="`_typeFilter` of an export: searches, with commas between them")
    fhir_bulk_days: float = Field(30, gt=0, description="How long the server may take for an export")
    fhir_bulk_fresh_minutes: float = Field(10, ge=0, description="How long an export serves further runs")
    fhir_auth_username: str | None = Field(None, description="Basic authentication")
    fhir_auth_password: SecretStr | None = Field(None, description="Basic authentication")
    fhir_auth_token: SecretStr | None = Field(None, description="Bearer token")
    fhir_auth_client_id: str | None = Field(None, description="SMART Backend Services: the registered client")
    fhir_auth_client_secret: SecretStr | None = Field(None, description="… its secret, or else")
    fhir_auth_private_key: SecretStr | None = Field(None, description="… its private key: PEM or JWK, RSA or P-384")
    fhir_auth_private_key_file: Path | None = Field(None, description="… or the file that holds it")
    fhir_auth_key_id: str | None = Field(None, description="… the key's `kid`, where its JWK does not say")
    fhir_auth_token_url: str | None = Field(None, description="… the token endpoint; unset: discovered at the server")
    fhir_auth_scope: str | None = Field(
        None, description="… what the token is for; unset: system/*.read, to write system/*.write too"
    )
    fhir_store_url: str = Field(
        "", description="Where raw and validated live: a folder or s3://bucket/prefix; unset: FHIR_ASSETS_HOME/store"
    )
    fhir_deletes: Literal["off", "history"] = Field(
        "off", description="`history`: each load also asks `_history` for what the server deleted"
    )
    fhir_landing_url: str = Field("", description="A folder or s3://bucket/prefix where files land; unset: none")
    fhir_s3_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = Field(
        None, description="Server-side encryption that S3 is asked for; unset: what the bucket does by itself"
    )
    fhir_s3_kms_key_id: str | None = Field(None, description="The KMS key of `aws:kms`; unset: the account's")
    fhir_views: Path | None = Field(None, description="A folder of further ViewDefinitions")
    db_url: SecretStr | None = Field(None, description="Postgres 15 or newer; unset: the embedded one")
    fhir_assets_home: Path = Field(Path(".fhir_assets"), description="State of the embedded parts")
    validation_warn_rules: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Comma-separated rules that only warn, such as `invariant:obs-6`"
    )
    validation_max_bytes: int = Field(64 * 2**20, ge=1024, description="Size limit of one resource")
    validation_max_depth: int = Field(64, ge=8, description="Nesting limit of one resource")
    dead_letter_warn_rate: float = Field(0.01, ge=0, le=1, description="Share of dead letters that warns")
    dead_letter_error_rate: float = Field(0.10, ge=0, le=1, description="Share of dead letters that is an error")
    volume_windows: int = Field(14, ge=1, description="How many windows the check `volume` looks back")
    checks_schedule: str = Field("30 5 * * *", description="Cron of the schedule `check_tables`, UTC")
    replay_after_upgrade: bool = Field(
        False, description="Replay by itself what new rules or a changed view could heal; unset: say so only"
    )

    phi_encryption_keys: SecretStr | None = Field(
        None, description="Fernet keys, comma-separated, newest first: `fhir-assets keys new`. Unset: data in the clear"
    )
    phi_encryption_keys_file: Path | None = Field(None, description="A file with the keys instead, one a line")
    phi_required: bool = Field(False, description="Refuse to start without keys")
    phi_encrypt_store: bool = Field(True, description="With keys: encrypt the parts in the store too")

    batch_size: int = Field(100, ge=1, le=10_000, description="Resources in one Bundle of `upload` and of delivered/*")
    fhir_delivery_url: str = Field(
        "", description="The FHIR server that what was loaded is delivered to (assets delivered/*); unset: none"
    )
    fhir_delivery_username: str | None = Field(None, description="Basic authentication there")
    fhir_delivery_password: SecretStr | None = Field(None, description="Basic authentication there")
    fhir_delivery_token: SecretStr | None = Field(None, description="Bearer token there")
    fhir_delivery_client_id: str | None = Field(None, description="SMART Backend Services there, as FHIR_AUTH_…")
    fhir_delivery_client_secret: SecretStr | None = Field(None, description="… its secret, or else")
    fhir_delivery_private_key: SecretStr | None = Field(None, description="… its private key: PEM or JWK")
    fhir_delivery_private_key_file: Path | None = Field(None, description="… or the file that holds it")
    fhir_delivery_key_id: str | None = Field(None, description="… the key's `kid`, where its JWK does not say")
    fhir_delivery_token_url: str | None = Field(None, description="… the token endpoint; unset: discovered there")
    fhir_delivery_scope: str | None = Field(None, description="… unset: system/*.read system/*.write")

    consent_policy: Literal["off", "opt-out", "opt-in"] = Field(
        "off",
        description="`opt-out`: a patient's data is withheld if a Consent denies; `opt-in`: unless one permits; `off`",
    )
    consent_purpose: Literal["data-sharing", "research"] = Field(
        "data-sharing", description="What the tables serve: `data-sharing` or `research`"
    )

    connector_mapping: Path | None = Field(None, description="Rows to resources, in place of connector/mapping.json")
    connector_workers: int = Field(4, ge=1, le=64, description="Calls of one connector to the FHIR server at once")
    connector_poll_seconds: float = Field(5, gt=0, description="How often the outbox is looked at unasked")
    connector_first_wait_seconds: float = Field(0.5, gt=0, description="Wait after a first failure in passing")
    connector_max_wait_seconds: float = Field(300, gt=0, description="Longest wait between attempts")
    connector_max_attempts: int = Field(
        20, ge=1, description="Attempts that the server answers with 5xx before a change becomes a dead letter"
    )
    connector_keep_days: float = Field(7, gt=0, description="How long processed events are kept")
    connector_max_lag_seconds: float = Field(300, gt=0, description="Lag of the outbox that turns its check red")
    fhir_lake_url: str = Field("", description="Where assets lake/<view> write Parquet; unset: there are none")
    fhir_export_url: str = Field("", description="Where assets `exports/<type>` write; unset: there are none")
    alert_webhook_url: SecretStr | None = Field(
        None, description="Where failures are told to, once an incident: a webhook of Slack, of Teams, or of your own"
    )
    alert_behind_minutes: float = Field(
        60, gt=0, description="How long a type's checkpoint may lag behind without moving before it alarms"
    )
    dagster_ui_url: str = Field("http://127.0.0.1:3000", description="The Dagster UI, as messages link to it")
    dagster_webserver_url: str = Field(
        "", description="Where Dagster's GraphQL is reached by the API; unset: DAGSTER_UI_URL"
    )
    api_tokens: SecretStr | None = Field(
        None, description="name:role:sha256, comma-separated: `fhir-assets api token NAME ROLE`. Unset: nobody gets in"
    )
    api_host: str = Field("127.0.0.1", description="Where the HTTP API is served")
    api_port: int = Field(8080, ge=0, le=65535, description="Port of the HTTP API")
    api_docs: bool = Field(True, description="Serve /docs and /openapi.json, to those with a token")
    api_rate_limit: float = Field(100, gt=0, description="Requests a second of one token, over all workers")
    api_max_body_bytes: int = Field(32 * 2**20, ge=1024, description="Size limit of one request")
    api_max_records: int = Field(10_000, ge=1, description="How many records one request may bring")
    metrics_host: str = Field("127.0.0.1", description="Where Prometheus metrics are served")
    metrics_port: int = Field(9464, ge=0, le=65535, description="Port of the Prometheus metrics; 0: none")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged")

    @field_validator("fhir_resource_types", "validation_warn_rules", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("fhir_resource_types")
    @classmethod
    def _known_types(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in BY_NAME]
        if unknown:
            raise ValueError(f"unknown resource types {', '.join(unknown)}; known are {', '.join(BY_NAME)}")
        return tuple(t.name for t in CATALOG if t.name in value)

    @field_validator("fhir_last_updated_gte", mode="before")
    @classmethod
    def _date_is_utc_midnight(cls, value: object) -> object:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if isinstance(value, datetime) and value.tzinfo is None:
            value = value.replace(tzinfo=UTC)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.fhir_last_updated_gte and self.fhir_last_updated_gte > datetime.now(UTC):
            raise ValueError("FHIR_LAST_UPDATED_GTE lies in the future")
        if bool(self.fhir_auth_username) != bool(self.fhir_auth_password):
            raise ValueError("FHIR_AUTH_USERNAME and FHIR_AUTH_PASSWORD go together: one of them is missing")
        if self.phi_encryption_keys and self.phi_encryption_keys_file:
            raise ValueError("PHI_ENCRYPTION_KEYS and PHI_ENCRYPTION_KEYS_FILE exclude each other: unset one")
        if not self.encrypts and self.phi_required:
            raise ValueError(
                "PHI_REQUIRED is set, but there are no keys: set PHI_ENCRYPTION_KEYS (`fhir-assets keys new` makes one)"
            )
        if not self.encrypts and (self.phi_encryption_keys or self.phi_encryption_keys_file):
            raise ValueError("PHI_ENCRYPTION_KEYS holds no key: unset it, or give one (`fhir-assets keys new`)")
        if self.consent_policy != "off" and "Consent" not in self.fhir_resource_types:
            raise ValueError(
                "CONSENT_POLICY needs Consent among FHIR_RESOURCE_TYPES: add it, or set CONSENT_POLICY=off"
            )
        if self.fhir_auth_username and self.fhir_auth_token:
            raise ValueError("FHIR_AUTH_TOKEN and FHIR_AUTH_USERNAME exclude each other: unset one")
        if self.fhir_delivery_username and self.fhir_delivery_token:
            raise ValueError("FHIR_DELIVERY_TOKEN and FHIR_DELIVERY_USERNAME exclude each other: unset one")
        if bool(self.fhir_delivery_username) != bool(self.fhir_delivery_password):
            raise ValueError("FHIR_DELIVERY_USERNAME and FHIR_DELIVERY_PASSWORD go together: one of them is missing")
        if self.fhir_delivery_url and self.fhir_delivery_url.rstrip("/") == self.fhir_base_url.rstrip("/"):
            raise ValueError("FHIR_DELIVERY_URL is FHIR_BASE_URL: what came from a server would be written back to it")
        if self.fhir_source is not SourceKind.NDJSON and self.fhir_base_url:
            url = urlsplit(self.fhir_base_url)
            if url.scheme not in ("http", "https") or not url.netloc:
                raise ValueError("FHIR_BASE_URL must begin with http:// or https:// when FHIR_SOURCE is search or bulk")
        return self

    @cached_property
    def encryption_keys(self) -> tuple[str, ...]:
        """The keys of PHI_ENCRYPTION_KEYS or its file, newest first, as given. Raises ConfigurationError."""
        if self.phi_encryption_keys:
            text = self.phi_encryption_keys.get_secret_value()
        elif self.phi_encryption_keys_file:
            try:
                text = self.phi_encryption_keys_file.expanduser().read_text("ascii")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
                raise ConfigurationError(f"PHI_ENCRYPTION_KEYS_FILE cannot be read: {reason}") from None
        else:
            return ()
        lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
        return tuple(part.strip() for line in lines for part in line.split(",") if part.strip())

    @property
    def encrypts(self) -> bool:
        """Whether encryption keys are set, so that patient data is encrypted."""
        return bool(self.encryption_keys)

    @cached_property
    def home(self) -> Path:
        """The absolute folder of the embedded parts."""
        return self.fhir_assets_home.expanduser().absolute()

    @cached_property
    def store_url(self) -> str:
        """Where the partitions of raw and validated live: a folder, or a bucket."""
        return self.fhir_store_url or str(self.home / "store")

    @cached_property
    def window_scheme(self) -> WindowScheme:
        """The windows that the settings ask for."""
        start = self.fhir_last_updated_gte
        return WindowScheme(
            self.fhir_partition,
            self.fhir_partition.floor(start or EARLIEST_WINDOW),
            open_start=start is None,
            per_run=self.fhir_windows_per_run,
        )

    @cached_property
    def workers(self) -> int:
        """How many processes of one run validate and make rows."""
        return self.fhir_workers or _cores()

    @cached_property
    def overlap(self) -> timedelta:
        """How far an extension of the open window reads back."""
        return timedelta(seconds=self.fhir_overlap_seconds)

    def require_broker(self) -> str:
        """CELERY_BROKER_URL. Raises ConfigurationError if it is unset."""
        if self.celery_broker_url is None:
            raise ConfigurationError("CELERY_BROKER_URL is not set: give the workers' Redis, redis://host:6379/0")
        return self.celery_broker_url.get_secret_value()

    def require_source(self) -> str:
        """FHIR_BASE_URL. Raises ConfigurationError if it is unset."""
        if not self.fhir_base_url:
            raise ConfigurationError(
                "FHIR_BASE_URL is not set: give the base URL of a FHIR server (https://…/fhir), or with "
                "FHIR_SOURCE=ndjson a folder of NDJSON files, in the environment or in .env"
            )
        return self.fhir_base_url


def load_settings(**overrides: object) -> Settings:
    """The settings of the environment. Raises ConfigurationError that names every bad variable."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        reasons = "; ".join(
            f"{'.'.join(map(str, e['loc'])).upper() or 'settings'}: {e['msg'].removeprefix('Value error, ')}"
            for e in found
        )
        raise ConfigurationError(f"Bad settings. {reasons}") from None


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

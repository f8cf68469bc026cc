"""The environment variables that the project reads: typed, documented and checked at start.

The file ``.env`` of the working folder is read too; the environment takes precedence. Settings are plain values; the
modules of ``deployment/`` build objects from them.
"""

import os
import re
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fhir_assets.catalog import BY_NAME, CATALOG
from fhir_assets.errors import ConfigurationError
from fhir_assets.file_modes import PRIVATE, parse_file_mode
from fhir_assets.sources import DEFAULT_SOURCE
from fhir_assets.windows import Granularity, WindowScheme

_ACCOUNTS = ("fhir_auth", "fhir_delivery", "connector_auth")
_ORIGIN = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?/?")
_OWNER = re.compile(r"team:\w+|[^@\s]+@[^@\s]+\.[^@\s]+")

EARLIEST_WINDOW = datetime(2020, 1, 1, tzinfo=UTC)
"""The start of the first window if FHIR_LAST_UPDATED_GTE is unset. That window also contains all older resources."""


class SourceKind(StrEnum):
    """A kind of source that resources are fetched from."""

    SEARCH = "search"
    NDJSON = "ndjson"
    BULK = "bulk"


class Executor(StrEnum):
    """The executor of runs that the Dagster UI, a schedule, a sensor or a backfill starts."""

    IN_PROCESS = "in_process"
    """On the machine of the code location, one process for each run."""
    MULTIPROCESS = "multiprocess"
    """Like ``in_process``, but a run of selected assets has one process for each step."""
    CELERY = "celery"
    """On Celery workers (`fhir-assets worker`), on any machine."""
    K8S = "k8s"
    """One Kubernetes Job for each run; a run of selected assets has one Job for each step."""


class Settings(BaseSettings):
    """The settings of one deployment. ``load_settings`` creates them with readable errors."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True, env_ignore_empty=True
    )

    fhir_base_url: str = Field("", description="The FHIR server's base URL; for `ndjson` a folder, a file or a glob")
    fhir_link_base: str = Field(
        "",
        description="The base URL in the server's links if it differs: links are rewritten to FHIR_BASE_URL",
    )
    fhir_file_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Other servers with the files of bulk exports, comma-separated: https://files.example.org. They "
        "may have a private address, and get the server's token if the manifest requires it, never a password",
    )
    fhir_source: SourceKind = Field(SourceKind.SEARCH, description="`search`, `bulk` or `ndjson`")
    fhir_page_size: int = Field(500, ge=1, le=10_000, description="Resources in one page of a search (`_count`)")
    fhir_last_updated_gte: datetime | None = Field(
        None,
        description="Load only resources updated on or after this date. Unset: all; those before 2020 in one window",
    )
    fhir_resource_types: Annotated[tuple[str, ...], NoDecode] = Field(
        tuple(t.name for t in CATALOG), description="Comma-separated subset of the catalog"
    )
    fhir_partition: Granularity = Field(Granularity.DAILY, description="`hourly`, `daily` or `monthly` windows")
    fhir_overlap_seconds: int = Field(
        120,
        ge=0,
        description="Seconds before the previous load that the next load fetches again, to include late commits",
    )
    fhir_schedule: str = Field("*/15 * * * *", description="Cron expression of the schedule `incremental_load`, in UTC")
    fhir_owners: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Owners of the assets in the Dagster UI, comma-separated: email addresses, or team:<name>"
    )
    fhir_timeout_seconds: float = Field(60, gt=0, description="Timeout of one call to the FHIR server, in seconds")
    fhir_answer_seconds: float | None = Field(
        None,
        gt=0,
        description="Maximum time of one answer of a FHIR server, from its first header to its last byte, in seconds; "
        "unset: ten times FHIR_TIMEOUT_SECONDS",
    )
    fhir_answer_bytes: int = Field(
        96 * 2**20,
        ge=2**16,
        description="Maximum size of one answer of a FHIR server (a page, a manifest), before and after decompression",
    )
    fhir_max_pages: int = Field(
        500_000, ge=1, description="Maximum number of pages of one search or history of a FHIR server"
    )
    fhir_max_attempts: int = Field(8, ge=1, description="Attempts of a call that fails with a transient error")
    fhir_max_connections: int = Field(
        4, ge=1, description="Concurrent calls to the FHIR server, over all runs on all machines"
    )
    fhir_max_loaders: int = Field(
        4, ge=1, description="Concurrent loads into the tables, over all runs on all machines"
    )
    fhir_max_runs: int = Field(4, ge=1, description="Concurrent runs of Dagster's daemon")
    fhir_windows_per_run: int = Field(
        100,
        ge=1,
        le=1000,
        description="Windows of one run of a backfill or a catch-up; set it lower to share work among workers",
    )
    fhir_executor: Executor = Field(
        Executor.IN_PROCESS, description="The executor of runs: `in_process`, `multiprocess`, `celery` or `k8s`"
    )
    celery_broker_url: SecretStr | None = Field(None, description="Redis of the workers: redis://host:6379/0")
    fhir_workers: int | None = Field(
        None, ge=1, description="Processes of one run that validate and build rows; unset: one for each core"
    )
    fhir_bulk_level: str = Field(
        "system", description="The level of a Bulk Data export: `system`, `patient` or `group/<id>`"
    )
    fhir_bulk_type_filter: str = Field("", description="`_typeFilter` of an export: comma-separated searches")
    fhir_bulk_days: float = Field(30, gt=0, description="Maximum duration of an export, in days")
    fhir_bulk_fresh_minutes: float = Field(
        10, ge=0, description="Minutes after the request of an export during which other runs reuse it"
    )
    fhir_bulk_max_files: int = Field(100_000, ge=1, description="Maximum number of files of one export")
    fhir_bulk_file_bytes: int = Field(
        64 * 2**30, ge=2**16, description="Maximum size of one file of an export, before and after decompression"
    )
    fhir_bulk_file_seconds: float = Field(
        6 * 3600, gt=0, description="Maximum time of the download of one file of an export, in seconds"
    )
    fhir_auth_enabled: bool = Field(True, description="Whether FHIR_AUTH_* is used; false: no credentials are sent")
    fhir_auth_username: str | None = Field(
        None,
        validation_alias=AliasChoices("fhir_auth_username", "fhir_username"),
        description="Basic authentication: the user name",
    )
    fhir_auth_password: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("fhir_auth_password", "fhir_password"),
        description="Basic authentication: the password",
    )
    fhir_auth_token: SecretStr | None = Field(None, description="Bearer token")
    fhir_auth_client_id: str | None = Field(None, description="SMART Backend Services: the id of the registered client")
    fhir_auth_client_secret: SecretStr | None = Field(
        None, description="SMART Backend Services: the client's secret, if it has no private key"
    )
    fhir_auth_private_key: SecretStr | None = Field(
        None, description="SMART Backend Services: the client's private key, PEM or JWK, RSA or P-384"
    )
    fhir_auth_private_key_file: Path | None = Field(
        None, description="SMART Backend Services: a file with the private key, instead of FHIR_AUTH_PRIVATE_KEY"
    )
    fhir_auth_key_id: str | None = Field(
        None, description="SMART Backend Services: the `kid` of the private key, if its JWK has none"
    )
    fhir_auth_token_url: str | None = Field(
        None, description="SMART Backend Services: the token endpoint; unset: the one that the server publishes"
    )
    fhir_auth_scope: str | None = Field(
        None,
        description="SMART Backend Services: the requested scope; unset: system/*.read, for writes also system/*.write",
    )
    fhir_store_url: str = Field(
        "", description="The store: a folder or s3://bucket/prefix; unset: the folder `store` in FHIR_ASSETS_HOME"
    )
    fhir_deletes: Literal["off", "history"] = Field(
        "off", description="`history`: each load also reads deletions from the server's `_history`; `off`: none"
    )
    fhir_landing_url: str = Field("", description="The landing zone: a folder or s3://bucket/prefix; unset: none")
    fhir_s3_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = Field(
        None, description="Server-side encryption requested from S3; unset: the bucket's default"
    )
    fhir_s3_kms_key_id: str | None = Field(
        None, description="The KMS key of `aws:kms`; unset: the account's default key"
    )
    fhir_s3_seconds: float = Field(
        600,
        gt=0,
        description="Maximum time of one request to S3 with its answer, in seconds; an object must bring 64 KiB in it",
    )
    fhir_s3_object_seconds: float = Field(
        6 * 3600, gt=0, description="Maximum time of waiting for S3 to read one object, or one listing, in seconds"
    )
    fhir_s3_object_bytes: int = Field(
        64 * 2**30, ge=2**16, description="Size limit of one object that is read from S3, in bytes"
    )
    fhir_s3_max_objects: int = Field(10_000_000, ge=1, description="Maximum number of objects of one listing of S3")
    fhir_views: Path | None = Field(None, description="A folder of additional ViewDefinitions")
    fhir_foreign_keys: bool = Field(
        False,
        description="Foreign keys between the tables, declared but not enforced, for tools that draw diagrams; needs "
        "Postgres 18. `migrate` creates and drops them",
    )
    # Before db_url, which takes it in.
    db_password: SecretStr | None = Field(
        None, description="The password of the user of DB_URL, if DB_URL has none; no character is escaped"
    )
    db_url: SecretStr | None = Field(
        None, description="The URL of a Postgres 15 or newer; unset: the embedded Postgres"
    )
    dagster_postgres_password: SecretStr | None = Field(
        None, description="The password of the user of DAGSTER_POSTGRES_URL, if that URL has none; as DB_PASSWORD"
    )
    fhir_assets_home: Path = Field(
        Path(".fhir_assets"), description="The folder of the embedded Postgres, the store and Dagster"
    )
    fhir_postgres_port: int | None = Field(
        None,
        ge=1024,
        le=65535,
        description="The port of 127.0.0.1 that the embedded Postgres also listens on, for BI tools (`fhir-assets "
        "reader`); unset: none",
    )
    validation_warn_rules: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Comma-separated validation rules that only warn, for example `invariant:obs-6`"
    )
    validation_max_bytes: int = Field(64 * 2**20, ge=1024, description="Size limit of one resource, in bytes")
    validation_max_depth: int = Field(64, ge=8, description="Nesting limit of one resource")
    validation_max_values: int = Field(
        2_000_000,
        ge=1000,
        description="Limit of the JSON values of one resource, one container on a line or one request: its commas",
    )
    validation_max_issues: int = Field(
        100, ge=1, le=100_000, description="Errors, and warnings, that are kept of one resource; the others are counted"
    )
    fhir_file_bytes: int = Field(
        64 * 2**30,
        ge=2**16,
        description="Size limit of a file of the landing zone or of `ndjson`, before and after decompression, in bytes",
    )
    fhir_file_ratio: float = Field(
        400, ge=2, description="Limit of the size of such a file after decompression, divided by that before"
    )
    fhir_file_dead_letters: int = Field(
        10_000,
        ge=1,
        description="Lines, rows and entries of such a file that each become a dead letter because they cannot be "
        "read, for each type; one more dead letter counts the others",
    )
    dead_letter_warn_rate: float = Field(
        0.01, ge=0, le=1, description="Share of dead letters in a window (0 to 1) at which its check warns"
    )
    dead_letter_error_rate: float = Field(
        0.10, ge=0, le=1, description="Share of dead letters in a window (0 to 1) at which its check fails"
    )
    volume_windows: int = Field(14, ge=1, description="Previous windows that the check `volume` compares a window with")
    checks_minutes: int = Field(
        15, ge=1, description="Minutes between two evaluations of the checks of tables that have changed"
    )
    checks_schedule: str = Field("30 5 * * *", description="Cron expression of the schedule `check_tables`, in UTC")
    replay_after_upgrade: bool = Field(
        False, description="Replay dead letters that changed rules or views may resolve; unset: report them only"
    )

    phi_encryption_keys: SecretStr | None = Field(
        None, description="Fernet keys, comma-separated, newest first: `fhir-assets keys new`. Unset: clear text"
    )
    phi_encryption_keys_file: Path | None = Field(
        None, description="A file with one key on each line, instead of PHI_ENCRYPTION_KEYS"
    )
    phi_required: bool = Field(False, description="Refuse to start without encryption keys")
    phi_bound_only: bool = Field(
        False, description="With encryption keys: refuse patient data that is not bound to its row, column or file"
    )
    phi_encrypt_store: bool = Field(True, description="With encryption keys: encrypt the parts in the store too")

    upload_dir: str = Field(
        "",
        validation_alias=AliasChoices("upload_dir", "tmp_dir"),
        description="The folder or s3://bucket/prefix that `upload` sends without --input",
    )
    batch_size: int = Field(100, ge=1, le=10_000, description="Resources in one Bundle of `upload` and of delivered/*")
    fhir_delivery_url: str = Field(
        "", description="The FHIR server that loaded resources are delivered to (assets delivered/*); unset: none"
    )
    fhir_delivery_username: str | None = Field(
        None, description="Basic authentication at FHIR_DELIVERY_URL: the user name"
    )
    fhir_delivery_password: SecretStr | None = Field(
        None, description="Basic authentication at FHIR_DELIVERY_URL: the password"
    )
    fhir_delivery_token: SecretStr | None = Field(None, description="Bearer token at FHIR_DELIVERY_URL")
    fhir_delivery_client_id: str | None = Field(
        None, description="SMART Backend Services at FHIR_DELIVERY_URL: the id of the registered client"
    )
    fhir_delivery_client_secret: SecretStr | None = Field(None, description="As FHIR_AUTH_CLIENT_SECRET")
    fhir_delivery_private_key: SecretStr | None = Field(None, description="As FHIR_AUTH_PRIVATE_KEY")
    fhir_delivery_private_key_file: Path | None = Field(None, description="As FHIR_AUTH_PRIVATE_KEY_FILE")
    fhir_delivery_key_id: str | None = Field(None, description="As FHIR_AUTH_KEY_ID")
    fhir_delivery_token_url: str | None = Field(None, description="As FHIR_AUTH_TOKEN_URL")
    fhir_delivery_scope: str | None = Field(None, description="As FHIR_AUTH_SCOPE; unset: system/*.read system/*.write")

    consent_policy: Literal["off", "opt-out", "opt-in"] = Field(
        "off",
        description="Patients withheld from the tables. `opt-out`: those whose Consent denies; `opt-in`: those "
        "without a Consent that permits; `off`: none",
    )
    consent_purpose: Literal["data-sharing", "research"] = Field(
        "data-sharing", description="The purpose that the tables are used for: `data-sharing` or `research`"
    )

    connector_url: str = Field(
        "", description="The FHIR server that the connector delivers to; unset: FHIR_BASE_URL, with FHIR_AUTH_*"
    )
    connector_auth_username: str | None = Field(
        None, description="Basic authentication of the connector: the user name"
    )
    connector_auth_password: SecretStr | None = Field(
        None, description="Basic authentication of the connector: the password"
    )
    connector_auth_token: SecretStr | None = Field(None, description="Bearer token of the connector")
    connector_auth_client_id: str | None = Field(
        None, description="SMART Backend Services: the id of the connector's registered client"
    )
    connector_auth_client_secret: SecretStr | None = Field(None, description="As FHIR_AUTH_CLIENT_SECRET")
    connector_auth_private_key: SecretStr | None = Field(None, description="As FHIR_AUTH_PRIVATE_KEY")
    connector_auth_private_key_file: Path | None = Field(None, description="As FHIR_AUTH_PRIVATE_KEY_FILE")
    connector_auth_key_id: str | None = Field(None, description="As FHIR_AUTH_KEY_ID")
    connector_auth_token_url: str | None = Field(None, description="As FHIR_AUTH_TOKEN_URL")
    connector_auth_scope: str | None = Field(
        None, description="As FHIR_AUTH_SCOPE; unset: system/*.read system/*.write"
    )
    connector_mapping: Path | None = Field(
        None, description="The connector's mapping from rows to resources; unset: delivery/connector/mapping.json"
    )
    connector_take_over: bool = Field(
        False,
        description="Take over resources that the connector did not create but that have the identifier of a row: "
        "update and delete them with the row. False: such a row becomes a dead letter",
    )
    connector_workers: int = Field(4, ge=1, le=64, description="Concurrent calls of one connector to the FHIR server")
    connector_poll_seconds: float = Field(
        5, gt=0, description="Seconds between polls of the outbox without a notification"
    )
    connector_first_wait_seconds: float = Field(
        0.5, gt=0, description="Wait in seconds after the first transient failure"
    )
    connector_max_wait_seconds: float = Field(300, gt=0, description="Maximum wait between attempts, in seconds")
    connector_max_attempts: int = Field(
        20, ge=1, description="Attempts with a response of 5xx before a change becomes a dead letter"
    )
    connector_keep_days: float = Field(7, gt=0, description="Days that processed events are kept")
    connector_max_lag_seconds: float = Field(
        300, gt=0, description="Lag of the outbox in seconds at which its check fails"
    )
    fhir_lake_url: str = Field(
        "", description="Folder or s3://bucket/prefix for Parquet of lake/<view>; unset: these assets do not exist"
    )
    fhir_export_url: str = Field(
        "",
        description="Folder or s3://bucket/prefix to which each run that loads something writes its files; "
        "unset: the assets exports/<type> do not exist",
    )
    fhir_file_mode: Annotated[int, BeforeValidator(parse_file_mode)] = Field(
        PRIVATE,
        description="Permissions of the files of the lake and of exports, octal: `0600` (the owner only), `0640` (its "
        "group may read them) or `0644` (every account may); their folders have matching ones",
    )
    alert_webhook_url: SecretStr | None = Field(
        None, description="The webhook (Slack, Teams or your own) that alerts are sent to; unset: no alerts"
    )
    alert_webhook_seconds: float = Field(30, gt=0, description="Maximum time of one call of the webhook, in seconds")
    alert_behind_minutes: float = Field(
        60, gt=0, description="Minutes without progress of a resource type's checkpoint after which an alert is sent"
    )
    dagster_ui_url: str = Field("http://127.0.0.1:3000", description="The Dagster UI that messages link to")
    dagster_webserver_url: str = Field(
        "", description="Dagster's webserver, which the API calls; unset: DAGSTER_UI_URL"
    )
    api_tokens: SecretStr | None = Field(
        None, description="name:role:sha256, comma-separated: `fhir-assets api token NAME ROLE`. Unset: no access"
    )
    api_host: str = Field("127.0.0.1", description="The address that the HTTP API listens on")
    api_port: int = Field(8080, ge=0, le=65535, description="Port of the HTTP API")
    api_docs: bool = Field(True, description="Serve /docs, /redoc and /openapi.json to callers with a token")
    api_rate_limit: float = Field(100, gt=0, description="Requests per second of one token, over all workers")
    api_max_body_bytes: int = Field(32 * 2**20, ge=1024, description="Size limit of one request, in bytes")
    api_max_header_bytes: int = Field(
        64 * 2**10, ge=4096, description="Size limit of the headers of one request, with its URL, in bytes"
    )
    api_header_seconds: float = Field(
        10, gt=0, description="Seconds in which the headers of a request must arrive, counted from its connection"
    )
    api_body_seconds: float = Field(
        60,
        gt=0,
        description="Seconds in which the body of a request must arrive, and a client go on reading its answer",
    )
    api_max_connections: int = Field(
        500,
        ge=10,
        description="Open connections of one worker; beyond them the oldest that waits for a request is closed, of the "
        "client with the most",
    )
    api_max_records: int = Field(10_000, ge=1, description="Maximum number of records in one request")
    metrics_host: str = Field("127.0.0.1", description="The address that the Prometheus metrics are served on")
    metrics_port: int = Field(9464, ge=0, le=65535, description="Port of the Prometheus metrics; 0: none")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="The lowest level of records that are logged"
    )

    @field_validator("fhir_resource_types", "fhir_owners", "fhir_file_origins", "validation_warn_rules", mode="before")
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
            raise ValueError(f"unknown resource types {', '.join(unknown)}; the catalog has {', '.join(BY_NAME)}")
        return tuple(t.name for t in CATALOG if t.name in value)

    @field_validator("fhir_file_origins")
    @classmethod
    def _valid_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_ORIGIN.fullmatch, value)):
            raise ValueError("an origin is https:// or http:// with a host and, if it is not the usual one, a port")
        return tuple(origin.rstrip("/") for origin in value)

    @field_validator("db_url")
    @classmethod
    def _add_db_password(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        return SecretStr(_add_password(value.get_secret_value(), info.data.get("db_password"))) if value else None

    @field_validator("fhir_owners")
    @classmethod
    def _valid_owners(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        invalid = [owner for owner in value if not _OWNER.fullmatch(owner)]
        if invalid:
            raise ValueError(f"{', '.join(invalid)}: an owner is an email address or team:<name>")
        return value

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
    def _check_encryption_and_consent(self) -> Self:
        if self.fhir_last_updated_gte and self.fhir_last_updated_gte > datetime.now(UTC):
            raise ValueError("FHIR_LAST_UPDATED_GTE is in the future")
        if self.phi_encryption_keys and self.phi_encryption_keys_file:
            raise ValueError("PHI_ENCRYPTION_KEYS and PHI_ENCRYPTION_KEYS_FILE are mutually exclusive: unset one")
        if not self.encrypts and self.phi_required:
            raise ValueError(
                "PHI_REQUIRED is set, but there are no keys: create one by `fhir-assets keys new`, and set "
                "PHI_ENCRYPTION_KEYS"
            )
        if not self.encrypts and self.phi_bound_only:
            raise ValueError(
                "PHI_BOUND_ONLY is set, but there are no keys: unset it, or create a key by `fhir-assets keys new`"
            )
        if not self.encrypts and (self.phi_encryption_keys or self.phi_encryption_keys_file):
            raise ValueError("PHI_ENCRYPTION_KEYS contains no key: unset it, or set a key (`fhir-assets keys new`)")
        if self.consent_policy != "off" and "Consent" not in self.fhir_resource_types:
            raise ValueError(
                "CONSENT_POLICY requires Consent in FHIR_RESOURCE_TYPES: add it, or set CONSENT_POLICY=off"
            )
        return self

    @model_validator(mode="after")
    def _check_servers_and_credentials(self) -> Self:
        for account in _ACCOUNTS:
            user, password, token = (getattr(self, f"{account}_{name}") for name in ("username", "password", "token"))
            prefix = account.upper()
            if bool(user) != bool(password):
                raise ValueError(f"{prefix}_USERNAME and {prefix}_PASSWORD are both required: one of them is missing")
            if user and token:
                raise ValueError(f"{prefix}_TOKEN and {prefix}_USERNAME are mutually exclusive: unset one")
        if self.fhir_delivery_url and self.fhir_delivery_url.rstrip("/") == self.fhir_base_url.rstrip("/"):
            raise ValueError("FHIR_DELIVERY_URL equals FHIR_BASE_URL: resources would be written back to their server")
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
        """The absolute path of FHIR_ASSETS_HOME."""
        return self.fhir_assets_home.expanduser().absolute()

    @property
    def source(self) -> str:
        """The key of the source that resources are fetched from."""
        return DEFAULT_SOURCE

    @cached_property
    def store_url(self) -> str:
        """The location of the partitions of raw and validated: a folder or ``s3://bucket/prefix``."""
        return self.fhir_store_url or str(self.home / "store")

    @cached_property
    def window_scheme(self) -> WindowScheme:
        """The windows of the deployment."""
        start = self.fhir_last_updated_gte
        return WindowScheme(
            self.fhir_partition,
            self.fhir_partition.floor(start or EARLIEST_WINDOW),
            open_start=start is None,
            per_run=self.fhir_windows_per_run,
        )

    @cached_property
    def workers(self) -> int:
        """The number of processes of one run that validate and build rows."""
        return self.fhir_workers or _cores()

    @cached_property
    def overlap(self) -> timedelta:
        """The time before the previous load that the next load of the open window fetches again."""
        return timedelta(seconds=self.fhir_overlap_seconds)

    def find_dagster_url(self) -> str | None:
        """Return DAGSTER_POSTGRES_URL of the environment, with DAGSTER_POSTGRES_PASSWORD; None if it is unset."""
        url = os.environ.get("DAGSTER_POSTGRES_URL")
        return _add_password(url, self.dagster_postgres_password) if url else None

    def require_broker(self) -> str:
        """Return CELERY_BROKER_URL. Raises ConfigurationError if it is unset."""
        if self.celery_broker_url is None:
            raise ConfigurationError("CELERY_BROKER_URL is not set: set the Redis of the workers, redis://host:6379/0")
        return self.celery_broker_url.get_secret_value()

    def require_source(self) -> str:
        """Return FHIR_BASE_URL. Raises ConfigurationError if it is unset."""
        if not self.fhir_base_url:
            raise ConfigurationError(
                "FHIR_BASE_URL is not set: set the base URL of a FHIR server (https://…/fhir), or with "
                "FHIR_SOURCE=ndjson a folder of NDJSON files, in the environment or in .env"
            )
        return self.fhir_base_url


def load_settings(**overrides: object) -> Settings:
    """Return the settings of the environment. Raises ConfigurationError, which names every invalid variable."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        reasons = "; ".join(
            f"{'.'.join(map(str, detail['loc'])).upper() or 'settings'}: {detail['msg'].removeprefix('Value error, ')}"
            for detail in details
        )
        raise ConfigurationError(f"Invalid settings. {reasons}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigurationError(f"The file .env in this folder cannot be read: {reason}: correct it") from None


def _add_password(url: str, password: SecretStr | None) -> str:
    """Return the URL of a database with a password, unless it has one."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if password is None or ":" in user:
        return url
    return parts._replace(netloc=f"{user if at else ''}:{quote(password.get_secret_value(), safe='')}@{host}").geturl()


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Response models of the routes of runs.py and exports.py."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RUN_EXAMPLE = "2f8c0e4e-6f0a-4a57-9d0c-3c1b6f1f7d11"


class TypeCounts(BaseModel):
    """The counts of a run for one resource type, over all of its windows. `server_total` is null if the source does
    not report a total.
    """

    model_config = ConfigDict(extra="allow")

    run_id: str = Field(examples=[RUN_EXAMPLE])
    resource_type: str = Field(examples=["Observation"])
    triggered_by: str | None = Field(None, examples=["api:nightly"])
    status: str = Field(examples=["SUCCESS"])
    windows: int
    first_window: str = Field(examples=["2024-01-05"])
    last_window: str
    server_total: int | None
    fetched: int | None
    valid: int | None
    dead: int | None
    withheld: int | None
    older: int | None = Field(None, description="Fetched resources older than FHIR_LAST_UPDATED_GTE, not kept")
    superseded: int | None = Field(
        None, description="Valid resources of which the tables have the same version or a newer one"
    )
    loaded: int | None
    seconds: float | None
    started_at: datetime
    finished_at: datetime | None
    error: str | None = Field(None, description="The reason of the failure, without patient data")
    dead_letters: dict[str, int] | None = Field(None, description="Unresolved dead letters by stage")


class RunSummary(BaseModel):
    """The counts of a run over all resource types, or for the requested type."""

    model_config = ConfigDict(extra="allow")

    run_id: str = Field(examples=[RUN_EXAMPLE])
    number: int = Field(description="An integer that stands for the id; paths take it too", examples=[42])
    triggered_by: str | None
    status: Literal["RUNNING", "SUCCESS", "FAILED"]
    windows: int
    first_window: str
    last_window: str
    fetched: int | None
    valid: int | None
    dead: int | None
    withheld: int | None
    older: int | None = Field(None, description="Fetched resources older than FHIR_LAST_UPDATED_GTE, not kept")
    superseded: int | None = Field(
        None, description="Valid resources of which the tables have the same version or a newer one"
    )
    loaded: int | None
    started_at: datetime
    finished_at: datetime | None


class RunList(BaseModel):
    """Runs, newest first."""

    runs: list[RunSummary]


class Run(BaseModel):
    """A run, with its counts by resource type. `types` is empty until the run has started."""

    run_id: str = Field(examples=[RUN_EXAMPLE])
    number: int | None = Field(description="An integer that stands for the id; null until the run has started")
    status: str | None = Field(
        description="The status in Dagster; null while Dagster is not available",
        examples=["QUEUED", "STARTED", "SUCCESS"],
    )
    error: str | None = Field(
        None, description="Why the run failed, without patient data: of a step, or of a run that never began"
    )
    dagster: str = Field(description="The URL of the run in the Dagster UI")
    types: list[TypeCounts]


class DeadLetter(BaseModel):
    """A dead letter, without its resource."""

    model_config = ConfigDict(extra="allow")

    id: int
    resource_type: str
    resource_id: str | None
    stage: str = Field(examples=["validate"])
    rule: str = Field(examples=["required-binding"])
    path: str = Field(examples=["Patient.gender"])
    message: str
    partition_key: str
    run_id: str
    status: str = Field(examples=["open"])
    occurrences: int
    attempts: int
    first_failure: datetime
    last_failure: datetime


class DeadLetterList(BaseModel):
    """Dead letters, the latest failures first."""

    dead_letters: list[DeadLetter]


class Replay(BaseModel):
    """The numbers of dead letters that are marked for the sensor, and of rows that were received again."""

    run_id: str
    marked: int
    received: int = Field(description="Rows of visit files that were received again; they are loaded as posts are")
    failed: int = Field(description="Rows of visit files that failed again")
    remaining: int = Field(description="Rows of visit files that the next request receives")
    runs: list[str] = Field(description="The ids of the runs that replay them; empty if Dagster is not available")
    sensor: str = Field(examples=["replay_dead_letters"])


class File(BaseModel):
    """A file of an export. `rows` is the number of its lines or table rows."""

    name: str
    rows: int
    bytes: int
    sha256: str


class BrokenViewFile(BaseModel):
    """A file that contains no valid ViewDefinition, and the reason. It may be of any resource type."""

    file: str
    error: str


class Exported(BaseModel):
    """The folder of an export, with its files. The folder also contains a manifest that lists them."""

    folder: str
    files: list[File]
    unreconciled: dict[str, str] = Field(
        default_factory=dict, description="Exported windows that do not reconcile, each with the reason"
    )
    broken_views: list[BrokenViewFile] = Field(
        default_factory=list, description="ViewDefinitions that are not valid, so that their tables are left out"
    )


class StartedRun(BaseModel):
    """A started run. `status` is its status in Dagster; null if the request did not wait for the run."""

    run_id: str = Field(examples=[RUN_EXAMPLE])
    status: str | None = Field(None, examples=["QUEUED", "SUCCESS", "FAILURE"])
    summary: str = Field(description="The path of the run's summary", examples=[f"/runs/{RUN_EXAMPLE}"])
    dagster: str = Field(description="The URL of the run in the Dagster UI")
    counts: list[TypeCounts] | None = Field(
        None, description="The run's counts; null if the request did not wait until the run ended"
    )


class Started(BaseModel):
    """The started runs. `run_id` is the first of `runs`. Every run loads at most 100 windows."""

    run_id: str | None = Field(description="Null if no window was due")
    runs: list[StartedRun]

"""What the routes of runs.py answer."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RUN_EXAMPLE = "2f8c0e4e-6f0a-4a57-9d0c-3c1b6f1f7d11"


class TypeCounts(BaseModel):
    """What a run did with a type, over all its windows. `server_total` is null where the source does not say."""

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
    loaded: int | None
    seconds: float | None
    started_at: datetime
    finished_at: datetime | None
    error: str | None = Field(None, description="Why it failed; never holds patient data")
    dead_letters: dict[str, int] | None = Field(None, description="Those not resolved, by stage")


class RunSummary(BaseModel):
    """A run over all its types; of one type where that was asked for."""

    model_config = ConfigDict(extra="allow")

    run_id: str = Field(examples=[RUN_EXAMPLE])
    triggered_by: str | None
    status: Literal["RUNNING", "SUCCESS", "FAILED"]
    windows: int
    first_window: str
    last_window: str
    fetched: int | None
    valid: int | None
    dead: int | None
    withheld: int | None
    loaded: int | None
    started_at: datetime
    finished_at: datetime | None


class RunList(BaseModel):
    """Runs, the newest first."""

    runs: list[RunSummary]


class Run(BaseModel):
    """A run by resource type; `types` is empty until it has begun."""

    run_id: str = Field(examples=[RUN_EXAMPLE])
    status: str | None = Field(
        description="As Dagster has it; null while Dagster cannot be asked", examples=["QUEUED", "STARTED", "SUCCESS"]
    )
    dagster: str = Field(description="Its page in the Dagster UI")
    types: list[TypeCounts]


class Letter(BaseModel):
    """A dead letter without the resource."""

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


class Letters(BaseModel):
    """Dead letters, those that failed last first."""

    dead_letters: list[Letter]


class Replay(BaseModel):
    """How many letters wait for the sensor now."""

    run_id: str
    marked: int
    sensor: str = Field(examples=["replay_dead_letters"])


class File(BaseModel):
    """A file of an export; `rows` are its lines or table rows."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Exported(BaseModel):
    """Where the files are, beside a manifest that names them."""

    folder: str
    files: list[File]


class StartedRun(BaseModel):
    """A run that was started; `status` is Dagster's, null if it was not waited for."""

    run_id: str = Field(examples=[RUN_EXAMPLE])
    status: str | None = Field(None, examples=["QUEUED", "SUCCESS", "FAILURE"])
    summary: str = Field(description="Where its summary is", examples=[f"/runs/{RUN_EXAMPLE}"])
    dagster: str = Field(description="Its page in the Dagster UI")
    counts: list[TypeCounts] | None = Field(None, description="With `wait`, once the run has ended")


class Started(BaseModel):
    """What was started: `run_id` is the first of `runs`; a range of more than 100 windows is several runs."""

    run_id: str | None = Field(description="Null if nothing was due")
    runs: list[StartedRun]

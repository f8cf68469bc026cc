"""Faults that the sandbox server makes on demand: which there are, when one strikes, and a plan of them.

A plan is deterministic: a fault strikes every Nth request of the kinds it is for, or by a seeded probability.
"""

import random
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RequestKind(StrEnum):
    """What a request to the server is, for faults and for the statistics."""

    METADATA = "metadata"
    READ = "read"
    SEARCH = "search"
    PAGE = "page"
    COUNT = "count"
    HISTORY = "history"
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    BATCH = "batch"
    KICK_OFF = "kick_off"
    POLL = "poll"
    FILE = "file"


class FaultKind(StrEnum):
    """What goes wrong."""

    THROTTLE = "throttle"
    """429 with Retry-After"""
    ERROR = "error"
    """500, or another ``status``, before anything was done"""
    RESET = "reset"
    """the connection is closed before any answer, nothing was done"""
    DROP = "drop"
    """the connection is closed in the middle of the answer; a write was done"""
    TRUNCATE = "truncate"
    """the JSON ends in its middle, and the headers agree with it"""
    HTML = "html"
    """200 with a page of HTML"""
    SLOW = "slow"
    """the answer comes ``seconds`` late"""
    EXPIRE = "expire"
    """a next link, an export or a file of one is gone: 410, or another ``status`` such as 404; a link stays gone, and
    an export too"""
    DUPLICATE = "duplicate"
    """a page begins with the last resource of the page before"""
    LOSE_PAGE = "lose_page"
    """a page is left out, and the total still counts it: a server that lies"""
    WRONG_TOTAL = "wrong_total"
    """the total, or the count of an export's first file, is off ``by`` so many"""
    MALFORMED = "malformed"
    """the manifest of an export lacks what it must have"""


_ALL = frozenset(RequestKind)
_PAGED = frozenset({RequestKind.SEARCH, RequestKind.PAGE})
_STRIKES = {
    FaultKind.EXPIRE: frozenset({RequestKind.PAGE, RequestKind.POLL, RequestKind.FILE}),
    FaultKind.MALFORMED: frozenset({RequestKind.POLL}),
    FaultKind.DUPLICATE: frozenset({RequestKind.PAGE}),
    FaultKind.LOSE_PAGE: _PAGED,
    FaultKind.WRONG_TOTAL: _PAGED | {RequestKind.COUNT, RequestKind.POLL},
}
_STATUS = {FaultKind.THROTTLE: 429, FaultKind.ERROR: 500, FaultKind.EXPIRE: 410}


class Fault(BaseModel):
    """One fault and when it strikes: every request of its kinds, unless ``every`` or ``probability`` says less."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FaultKind
    on: frozenset[RequestKind] = Field(
        default=frozenset(), description="Requests it is for; empty: all that it can hit"
    )
    every: int | None = Field(default=None, ge=1, description="Each Nth of those requests")
    probability: float | None = Field(default=None, ge=0, le=1, description="Or this share of them")
    after: int = Field(default=0, ge=0, description="The first so many go well")
    times: int | None = Field(default=None, ge=1, description="It strikes at most so often")
    status: int | None = Field(default=None, ge=400, le=599, description="Instead of the fault's usual status")
    retry_after: int | None = Field(default=None, ge=0, description="Seconds in Retry-After")
    retry_after_date: bool = Field(default=False, description="Retry-After as an HTTP date")
    seconds: float = Field(default=1.0, ge=0, description="How late a slow answer is")
    by: int = Field(default=1, description="How far off a wrong total is")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.every is not None and self.probability is not None:
            raise ValueError("`every` and `probability` exclude each other")
        if unfit := self.on - _STRIKES.get(self.kind, _ALL):
            raise ValueError(f"{self.kind} cannot strike on {', '.join(sorted(unfit))}")
        return self

    @property
    def answer_status(self) -> int:
        """The status of the answer where the fault gives one."""
        return self.status or _STATUS.get(self.kind, 200)

    def strikes(self, kind: RequestKind) -> bool:
        """Whether the fault is for requests of this kind."""
        return kind in (self.on or _STRIKES.get(self.kind, _ALL))


class FaultPlan(BaseModel):
    """The faults of a server, and the seed of those that strike by probability."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    faults: tuple[Fault, ...] = ()
    seed: int = 0


class FaultDraw:
    """A plan at work: counts requests, and says which faults strike the next one."""

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan
        self.struck = [0] * len(plan.faults)
        self._seen = [0] * len(plan.faults)
        self._random = [random.Random(f"{plan.seed}:{n}") for n in range(len(plan.faults))]

    def draw(self, kind: RequestKind) -> dict[FaultKind, Fault]:
        """The faults that strike this request."""
        drawn: dict[FaultKind, Fault] = {}
        for n, fault in enumerate(self.plan.faults):
            if not fault.strikes(kind):
                continue
            self._seen[n] += 1
            if self._due(n, fault) and fault.kind not in drawn:
                self.struck[n] += 1
                drawn[fault.kind] = fault
        return drawn

    def _due(self, n: int, fault: Fault) -> bool:
        seen = self._seen[n] - fault.after
        if seen <= 0 or (fault.times is not None and self.struck[n] >= fault.times):
            return False
        if fault.probability is not None:
            return self._random[n].random() < fault.probability
        return seen % (fault.every or 1) == 0

"""The faults that the sandbox server injects on demand: their kinds, and plans that say when they occur.

A plan is deterministic: a fault affects every Nth request of its kinds, or a share of them by a seeded probability.
"""

import random
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RequestKind(StrEnum):
    """The kinds of requests that faults and statistics distinguish."""

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
    """The kinds of faults."""

    THROTTLE = "throttle"
    """status 429 with Retry-After"""
    ERROR = "error"
    """status 500, or ``status``, before the request is executed"""
    RESET = "reset"
    """the connection is closed without a response; the request is not executed"""
    DROP = "drop"
    """the connection is closed in the middle of the response; the request is executed"""
    TRUNCATE = "truncate"
    """the response ends in the middle of the JSON, with a matching Content-Length"""
    HTML = "html"
    """status 200 with an HTML page"""
    SLOW = "slow"
    """the response is delayed by ``seconds``"""
    EXPIRE = "expire"
    """a next link, an export or one of its files has expired: status 410, or ``status``; links and exports remain
    expired"""
    DUPLICATE = "duplicate"
    """a page begins with the last resource of the previous page"""
    LOSE_PAGE = "lose_page"
    """a page is omitted, but the total includes it"""
    WRONG_TOTAL = "wrong_total"
    """the total, or the count of the first file of an export, is wrong by ``by``"""
    MALFORMED = "malformed"
    """the manifest of an export lacks required members"""


_ALL = frozenset(RequestKind)
_PAGED = frozenset({RequestKind.SEARCH, RequestKind.PAGE})
_APPLICABLE_KINDS = {
    FaultKind.EXPIRE: frozenset({RequestKind.PAGE, RequestKind.POLL, RequestKind.FILE}),
    FaultKind.MALFORMED: frozenset({RequestKind.POLL}),
    FaultKind.DUPLICATE: frozenset({RequestKind.PAGE}),
    FaultKind.LOSE_PAGE: _PAGED,
    FaultKind.WRONG_TOTAL: _PAGED | {RequestKind.COUNT, RequestKind.POLL},
}
_STATUS = {FaultKind.THROTTLE: 429, FaultKind.ERROR: 500, FaultKind.EXPIRE: 410}


class Fault(BaseModel):
    """A fault, and the requests that it affects: all requests ``on`` these kinds, or a selection of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FaultKind
    on: frozenset[RequestKind] = Field(
        default=frozenset(), description="The kinds of requests; empty means all kinds that the fault can affect"
    )
    every: int | None = Field(default=None, ge=1, description="Affects every Nth of those requests")
    probability: float | None = Field(default=None, ge=0, le=1, description="Affects this share of those requests")
    after: int = Field(default=0, ge=0, description="The number of requests that are never affected")
    times: int | None = Field(default=None, ge=1, description="The maximum number of times that it occurs")
    status: int | None = Field(
        default=None, ge=400, le=599, description="The status in place of the default of the kind"
    )
    retry_after: int | None = Field(default=None, ge=0, description="Seconds in Retry-After")
    retry_after_date: bool = Field(default=False, description="Retry-After as an HTTP date")
    seconds: float = Field(default=1.0, ge=0, description="The delay of a slow response in seconds")
    by: int = Field(default=1, description="The error of a wrong total")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.every is not None and self.probability is not None:
            raise ValueError("`every` and `probability` are mutually exclusive")
        if unfit := self.on - _APPLICABLE_KINDS.get(self.kind, _ALL):
            raise ValueError(f"{self.kind} cannot apply to {', '.join(sorted(unfit))}")
        return self

    @property
    def answer_status(self) -> int:
        """The status of the response that the fault produces."""
        return self.status or _STATUS.get(self.kind, 200)

    def applies_to(self, kind: RequestKind) -> bool:
        """Return whether the fault applies to requests of this kind."""
        return kind in (self.on or _APPLICABLE_KINDS.get(self.kind, _ALL))


class FaultPlan(BaseModel):
    """The faults of a server, and the seed of those with a probability."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    faults: tuple[Fault, ...] = ()
    seed: int = 0


class FaultDraw:
    """The state of a running plan: counts requests and selects the faults of the next one."""

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan
        self.struck = [0] * len(plan.faults)
        self._seen = [0] * len(plan.faults)
        self._random = [random.Random(f"{plan.seed}:{n}") for n in range(len(plan.faults))]

    def draw(self, kind: RequestKind) -> dict[FaultKind, Fault]:
        """Return the faults that affect this request."""
        drawn: dict[FaultKind, Fault] = {}
        for n, fault in enumerate(self.plan.faults):
            if not fault.applies_to(kind):
                continue
            self._seen[n] += 1
            if self._is_due(n, fault) and fault.kind not in drawn:
                self.struck[n] += 1
                drawn[fault.kind] = fault
        return drawn

    def _is_due(self, n: int, fault: Fault) -> bool:
        seen = self._seen[n] - fault.after
        if seen <= 0 or (fault.times is not None and self.struck[n] >= fault.times):
            return False
        if fault.probability is not None:
            return self._random[n].random() < fault.probability
        return seen % (fault.every or 1) == 0

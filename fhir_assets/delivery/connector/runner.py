"""The connector at work: one thread claims and settles, several deliver, one listens.

Only the first talks to the outbox, in batches, and it never waits for the FHIR server: a slow or failing patient
holds one worker, nobody else. What is under way is bounded, whatever waits in the outbox.
"""

import logging
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import psycopg

from fhir_assets.delivery.connector import outbox, settle
from fhir_assets.delivery.connector.delivery import Delivery
from fhir_assets.delivery.connector.mapping import Source
from fhir_assets.delivery.connector.outbox import Change, Claim, Connect
from fhir_assets.delivery.connector.server import Lasting, Passing
from fhir_assets.delivery.connector.settle import Acknowledged, Refused
from fhir_assets.errors import DatabaseUnavailable, FhirAssetsError
from fhir_assets.metrics import connector as metrics
from fhir_assets.retries import RetryPolicy
from fhir_assets.warehouse.postgres.db.connections import Connection

_JOBS_A_WORKER = 16
_SETTLE_SECONDS = 0.02
_DEFERRED = timedelta(milliseconds=25)
_CONTESTED = timedelta(milliseconds=250)
_LONGEST_PAUSE = 5.0
_PRUNE_SECONDS = 60.0
_RECONNECT = RetryPolicy(first_wait=0.2, max_wait=10)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How a connector works: see the settings CONNECTOR_*. Times in seconds."""

    workers: int = 4
    poll: float = 5
    policy: RetryPolicy = field(default_factory=lambda: RetryPolicy(attempts=20, first_wait=0.5, max_wait=300))
    keep: timedelta = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class _Failed:
    change: Change
    failure: Passing


_Result = Acknowledged | Refused | _Failed


class Connector:
    """Delivers the outbox until it is told to ``stop``; from any thread, or a signal handler."""

    def __init__(self, connect: Connect, sources: dict[str, Source], delivery: Delivery, pace: Pace) -> None:
        self._connect = connect
        self._sources = sources
        self._delivery = delivery
        self._pace = pace
        self._jobs: queue.SimpleQueue[Change | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[_Result | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        for name in sources:
            metrics.start_series(name)

    def stop(self) -> None:
        """Claim nothing more, let what is under way end, then return from ``run``."""
        self._stopping.set()
        self._inbox.put(None)

    def run(self, *, until_empty: bool = False) -> None:
        """Deliver until ``stop``, or until nothing waits. A database that goes away is waited for.

        Raises ConfigurationError if there is no outbox, or no right to it.
        """
        workers = [
            threading.Thread(target=self._work, name=f"connector-{n}", daemon=True) for n in range(self._pace.workers)
        ]
        for worker in workers:
            worker.start()
        listener = threading.Thread(target=self._listen, name="connector-listener", daemon=True)
        listener.start()
        lost = 0
        try:
            while not self._stopping.is_set():
                session = None
                try:
                    with self._connect() as conn:
                        conn.autocommit = True
                        session = _Session(conn, self)
                        session.run(until_empty=until_empty)
                        return
                except (psycopg.OperationalError, DatabaseUnavailable) as error:
                    lost = 1 if session and session.settled else lost + 1
                    wait = _RECONNECT.wait_seconds(lost)
                    _log.warning(
                        "the database is gone: waiting for it", extra={"seconds": round(wait, 1)}, exc_info=error
                    )
                    if session:
                        session.abandon()
                    self._stopping.wait(wait)
        finally:
            self._stopping.set()
            for _ in workers:
                self._jobs.put(None)
            for thread in (*workers, listener):
                thread.join()

    def _work(self) -> None:
        while (change := self._jobs.get()) is not None:
            self._inbox.put(self._attempt(change))

    def _attempt(self, change: Change) -> _Result:
        if self._stopping.is_set():
            return _Failed(change, Passing("stopped", "the connector stops", everyone=True))
        try:
            return self._delivery.deliver(change)
        except Passing as failure:
            if failure.everyone or change.claim.attempts < self._pace.policy.attempts:
                return _Failed(change, failure)
            message = f"{failure}, {change.claim.attempts} times"
            status = int(failure.code) if failure.code.isdecimal() else None
            return Refused(change, "attempts-used-up", message, status)
        except Lasting as failure:
            return Refused(change, failure.reason, str(failure), failure.status)
        except Exception as error:
            _log.error("a defect in the connector", exc_info=error, extra={"source": change.claim.source})
            message = f"the connector failed on this row ({type(error).__name__}): its log says where"
            return Refused(change, "defect", message, None)

    def _listen(self) -> None:
        """Wake the session at every notification. Whatever is missed, the slow poll finds."""
        while not self._stopping.is_set():
            with suppress(psycopg.Error, FhirAssetsError):
                with self._connect() as conn:
                    conn.autocommit = True
                    outbox.listen(conn)
                    self._inbox.put(None)
                    while not self._stopping.is_set():
                        for _ in conn.notifies(timeout=1, stop_after=1):
                            self._inbox.put(None)
            self._stopping.wait(1)


class _Session:
    """What a connector does on one connection to the database: its claims live and die with that."""

    def __init__(self, conn: Connection, connector: Connector) -> None:
        self._conn = conn
        self._connector = connector
        self._pace = connector._pace
        self._sources = connector._sources
        self._under_way = 0
        self._locked: Counter[int] = Counter()
        self._failures = 0
        self._paused_until = 0.0
        self._poll_at = 0.0
        self._prune_at = time.monotonic() + random.random() * _PRUNE_SECONDS
        self._more = True
        self.settled = 0

    def run(self, *, until_empty: bool) -> None:
        self._number = outbox.enlist(self._conn)
        for source in self._sources.values():
            outbox.key_type(self._conn, source)
        _log.info("connector started", extra={"connector": self._number, "workers": self._pace.workers})
        stopping = self._connector._stopping
        while not stopping.is_set() or self._under_way:
            if not stopping.is_set():
                self._care()
                self._claim()
                if until_empty and not self._under_way and outbox.status(self._conn).unprocessed == 0:
                    break
            self._settle(self._collect())
        _log.info("connector stopped", extra={"connector": self._number, "records": self.settled})

    def abandon(self) -> None:
        """Wait for what is under way without settling it: the next session tries it again."""
        while self._under_way:
            if self._connector._inbox.get() is not None:
                self._under_way -= 1

    def _care(self) -> None:
        now = time.monotonic()
        if now >= self._poll_at:
            self._poll_at = now + self._pace.poll
            self._more = True
            if orphans := outbox.release_orphans(self._conn):
                _log.warning("took over from a connector that is gone", extra={"records": orphans})
        if now >= self._prune_at:
            self._prune_at = now + _PRUNE_SECONDS
            settle.prune(self._conn, self._pace.keep)

    def _claim(self) -> None:
        room = self._pace.workers * _JOBS_A_WORKER - self._under_way
        if not self._more or room < self._pace.workers * _JOBS_A_WORKER // 2 or time.monotonic() < self._paused_until:
            return
        claims = outbox.claim(self._conn, self._number, list(self._sources), room)
        self._more = len(claims) > 0
        for name, source in self._sources.items():
            if mine := [claim for claim in claims if claim.source == name]:
                self._begin(source, mine)
        if not claims and (wait := outbox.seconds_to_next(self._conn)) is not None:
            # Something may have become due since the claim, but belong to a record that is under way.
            self._poll_at = min(self._poll_at, time.monotonic() + max(wait, 0.02 if self._under_way else 0.1))

    def _begin(self, source: Source, claims: Sequence[Claim]) -> None:
        """Lock the identifiers, read the rows, and hand them to the workers; what collides is deferred."""
        locks = outbox.lock_identifiers(self._conn, source, claims)
        free: list[Claim] = []
        collided: list[Claim] = []
        for claim in claims:
            wanted = locks[claim.record_id]
            if all(wanted.values()) and not any(self._locked[lock] for lock in wanted):
                self._locked.update(wanted.keys())
                free.append(claim)
            else:
                outbox.unlock(self._conn, [lock for lock, granted in wanted.items() if granted])
                collided.append(claim)
        contested: list[Claim] = []
        changes = outbox.read(self._conn, source, free) if free else {}
        for claim in free:
            held = frozenset(locks[claim.record_id])
            change, lock = changes[claim.record_id]
            if lock is not None and lock not in held:
                collided.append(claim)
            elif change.contested and change.delivered is None:
                contested.append(claim)
            else:
                self._under_way += 1
                self._connector._jobs.put(replace(change, locks=held))
                continue
            self._unlock(list(held))
        if collided:
            settle.defer(self._conn, collided, _DEFERRED)
        if contested:
            settle.defer(self._conn, contested, _CONTESTED)

    def _collect(self) -> list[_Result]:
        """The results that are there, waiting for the first; a moment longer where more are sure to follow."""
        inbox = self._connector._inbox
        wait = max(0.0, min(self._poll_at, self._prune_at) - time.monotonic())
        pause = self._paused_until - time.monotonic()
        if pause > 0:
            wait = min(wait, pause)
        results: list[_Result] = []
        until = time.monotonic() + wait
        while True:
            try:
                result = inbox.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return results
            if result is None:
                self._more = True
                if not results:
                    until = time.monotonic()
            else:
                if not results:
                    until = time.monotonic() + (_SETTLE_SECONDS if self._under_way > self._pace.workers else 0)
                self._under_way -= 1
                results.append(result)

    def _settle(self, results: Sequence[_Result]) -> None:
        if not results:
            return
        done = [r for r in results if isinstance(r, Acknowledged)]
        refused = [r for r in results if isinstance(r, Refused)]
        failed = [r for r in results if isinstance(r, _Failed)]
        with self._conn.pipeline(), self._conn.transaction():
            if done:
                settle.acknowledge(self._conn, done)
            if refused:
                settle.bury(self._conn, refused)
            if stopped := [f.change.claim for f in failed if f.failure.code == "stopped"]:
                settle.defer(self._conn, stopped, timedelta(0))
            if waits := [(f.change, self._wait(f)) for f in failed if f.failure.code != "stopped"]:
                settle.retry(self._conn, waits)
        self._unlock([lock for result in results for lock in result.change.locks])
        self.settled += len(done)
        self._more = True
        self._throttle(done, failed)
        self._report(done, refused, failed)

    def _unlock(self, locks: Sequence[int]) -> None:
        self._locked -= Counter(locks)
        outbox.unlock(self._conn, locks)

    def _wait(self, failed: _Failed) -> float:
        failures = min(failed.change.claim.attempts, 30)
        return self._pace.policy.wait_seconds(failures, failed.failure.retry_after)

    def _throttle(self, done: Sequence[Acknowledged], failed: Sequence[_Failed]) -> None:
        """While the server fails for everyone, little is claimed: the backlog needs no attempts to be counted."""
        if done:
            self._failures = 0
            return
        self._failures += sum(f.failure.everyone for f in failed)
        if self._failures >= 2 * self._pace.workers:
            exponent = min(self._failures // (2 * self._pace.workers), 8)
            pause = min(_LONGEST_PAUSE, 0.05 * 2.0**exponent)
            self._paused_until = time.monotonic() + pause

    def _report(self, done: Sequence[Acknowledged], refused: Sequence[Refused], failed: Sequence[_Failed]) -> None:
        now = datetime.now(UTC)
        for each in done:
            source = each.change.claim.source
            metrics.PROCESSED.labels(source=source, outcome=each.outcome).inc(len(each.change.event_ids))
            metrics.DELIVERY.labels(source=source).observe((now - each.change.first_change_at).total_seconds())
            _log.debug(
                "delivered",
                extra={"source": source, "txid": each.change.txids, "outcome": each.outcome,
                       "attempts": each.change.claim.attempts},
            )  # fmt: skip
        for dead in refused:
            claim = dead.change.claim
            metrics.FAILED.labels(source=claim.source, fate="dead", reason=dead.reason).inc()
            _log.warning(
                "moved to the dead letters: see `fhir-assets connector dlq list`",
                extra={"source": claim.source, "txid": dead.change.txids, "reason": dead.reason,
                       "status": dead.http_status, "attempts": claim.attempts},
            )  # fmt: skip
        for reason, count in Counter(f.failure.code for f in failed).items():
            if reason != "stopped":
                metrics.FAILED.labels(source=failed[0].change.claim.source, fate="retry", reason=reason).inc(count)
                _log.warning("will be tried again", extra={"reason": reason, "records": count})

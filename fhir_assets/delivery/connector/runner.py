"""Runs a connector: one thread claims changes and records results, several deliver, one listens for notifications.

Only the first thread uses the outbox, in batches, and it never waits for the FHIR server: a slow or failing record
occupies one worker and delays no other record. The number of changes in progress is limited.
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

from fhir_assets.delivery.connector import changes, outbox, outcomes
from fhir_assets.delivery.connector.changes import Change
from fhir_assets.delivery.connector.delivery import Delivery
from fhir_assets.delivery.connector.mapping import Source
from fhir_assets.delivery.connector.outbox import Claim
from fhir_assets.delivery.connector.outcomes import Acknowledged, Refused
from fhir_assets.delivery.connector.server import PermanentFailure, TransientFailure
from fhir_assets.errors import DatabaseUnavailable, FhirAssetsError
from fhir_assets.metrics import connector as metrics
from fhir_assets.retries import RetryPolicy
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession

_JOBS_PER_WORKER = 16
_COLLECT_SECONDS = 0.02
_COLLISION_WAIT = timedelta(milliseconds=25)
_CONTESTED_WAIT = timedelta(milliseconds=250)
_MAX_PAUSE_SECONDS = 5.0
_PRUNE_SECONDS = 60.0
_RECONNECT = RetryPolicy(first_wait=0.2, max_wait=10)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """The options of a connector. ``poll`` is in seconds; processed events are deleted after ``keep``."""

    workers: int = 4
    poll: float = 5
    policy: RetryPolicy = field(default_factory=lambda: RetryPolicy(attempts=20, first_wait=0.5, max_wait=300))
    keep: timedelta = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class _Failed:
    change: Change
    failure: TransientFailure


_Result = Acknowledged | Refused | _Failed


@dataclass(frozen=True, slots=True)
class _Channels:
    """The state that the threads of a connector share: changes to deliver, results to record, and the stop request.

    None in ``changes`` ends a worker; None in ``results`` wakes the settling thread.
    """

    changes: queue.SimpleQueue[Change | None] = field(default_factory=queue.SimpleQueue)
    results: queue.SimpleQueue[_Result | None] = field(default_factory=queue.SimpleQueue)
    stopping: threading.Event = field(default_factory=threading.Event)


class Connector:
    """Delivers the outbox until ``stop`` is called, from any thread or a signal handler."""

    def __init__(
        self, connect: OpenSession, sources: dict[str, Source], delivery: Delivery, options: RunnerOptions
    ) -> None:
        self._connect = connect
        self._sources = sources
        self._delivery = delivery
        self._options = options
        self._channels = _Channels()
        self._limited_failures: Counter[tuple[str, str]] = Counter()
        for name in sources:
            metrics.start_series(name)

    def stop(self) -> None:
        """Claim no more changes, finish those in progress, then let ``run`` return."""
        self._channels.stopping.set()
        self._channels.results.put(None)

    def run(self, *, until_empty: bool = False) -> None:
        """Deliver until ``stop`` is called, or with ``until_empty`` until no change waits.

        Reconnects if the database becomes unavailable. Raises ConfigurationError if the outbox does not exist or the
        user lacks a privilege on it.
        """
        threads = [
            threading.Thread(target=self._work, name=f"connector-{n}", daemon=True)
            for n in range(self._options.workers)
        ]
        if not until_empty:
            # Without a listener, the due times of the waiting events determine when to claim.
            threads.append(threading.Thread(target=self._listen, name="connector-listener", daemon=True))
        for thread in threads:
            thread.start()
        lost = 0
        try:
            while not self._channels.stopping.is_set():
                session = None
                try:
                    with self._connect() as conn:
                        conn.autocommit = True
                        session = _Session(conn, self._sources, self._delivery, self._options, self._channels)
                        session.run(until_empty=until_empty)
                        return
                except (psycopg.OperationalError, DatabaseUnavailable) as error:
                    lost = 1 if session and session.delivered_count else lost + 1
                    wait = _RECONNECT.wait_seconds(lost)
                    _log.warning(
                        "the connection to the database was lost: reconnecting",
                        extra={"seconds": round(wait, 1)},
                        exc_info=error,
                    )
                    if session:
                        session.abandon()
                    self._channels.stopping.wait(wait)
        finally:
            self._channels.stopping.set()
            for _ in range(self._options.workers):
                self._channels.changes.put(None)
            for thread in threads:
                thread.join()

    def _work(self) -> None:
        while (change := self._channels.changes.get()) is not None:
            self._channels.results.put(self._attempt(change))

    def _attempt(self, change: Change) -> _Result:
        if self._channels.stopping.is_set():
            return _Failed(change, TransientFailure("stopped", "the connector is stopping", server_wide=True))
        try:
            acknowledged = self._delivery.deliver(change)
        except TransientFailure as failure:
            if failure.server_wide or not self._is_last(change, failure):
                return _Failed(change, failure)
            reason = "attempts-used-up" if failure.attempts is None else failure.code
            return Refused(change, reason, f"{failure} ({change.claim.attempts} attempts)", failure.status)
        except PermanentFailure as failure:
            return Refused(change, failure.reason, str(failure), failure.status)
        except Exception as error:
            _log.error("unexpected error in the connector", exc_info=error, extra={"source": change.claim.source})
            message = (
                f"an unexpected error ({type(error).__name__}) occurred with this row: see the log of the connector"
            )
            return Refused(change, "defect", message, None)
        self._limited_failures.pop((change.claim.source, change.claim.record_id), None)
        resource = acknowledged.delivered or change.delivered
        _log.info(
            "delivered",
            extra={"worker_id": threading.current_thread().name, "source": change.claim.source, "txid": change.txids,
                   "fhirId": resource.resource_id if resource else None, "outcome": acknowledged.outcome,
                   "attempts": change.claim.attempts},
        )  # fmt: skip
        return acknowledged

    def _is_last(self, change: Change, failure: TransientFailure) -> bool:
        """Return whether a change has used up its attempts.

        Failures with a limit of their own are counted apart, because the other attempts may have met an unavailable
        server. They are counted in this process only.
        """
        record = (change.claim.source, change.claim.record_id)
        if failure.attempts is not None:
            self._limited_failures[record] += 1
        last = change.claim.attempts >= self._options.policy.attempts
        last |= failure.attempts is not None and self._limited_failures[record] >= failure.attempts
        if last:
            self._limited_failures.pop(record, None)
        return last

    def _listen(self) -> None:
        """Wake the session at every notification. Polling finds changes whose notification was missed."""
        while not self._channels.stopping.is_set():
            with suppress(psycopg.Error, FhirAssetsError):
                with self._connect() as conn:
                    conn.autocommit = True
                    outbox.listen(conn)
                    self._channels.results.put(None)
                    while not self._channels.stopping.is_set():
                        for _ in conn.notifies(timeout=1, stop_after=1):
                            self._channels.results.put(None)
            self._channels.stopping.wait(1)


class _Session:
    """Claims and records changes over one database connection, which holds the locks of the claims."""

    def __init__(
        self,
        conn: Connection,
        sources: dict[str, Source],
        delivery: Delivery,
        options: RunnerOptions,
        channels: _Channels,
    ) -> None:
        self._conn = conn
        self._sources = sources
        self._delivery = delivery
        self._options = options
        self._channels = channels
        self._in_progress = 0
        self._locked: Counter[int] = Counter()
        self._failures = 0
        self._paused_until = 0.0
        self._poll_at = 0.0
        self._prune_at = time.monotonic() + random.random() * _PRUNE_SECONDS
        self._more = True
        self.delivered_count = 0

    def run(self, *, until_empty: bool) -> None:
        self._number = outbox.register_connector(self._conn)
        for source in self._sources.values():
            outbox.read_key_type(self._conn, source)
        _log.info("connector started", extra={"connector": self._number, "workers": self._options.workers})
        stopping = self._channels.stopping
        while not stopping.is_set() or self._in_progress:
            if not stopping.is_set():
                self._poll_and_prune()
                self._claim()
                if until_empty and not self._in_progress and outbox.read_status(self._conn).unprocessed == 0:
                    break
            self._record_outcomes(self._collect())
        _log.info("connector stopped", extra={"connector": self._number, "records": self.delivered_count})

    def abandon(self) -> None:
        """Wait for the changes in progress without recording their outcomes. The next session delivers them again."""
        while self._in_progress:
            if self._channels.results.get() is not None:
                self._in_progress -= 1

    def _poll_and_prune(self) -> None:
        now = time.monotonic()
        if now >= self._poll_at:
            self._poll_at = now + self._options.poll
            self._more = True
            if orphans := outbox.release_orphans(self._conn):
                _log.warning("released the claims of a connector that has ended", extra={"records": orphans})
        if now >= self._prune_at:
            self._prune_at = now + _PRUNE_SECONDS
            outcomes.prune(self._conn, self._options.keep)

    def _claim(self) -> None:
        room = self._options.workers * _JOBS_PER_WORKER - self._in_progress
        if (
            not self._more
            or room < self._options.workers * _JOBS_PER_WORKER // 2
            or time.monotonic() < self._paused_until
        ):
            return
        claims = outbox.claim(self._conn, self._number, list(self._sources), room)
        self._more = len(claims) > 0
        for name, source in self._sources.items():
            if claims_of_source := [claim for claim in claims if claim.source == name]:
                self._begin(source, claims_of_source)
        if not claims and (wait := outbox.read_seconds_to_next_event(self._conn)) is not None:
            # The next event may be due already, but belong to a record that is in progress.
            self._poll_at = min(self._poll_at, time.monotonic() + max(wait, 0.02 if self._in_progress else 0.1))

    def _begin(self, source: Source, claims: Sequence[Claim]) -> None:
        """Lock the identifiers, read the rows and pass them to the workers. Records that collide are deferred."""
        locks = outbox.lock_identifiers(self._conn, source, claims)
        free: list[Claim] = []
        collided: list[Claim] = []
        for claim in claims:
            wanted = locks[claim.record_id]
            if all(wanted.values()) and not any(self._locked[lock] for lock in wanted):
                self._locked.update(wanted.keys())
                free.append(claim)
            else:
                outbox.unlock_identifiers(self._conn, [lock for lock, granted in wanted.items() if granted])
                collided.append(claim)
        contested: list[Claim] = []
        started: list[Change] = []
        read = changes.read_changes(self._conn, source, free) if free else {}
        for claim in free:
            held = frozenset(locks[claim.record_id])
            change, lock = read[claim.record_id]
            if lock is not None and lock not in held:
                collided.append(claim)
            elif change.contested and change.delivered is None:
                contested.append(claim)
            else:
                started.append(self._delivery.prepare(replace(change, locks=held)))
                continue
            self._unlock(list(held))
        self._start(started)
        if collided:
            outcomes.defer(self._conn, collided, _COLLISION_WAIT)
        if contested:
            outcomes.defer(self._conn, contested, _CONTESTED_WAIT)

    def _start(self, started: Sequence[Change]) -> None:
        """Record what is about to be sent, and pass the changes to the workers.

        A connector that is killed between the request and its answer thus leaves a record of the resource behind.
        """
        if any(change.outgoing is not None for change in started):
            outcomes.record_sent(self._conn, started)
        for change in started:
            self._in_progress += 1
            self._channels.changes.put(change)

    def _collect(self) -> list[_Result]:
        """Return the available results. Wait for the first, and briefly for more while many are in progress."""
        incoming = self._channels.results
        wait = max(0.0, min(self._poll_at, self._prune_at) - time.monotonic())
        pause = self._paused_until - time.monotonic()
        if pause > 0:
            wait = min(wait, pause)
        results: list[_Result] = []
        until = time.monotonic() + wait
        while True:
            try:
                result = incoming.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return results
            if result is None:
                self._more = True
                if not results:
                    until = time.monotonic()
            else:
                if not results:
                    until = time.monotonic() + (_COLLECT_SECONDS if self._in_progress > self._options.workers else 0)
                self._in_progress -= 1
                results.append(result)

    def _record_outcomes(self, results: Sequence[_Result]) -> None:
        if not results:
            return
        done = [r for r in results if isinstance(r, Acknowledged)]
        refused = [r for r in results if isinstance(r, Refused)]
        failed = [r for r in results if isinstance(r, _Failed)]
        with self._conn.pipeline(), self._conn.transaction():
            if done:
                outcomes.acknowledge(self._conn, done)
            if refused:
                outcomes.record_dead_letters(self._conn, refused)
            if stopped := [f.change.claim for f in failed if f.failure.code == "stopped"]:
                outcomes.defer(self._conn, stopped, timedelta(0))
            if unacknowledged := [r.change for r in refused] + [f.change for f in failed]:
                outcomes.forget_unsent(self._conn, unacknowledged)
            if waits := [(f.change, self._wait(f)) for f in failed if f.failure.code != "stopped"]:
                outcomes.retry(self._conn, waits)
        self._unlock([lock for result in results for lock in result.change.locks])
        self.delivered_count += len(done)
        self._more = True
        self._throttle(done, failed)
        self._report(done, refused, failed)

    def _unlock(self, locks: Sequence[int]) -> None:
        self._locked -= Counter(locks)
        outbox.unlock_identifiers(self._conn, locks)

    def _wait(self, failed: _Failed) -> float:
        failures = min(failed.change.claim.attempts, 30)
        return self._options.policy.wait_seconds(failures, failed.failure.retry_after)

    def _throttle(self, done: Sequence[Acknowledged], failed: Sequence[_Failed]) -> None:
        """Pause claiming while the server fails for all records, so that waiting changes use up no attempts."""
        if done:
            self._failures = 0
            return
        self._failures += sum(f.failure.server_wide for f in failed)
        if self._failures >= 2 * self._options.workers:
            exponent = min(self._failures // (2 * self._options.workers), 8)
            pause = min(_MAX_PAUSE_SECONDS, 0.05 * 2.0**exponent)
            self._paused_until = time.monotonic() + pause

    def _report(self, done: Sequence[Acknowledged], refused: Sequence[Refused], failed: Sequence[_Failed]) -> None:
        now = datetime.now(UTC)
        for acknowledged in done:
            change = acknowledged.change
            source = change.claim.source
            metrics.PROCESSED.labels(source=source, outcome=acknowledged.outcome).inc(len(change.event_ids))
            metrics.DELIVERY.labels(source=source).observe((now - change.first_change_at).total_seconds())
        for dead in refused:
            claim = dead.change.claim
            metrics.FAILED.labels(source=claim.source, fate="dead", reason=dead.reason).inc()
            _log.warning(
                "change recorded as a dead letter: see `fhir-assets connector dlq list`",
                extra={"source": claim.source, "txid": dead.change.txids, "reason": dead.reason,
                       "status": dead.http_status, "attempts": claim.attempts},
            )  # fmt: skip
        for reason, count in Counter(f.failure.code for f in failed).items():
            if reason != "stopped":
                metrics.FAILED.labels(source=failed[0].change.claim.source, fate="retry", reason=reason).inc(count)
                _log.warning("changes will be retried", extra={"reason": reason, "records": count})

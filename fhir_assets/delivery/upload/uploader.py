"""Sends resources to a FHIR server in batches, type by type, and reads the result of each entry from the response.

Entries that may succeed later are held and retried: those that refer to resources that are uploaded later, and those
that failed with a transient error. Entries whose references form cycles are first sent without the circular
references.
"""

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, groupby, islice
from typing import Protocol, TypeVar

from fhir_assets.delivery.upload.journal import BatchKey, BatchResult, HeldEntry, Journal
from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir import bundles
from fhir_assets.fhir.bundles import BundleEntry, EntryResponse, EntryResult
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import FhirResponse, invalid_json_failure
from fhir_assets.retries import RetryPolicy, TransientFailure

T = TypeVar("T")

ENTRY_RETRIES = RetryPolicy(attempts=4, first_wait=0.25, max_wait=8)
"""Retries of entries with a transient error in the response to a batch. Entries that still fail are held."""

HALF_RETRIES = RetryPolicy(attempts=2, first_wait=0.5)
"""Retries of the halves of a batch that an available server failed to process."""

_FEWER_ATTEMPTS = {0: 1, 409: 2, 412: 2}
_BATCH_REFUSED = frozenset({400, 409, 410, 412, 413, 422})

ReadEntries = Callable[[str, str], Iterable[BundleEntry]]
"""Takes a file and a resource type, and returns the file's entries of that type."""


class Listener(Protocol):
    """Receives the progress of an upload. Its methods are called by one thread."""

    def on_step(self, resource_type: str, files: Mapping[str, int]) -> None:
        """Called when the upload of a type begins. ``files`` has the number of its resources by file."""
        ...

    def on_batch(self, key: BatchKey, done: BatchResult, size: int) -> None:
        """Called when the results of a batch are committed, or were committed by an earlier attempt."""
        ...

    def on_retry(self, description: str, count: int) -> None:
        """Called when ``count`` entries are retried. ``description`` names them."""
        ...


class NullListener:
    """A listener that ignores all progress."""

    def on_step(self, resource_type: str, files: Mapping[str, int]) -> None:
        """Ignore the beginning of a type."""

    def on_batch(self, key: BatchKey, done: BatchResult, size: int) -> None:
        """Ignore the results of a batch."""

    def on_retry(self, description: str, count: int) -> None:
        """Ignore a retry."""


@dataclass
class Uploader:
    """Uploads to one server.

    Up to ``workers`` batches of a type are sent concurrently; the next type begins when the previous one is complete. A
    lane is a worker with a queue: all lines of a resource use the same lane, so that the last line wins. An upload
    continues from the state of its journal.
    """

    client: FhirClient
    journal: Journal
    listener: Listener = field(default_factory=NullListener)
    batch_size: int = 100
    workers: int = 4
    transaction: bool = False
    skip_unchanged: bool = False
    stop: threading.Event = field(default_factory=threading.Event)

    def upload(self, steps: Mapping[str, Mapping[str, int]], read: ReadEntries) -> None:
        """Send all resources. ``steps`` has, by type in load order, the number of resources by file.

        Raises ServerUnavailable, ServerRefused or NotFhir if the server does not accept the upload as a whole. The
        journal then contains the results so far.
        """
        self._types = frozenset(steps)
        self._numbers = count(self.journal.next_number())
        with ExitStack() as stack:
            self._lanes = [stack.enter_context(ThreadPoolExecutor(1, f"upload-{n}")) for n in range(self.workers)]
            self._in_flight: dict[Future[BatchResult], tuple[BatchKey, int]] = {}
            try:
                for name, files in steps.items():
                    self.listener.on_step(name, files)
                    for file in files:
                        self._send_file(name, file, read(file, name))
                    self._await_all()
                    self._retry(name)
                self._retry()
                if self.journal.find_circular_references():
                    self._send_without_circular_references()
                    self._retry()
                self.journal.fail_held()
            except BaseException:
                self.stop.set()
                self._commit_finished()
                raise

    def _send_file(self, resource_type: str, file: str, entries: Iterable[BundleEntry]) -> None:
        waiting: list[dict[str, BundleEntry]] = [{} for _ in self._lanes]
        numbers = [0] * len(self._lanes)

        def send(lane: int) -> None:
            key = BatchKey(resource_type, file, lane, numbers[lane])
            batch = list(waiting[lane].values())
            numbers[lane] += 1
            waiting[lane] = {}
            if self.journal.is_done(key):
                self.listener.on_batch(key, BatchResult(), len(batch))
            else:
                self._submit(key, len(batch), partial(self._deliver, batch))

        for entry in entries:
            lane = zlib.crc32(entry.id.encode()) % len(self._lanes)
            if entry.id in waiting[lane]:
                send(lane)
            waiting[lane][entry.id] = entry
            if len(waiting[lane]) >= self.batch_size:
                send(lane)
        for lane, rest in enumerate(waiting):
            if rest:
                send(lane)

    def _submit(self, key: BatchKey, size: int, deliver: Callable[[], BatchResult]) -> None:
        while len(self._in_flight) >= 2 * self.workers:
            self._commit(wait(self._in_flight, return_when=FIRST_COMPLETED).done)
        self._in_flight[self._lanes[key.lane].submit(deliver)] = key, size

    def _await_all(self) -> None:
        while self._in_flight:
            self._commit(wait(self._in_flight, return_when=FIRST_COMPLETED).done)

    def _commit(self, finished: Set["Future[BatchResult]"]) -> None:
        for future in self._in_order(finished):
            key, size = self._in_flight.pop(future)
            done = future.result()
            self.journal.commit(key, done)
            self.listener.on_batch(key, done, size)

    def _commit_finished(self) -> None:
        """Commit the results of finished batches after an error, so that the next attempt does not send them again."""
        for future in list(self._in_flight):
            future.cancel()
        for future in self._in_order(wait(self._in_flight).done):
            if not future.cancelled() and future.exception() is None:
                self.journal.commit(self._in_flight[future][0], future.result())

    def _in_order(self, finished: Set["Future[BatchResult]"]) -> list["Future[BatchResult]"]:
        """Return the finished batches in the order of sending: an older line is committed before a newer one."""
        return [future for future in self._in_flight if future in finished]

    def _retry(self, own_type_of: str | None = None) -> None:
        """Retry held entries until their number stays the same.

        With ``own_type_of``, only the entries of that type that refer to their own type are retried.
        """
        while waiting := self.journal.held_count(own_type_of=own_type_of):
            self.listener.on_retry(own_type_of or "all types", waiting)
            chunks = _chunks_of_a_type(self.journal.held_entries(own_type_of=own_type_of), self.batch_size)
            for name, held in chunks:
                number = next(self._numbers)
                key = BatchKey(name, "", number % self.workers, number)
                self._submit(key, len(held), partial(self._deliver_held, held))
            self._await_all()
            if self.journal.held_count(own_type_of=own_type_of) == waiting:
                return

    def _deliver_held(self, held: Sequence[HeldEntry]) -> BatchResult:
        """Deliver held entries. An entry that its first pass created counts as created, not as updated."""
        done = self._deliver([entry.entry for entry in held], held=True)
        first_created = {entry.entry.url for entry in held if entry.first_pass == 201}
        created = sum(entry.url in first_created for entry in done.acknowledged)
        done.created, done.updated = done.created + created, done.updated - created
        return done

    def _send_without_circular_references(self) -> None:
        """Send the entries of cycles without their circular references."""
        self.listener.on_retry("circular references, first pass", self.journal.find_circular_references())
        for chunk in _chunks(self.journal.circular_entries(), self.batch_size):
            reduced = [
                BundleEntry(
                    held.entry.resource_type, held.entry.id, bundles.remove_references(held.entry.body, targets)
                )
                for held, targets in chunk
            ]
            results = self._send(reduced)
            self.journal.record_first_pass(
                (held, result) for (held, _), result in zip(chunk, results, strict=True) if result.accepted
            )

    def _deliver(self, batch: Sequence[BundleEntry], *, held: bool = False) -> BatchResult:
        """Send a batch, with retries, until each entry is accepted, refused or held."""
        started = time.perf_counter()
        done = BatchResult()
        pending = self._select_changed(batch, done) if self.skip_unchanged else list(batch)
        tried = 0
        while pending and not self.stop.is_set():
            retried: list[BundleEntry] = []
            tried += 1
            for entry, result in zip(pending, self._send(pending), strict=True):
                if result.accepted:
                    done.created += result.status == 201
                    done.updated += result.status != 201
                    done.acknowledged.append(entry)
                elif result.retryable and tried < _FEWER_ATTEMPTS.get(result.status, ENTRY_RETRIES.attempts):
                    retried.append(entry)
                elif held or result.retryable or self._may_wait_for_others(entry):
                    done.held.append((entry, result))
                else:
                    done.failed.append((entry, result))
            if retried:
                self.stop.wait(ENTRY_RETRIES.wait_seconds(tried))
            pending = retried
        if pending:
            raise ServerUnavailable("the upload was interrupted")
        done.seconds = time.perf_counter() - started
        return done

    def _may_wait_for_others(self, entry: BundleEntry) -> bool:
        """Return whether the server may have refused the entry for a reference to a resource that is uploaded later."""
        return any(name in self._types for name, _ in bundles.find_references(entry.body))

    def _select_changed(self, batch: Sequence[BundleEntry], done: BatchResult) -> list[BundleEntry]:
        """Return the entries whose content differs from the server's."""
        changed = []
        for entry, stored in zip(batch, self._read_stored(batch), strict=True):
            if bundles.has_same_content(entry.body, stored):
                done.unchanged += 1
                done.acknowledged.append(entry)
            else:
                changed.append(entry)
        return changed

    def _send(self, entries: Sequence[BundleEntry], policy: RetryPolicy | None = None) -> list[EntryResult]:
        """Send entries and return their results. A batch that is refused or fails as a whole is split in halves."""
        bundle = bundles.build_put_bundle("transaction" if self.transaction else "batch", self.client.base_url, entries)
        try:
            bundle_result, responses = self._post(bundle, len(entries), policy)
        except ServerUnavailable:
            # capabilities() raises ServerUnavailable if the server is down. Otherwise one of these entries makes it
            # fail.
            self.client.capabilities()
            bundle_result, responses, policy = EntryResult(0), None, HALF_RETRIES
        if responses is not None:
            return self._confirm(entries, responses)
        if len(entries) == 1:
            return [bundle_result]
        half = len(entries) // 2
        return self._send(entries[:half], policy) + self._send(entries[half:], policy)

    def _confirm(self, entries: Sequence[BundleEntry], responses: Sequence[EntryResponse]) -> list[EntryResult]:
        """Return the results of entries. A resource is read back if its response consists of a status only."""
        doubtful = [
            entry
            for entry, response in zip(entries, responses, strict=True)
            if response.result.accepted and not response.confirms(entry)
        ]
        if not doubtful:
            return [response.result for response in responses]
        missing = {
            entry.url
            for entry, stored in zip(doubtful, self._read_stored(doubtful), strict=True)
            if not bundles.has_same_content(entry.body, stored)
        }
        return [
            replace(response.result, confirmed=False) if entry.url in missing else response.result
            for entry, response in zip(entries, responses, strict=True)
        ]

    def _read_stored(self, entries: Sequence[BundleEntry]) -> list[bytes]:
        """Return the server's current resource for each entry; empty if there is none, or the server refuses the
        Bundle.
        """
        _, responses = self._post(bundles.build_get_bundle(entries), len(entries))
        if responses is None:
            return [b""] * len(entries)
        return [response.resource if response.result.accepted else b"" for response in responses]

    def _post(
        self, body: bytes, size: int, policy: RetryPolicy | None = None
    ) -> tuple[EntryResult, list[EntryResponse] | None]:
        """Post a Bundle.

        Return its result and the responses to its entries, or None in place of these if it is refused.
        """
        refused = _BATCH_REFUSED | {404} if self.transaction else _BATCH_REFUSED
        return self.client.post(self.client.base_url, body, partial(_read, size), expect={200} | refused, policy=policy)


def _read(size: int, response: FhirResponse) -> tuple[EntryResult, list[EntryResponse] | None]:
    if response.status != 200:
        return EntryResult(response.status, response.body if response.body.lstrip()[:1] == b"{" else b""), None
    try:
        return EntryResult(200), bundles.parse_response_bundle(response.body, size)
    except ValueError as error:
        if response.body.lstrip()[:1] == b"{" and "as many" in str(error):
            raise TransientFailure("the response is " + str(error), final=NotFhir) from None
        raise invalid_json_failure(response) from None


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _chunks_of_a_type(held: Iterable[HeldEntry], size: int) -> Iterator[tuple[str, list[HeldEntry]]]:
    for name, entries in groupby(held, key=lambda entry: entry.entry.resource_type):
        for chunk in _chunks(entries, size):
            yield name, chunk

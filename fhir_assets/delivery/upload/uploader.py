"""Resources to a FHIR server: batch after batch, a type after the other, each entry's fate read from the answer.

What the server refuses for now is held and tried again: entries whose references point to what comes later, and those
that failed in passing. Entries that refer to one another in circles are put without those references first.
"""

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count, groupby, islice
from typing import Protocol, TypeVar

from fhir_assets.delivery.upload.journal import BatchKey, Done, Held, Journal
from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir import bundles
from fhir_assets.fhir.bundles import BundleEntry, EntryResult
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import FhirResponse, invalid_json_failure
from fhir_assets.retries import RetryPolicy, TransientFailure

T = TypeVar("T")

ENTRY_RETRIES = RetryPolicy(attempts=4, first_wait=0.25, max_wait=8)
"""For entries that fail in passing while their batch as a whole is answered; what is left then is held."""

HALF_RETRIES = RetryPolicy(attempts=2, first_wait=0.5)
"""For halves of a batch that the server failed at, though it is up."""

_FEWER_ATTEMPTS = {0: 1, 409: 2, 412: 2}
_WHOLE_REFUSED = frozenset({400, 409, 410, 412, 413, 422})

Read = Callable[[str, str], Iterable[BundleEntry]]
"""Gives the entries of a file that have a type."""


class Listener(Protocol):
    """Hears how an upload goes; called by one thread."""

    def step(self, resource_type: str, files: Mapping[str, int]) -> None:
        """A type's turn has come: so many resources in each of these files."""
        ...

    def batch(self, key: BatchKey, done: Done, size: int) -> None:
        """The results of a batch are noted; of one that was done before a kill, too."""
        ...

    def again(self, what: str, count: int) -> None:
        """So many entries are tried again."""
        ...


class Silent:
    """Hears, and says nothing."""

    def step(self, resource_type: str, files: Mapping[str, int]) -> None:
        """A type's turn."""

    def batch(self, key: BatchKey, done: Done, size: int) -> None:
        """A batch's results."""

    def again(self, what: str, count: int) -> None:
        """Entries tried again."""


@dataclass
class Uploader:
    """Sends to one server. ``workers`` batches of a type are under way at once; the order between types holds.

    All lines of one resource go the same way, so that its last line is the one that stays. An upload whose journal
    knows what is done continues there. Raises ServerUnavailable, ServerRefused or NotFhir if the server as a whole
    does not take it: then the journal says what is done.
    """

    client: FhirClient
    journal: Journal
    listener: Listener = field(default_factory=Silent)
    batch_size: int = 100
    workers: int = 4
    transaction: bool = False
    skip_unchanged: bool = False
    stop: threading.Event = field(default_factory=threading.Event)

    def upload(self, steps: Mapping[str, Mapping[str, int]], read: Read) -> None:
        """Send all. ``steps`` holds by type, in order, how many resources each file has of it."""
        self._types = frozenset(steps)
        self._numbers = count(self.journal.next_number())
        with ExitStack() as stack:
            self._lanes = [stack.enter_context(ThreadPoolExecutor(1, f"upload-{n}")) for n in range(self.workers)]
            self._under_way: dict[Future[Done], tuple[BatchKey, int]] = {}
            try:
                for name, files in steps.items():
                    self.listener.step(name, files)
                    for file in files:
                        self._send_file(name, file, read(file, name))
                    self._await_all()
                    self._retry(name)
                self._retry()
                if self.journal.find_circles():
                    self._first_pass()
                    self._retry()
                self.journal.give_up()
            except BaseException:
                self.stop.set()
                self._keep_what_was_sent()
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
                self.listener.batch(key, Done(), len(batch))
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

    def _submit(self, key: BatchKey, size: int, deliver: Callable[[], Done]) -> None:
        while len(self._under_way) >= 2 * self.workers:
            self._note(wait(self._under_way, return_when=FIRST_COMPLETED).done)
        self._under_way[self._lanes[key.lane].submit(deliver)] = key, size

    def _await_all(self) -> None:
        while self._under_way:
            self._note(wait(self._under_way, return_when=FIRST_COMPLETED).done)

    def _note(self, finished: Set["Future[Done]"]) -> None:
        for future in self._in_order(finished):
            key, size = self._under_way.pop(future)
            done = future.result()
            self.journal.commit(key, done)
            self.listener.batch(key, done, size)

    def _keep_what_was_sent(self) -> None:
        """On the way out: results that have come are not asked for again by the next attempt."""
        for future in list(self._under_way):
            future.cancel()
        for future in self._in_order(wait(self._under_way).done):
            if not future.cancelled() and future.exception() is None:
                self.journal.commit(self._under_way[future][0], future.result())

    def _in_order(self, finished: Set["Future[Done]"]) -> list["Future[Done]"]:
        """As they were sent: a newer line of a resource must not be noted before an older one."""
        return [future for future in self._under_way if future in finished]

    def _retry(self, own_type_of: str | None = None) -> None:
        """Try what is held again, until a round settles nothing. Between types only those that wait for their own."""
        while waiting := self.journal.held_count(own_type_of=own_type_of):
            self.listener.again(own_type_of or "all types", waiting)
            chunks = _chunks_of_a_type(self.journal.held(own_type_of=own_type_of), self.batch_size)
            for name, held in chunks:
                number = next(self._numbers)
                key = BatchKey(name, "", number % self.workers, number)
                self._submit(key, len(held), partial(self._deliver_held, held))
            self._await_all()
            if self.journal.held_count(own_type_of=own_type_of) == waiting:
                return

    def _deliver_held(self, held: Sequence[Held]) -> Done:
        """As ``_deliver``; what was created without its references counts as created when it is whole."""
        done = self._deliver([each.entry for each in held], held=True)
        begun = {each.entry.url for each in held if each.first_pass == 201}
        created = sum(entry.url in begun for entry in done.settled)
        done.created, done.updated = done.created + created, done.updated - created
        return done

    def _first_pass(self) -> None:
        """Put the entries of circles without what they wait for."""
        self.listener.again("circular references, first pass", self.journal.find_circles())
        for chunk in _chunks(self.journal.circular(), self.batch_size):
            reduced = [
                BundleEntry(
                    held.entry.resource_type, held.entry.id, bundles.remove_references(held.entry.body, targets)
                )
                for held, targets in chunk
            ]
            results = self._results(reduced)
            self.journal.note_first_pass(
                (held, result) for (held, _), result in zip(chunk, results, strict=True) if result.accepted
            )

    def _deliver(self, batch: Sequence[BundleEntry], *, held: bool = False) -> Done:
        """Send a batch until each entry is accepted, refused or held."""
        started = time.perf_counter()
        done = Done()
        pending = self._changed(batch, done) if self.skip_unchanged else list(batch)
        tried = 0
        while pending and not self.stop.is_set():
            again: list[BundleEntry] = []
            tried += 1
            for entry, result in zip(pending, self._results(pending), strict=True):
                if result.accepted:
                    done.created += result.status == 201
                    done.updated += result.status != 201
                    done.settled.append(entry)
                elif result.retryable and tried < _FEWER_ATTEMPTS.get(result.status, ENTRY_RETRIES.attempts):
                    again.append(entry)
                elif held or result.retryable or self._may_wait_for_others(entry):
                    done.held.append((entry, result))
                else:
                    done.failed.append((entry, result))
            if again:
                self.stop.wait(ENTRY_RETRIES.wait_seconds(tried))
            pending = again
        if pending:
            raise ServerUnavailable("the upload was interrupted")
        done.seconds = time.perf_counter() - started
        return done

    def _may_wait_for_others(self, entry: BundleEntry) -> bool:
        """Whether it was perhaps refused for a reference to a resource that is still to come."""
        return any(name in self._types for name, _ in bundles.find_references(entry.body))

    def _changed(self, batch: Sequence[BundleEntry], done: Done) -> list[BundleEntry]:
        """The entries that the server does not hold just so."""
        _, answers = self._post(bundles.build_get_bundle(batch), len(batch))
        if answers is None:
            return list(batch)
        changed = []
        for entry, (result, stored) in zip(batch, answers, strict=True):
            if result.accepted and stored and bundles.has_same_content(entry.body, stored):
                done.unchanged += 1
                done.settled.append(entry)
            else:
                changed.append(entry)
        return changed

    def _results(self, entries: Sequence[BundleEntry], policy: RetryPolicy | None = None) -> list[EntryResult]:
        """What the server says of each entry. A batch that it refuses, or fails at, as a whole goes in halves."""
        bundle = bundles.build_put_bundle("transaction" if self.transaction else "batch", self.client.base_url, entries)
        try:
            whole, answers = self._post(bundle, len(entries), policy)
        except ServerUnavailable:
            # Either the server is down, which this finds out, or it fails at one of these entries.
            self.client.capabilities()
            whole, answers, policy = EntryResult(0), None, HALF_RETRIES
        if answers is not None:
            return [result for result, _ in answers]
        if len(entries) == 1:
            return [whole]
        half = len(entries) // 2
        return self._results(entries[:half], policy) + self._results(entries[half:], policy)

    def _post(
        self, body: bytes, size: int, policy: RetryPolicy | None = None
    ) -> tuple[EntryResult, list[tuple[EntryResult, bytes]] | None]:
        """The answers to the entries of a Bundle; None if the server refused it as a whole, which the Result says."""
        refused = _WHOLE_REFUSED | {404} if self.transaction else _WHOLE_REFUSED
        return self.client.post(self.client.base_url, body, partial(_read, size), expect={200} | refused, policy=policy)


def _read(size: int, answer: FhirResponse) -> tuple[EntryResult, list[tuple[EntryResult, bytes]] | None]:
    if answer.status != 200:
        return EntryResult(answer.status, answer.body if answer.body.lstrip()[:1] == b"{" else b""), None
    try:
        return EntryResult(200), bundles.parse_response_bundle(answer.body, size)
    except ValueError as error:
        if answer.body.lstrip()[:1] == b"{" and "as many" in str(error):
            raise TransientFailure("the answer is " + str(error), final=NotFhir) from None
        raise invalid_json_failure(answer) from None


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _chunks_of_a_type(held: Iterable[Held], size: int) -> Iterator[tuple[str, list[Held]]]:
    for name, of_type in groupby(held, key=lambda each: each.entry.resource_type):
        for chunk in _chunks(of_type, size):
            yield name, chunk

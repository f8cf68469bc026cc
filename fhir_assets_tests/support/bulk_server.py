"""A FHIR server with bulk exports whose answers a test bends: times, links, files, counts and statuses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply

Manifest = dict[str, Any]


@dataclass
class RequestedExport:
    """An export that was requested. ``files`` are the lines of its files, in the order of the manifest."""

    number: int
    query: dict[str, str]
    path: str
    at: datetime
    files: list[tuple[str, Sequence[bytes]]] = field(default_factory=list)
    polls: int = 0
    deleted: bool = False


class BulkServer(ScriptedServer):
    """Exports ``files``, lists of lines by type, whatever ``_since`` is: a test changes them between exports.

    An export is ready after ``pending`` polls. ``bend(manifest, export)`` changes a manifest in place. ``answer(path,
    export, request)`` replies in place of the server unless it returns None; ``path`` is ``export``, ``status``,
    ``file``, ``error`` or ``deleted``.
    """

    def __init__(
        self,
        *files: tuple[str, Sequence[bytes]],
        pending: int = 0,
        bend: Callable[[Manifest, RequestedExport], object] | None = None,
        answer: Callable[[str, RequestedExport | None, ReceivedRequest], Reply | None] | None = None,
        errors: Sequence[bytes] = (),
    ) -> None:
        super().__init__(self._reply)
        self.files = list(files)
        self.pending = pending
        self.bend = bend
        self.answer = answer
        self.errors = errors
        self.exports: list[RequestedExport] = []
        self.time: Callable[[datetime], datetime] = lambda kick_off: kick_off

    def _reply(self, request: ReceivedRequest) -> Reply:
        if request.path.endswith("/$export"):
            return self._kick_off(request)
        kind, _, rest = request.path.removeprefix("/fhir/").partition("/")
        number, _, index = rest.partition("/")
        export = self.exports[int(number) - 1]
        if self.answer and (bent := self.answer(kind, export, request)):
            return bent
        if kind == "status":
            return self._status(request, export)
        if kind == "error":
            return Reply(_join(self.errors))
        return Reply(_join(export.files[int(index)][1]))

    def _kick_off(self, request: ReceivedRequest) -> Reply:
        if self.answer and (bent := self.answer("export", None, request)):
            return bent
        export = RequestedExport(len(self.exports) + 1, dict(request.query), request.path, datetime.now(UTC))
        export.files = [(name, lines) for name, lines in self.files if name in export.query["_type"].split(",")]
        self.exports.append(export)
        return Reply(status=202, headers={"Content-Location": f"{self.url}/status/{export.number}"})

    def _status(self, request: ReceivedRequest, export: RequestedExport) -> Reply:
        if request.method == "DELETE":
            export.deleted = True
            return Reply(status=202)
        export.polls += 1
        if export.polls <= self.pending:
            return Reply(status=202, headers={"Retry-After": "0"})
        manifest: Manifest = {
            "transactionTime": self.time(export.at).isoformat(timespec="milliseconds"),
            "request": "export",
            "requiresAccessToken": False,
            "output": [
                {"type": name, "url": f"{self.url}/file/{export.number}/{index}?poll={export.polls}"}
                for index, (name, _) in enumerate(export.files)
            ],
            "error": [{"type": "OperationOutcome", "url": f"{self.url}/error/{export.number}"}] if self.errors else [],
        }
        if self.bend:
            self.bend(manifest, export)
        return reply(manifest)


def _join(lines: Sequence[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)

"""One log format for all processes: a line of JSON a record on stderr, level from LOG_LEVEL.

``{"time", "level", "service", "logger", "message", …}`` with the facts given as ``extra``: run, window, txid, counts.
Patient data must not get in, and mostly cannot: facts are numbers, booleans and short words, and of an error only
the project's own message is written, of any other just its type and where it was raised: a driver's message may
quote a row. Of what libraries log the words are written, without what they fill in.
"""

import logging
import sys
from datetime import UTC, datetime
from traceback import extract_tb
from typing import TextIO

import orjson

from fhir_assets.errors import FhirAssetsError

LONGEST_FACT = 200

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
_FRAMES = 5


class JsonFormatter(logging.Formatter):
    """Records as lines of JSON. ``service`` names the process's part: connector, api, dagster."""

    def __init__(self, service: str = "fhir_assets") -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            # What a library fills in may be a URL with somebody's number: of it only the words.
            "message": record.getMessage() if _is_ours(record.name or "") else str(record.msg),
        }
        for name, value in record.__dict__.items():
            if name not in _STANDARD and name not in line:
                line[name] = _fact(value)
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = described(record.exc_info[1])
        return orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS).decode()


def configure(service: str, level: str = "INFO", *, stream: TextIO | None = None, libraries: bool = True) -> None:
    """Make this process log as all others do; what libraries log, from warnings on, in the same lines.

    Without ``libraries`` these log as they did: Dagster's processes have formats of their own (``--log-format json``).
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    ours = logging.getLogger("fhir_assets")
    ours.setLevel(level)
    ours.propagate = libraries
    ours.handlers[:] = [] if libraries else [handler]
    if libraries:
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(logging.WARNING)


def described(error: BaseException) -> dict[str, object]:
    """An error's type, its message if it is one of ours, and the places it came through, the innermost last."""
    found: dict[str, object] = {"type": f"{type(error).__module__}.{type(error).__qualname__}"}
    if isinstance(error, FhirAssetsError):
        found["message"] = str(error)
    found["at"] = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in extract_tb(error.__traceback__)][
        -_FRAMES:
    ]
    return found


def _is_ours(logger: str) -> bool:
    return logger == "fhir_assets" or logger.startswith("fhir_assets.")


def _fact(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value[:LONGEST_FACT]
    if isinstance(value, list | tuple | set | frozenset):
        return [_fact(item) for item in list(value)[:20]]
    if isinstance(value, dict):
        return {str(name): _fact(item) for name, item in list(value.items())[:20]}
    return type(value).__name__

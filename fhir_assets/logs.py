"""The log format of all processes: one line of JSON for each record, on stderr, from the level LOG_LEVEL on.

A line has ``time``, ``level``, ``service``, ``logger``, ``message`` and the values passed as ``extra``, for example
run, window and counts. Logs contain no patient data. Values are numbers, booleans and short words. An error of the
project is logged with its message, any other error with its type and location alone, because the message of a driver
may quote a row. Messages of libraries are logged as templates, without their arguments.
"""

import logging
import sys
from datetime import UTC, datetime
from traceback import extract_tb
from typing import TextIO

import orjson

from fhir_assets.control_characters import escape_control_characters
from fhir_assets.foreign_errors import translate_error

MAX_VALUE_LENGTH = 200

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
_FRAMES = 5


class JsonFormatter(logging.Formatter):
    """Formats records as lines of JSON. ``service`` is the component of the process: connector, api, dagster."""

    def __init__(self, service: str = "fhir_assets") -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, without a line feed."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            # The arguments of a library may contain patient data, for example a URL with an identifier.
            "message": record.getMessage() if _is_ours(record.name or "") else str(record.msg),
        }
        for name, value in record.__dict__.items():
            if name not in _STANDARD and name not in line:
                line[name] = _to_loggable(value)
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = describe_error(record.exc_info[1])
        return escape_control_characters(orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS).decode())


def configure(service: str, level: str = "INFO", *, stream: TextIO | None = None, libraries: bool = True) -> None:
    """Configure logging: the project's records from ``level`` on, records of libraries from WARNING on.

    Without ``libraries`` the logging of libraries is not changed, because Dagster's processes have formats of their own
    (``--log-format json``).
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    project_logger = logging.getLogger("fhir_assets")
    project_logger.setLevel(level)
    project_logger.propagate = libraries
    project_logger.handlers[:] = [] if libraries else [handler]
    if libraries:
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(logging.WARNING)


def describe_error(error: BaseException) -> dict[str, object]:
    """Return an error's type, its message if it is one of the project or translated, and its last frames, in order."""
    description: dict[str, object] = {"type": f"{type(error).__module__}.{type(error).__qualname__}"}
    known = translate_error(error)
    if known is not None:
        description["message"] = str(known)
    frames = extract_tb(error.__traceback__)[-_FRAMES:]
    description["at"] = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames]
    return description


def _is_ours(logger: str) -> bool:
    return logger == "fhir_assets" or logger.startswith("fhir_assets.")


def _to_loggable(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value[:MAX_VALUE_LENGTH]
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_loggable(item) for item in list(value)[:20]]
    if isinstance(value, dict):
        return {str(name): _to_loggable(item) for name, item in list(value.items())[:20]}
    return type(value).__name__

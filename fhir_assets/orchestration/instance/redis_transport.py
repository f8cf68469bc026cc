"""Kombu's transport for Redis that outlives what is no message: anybody who reaches a broker can write to its lists.

Kombu's own transport raises the error of its JSON decoder in the loop of the worker, which ends the worker.
"""

import base64
import json
import logging
from collections.abc import Mapping
from json import JSONDecodeError
from queue import Empty
from typing import Any, ClassVar

from kombu.transport import TRANSPORT_ALIASES, redis

_log = logging.getLogger(__name__)


class TolerantChannel(redis.Channel):
    """A channel that skips what is not JSON."""

    def _brpop_read(self, **options: object) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except (JSONDecodeError, UnicodeDecodeError, RecursionError):
            _warn()
            raise Empty from None


class TolerantTransport(redis.Transport):
    """A transport that skips what is no message of a run launcher, and of other queues what has no delivery."""

    Channel = TolerantChannel
    task_queues: ClassVar[set[str]] = set()

    def _deliver(self, message: object, queue: str) -> None:
        if is_call(message) if queue in self.task_queues else has_delivery(message):
            super()._deliver(message, queue)  # type: ignore[no-untyped-call]
        else:
            _warn()


def has_delivery(message: object) -> bool:
    """Return whether JSON has what kombu reads of every message, such as the events of workers."""
    match message:
        case {"properties": {"delivery_tag": _, "delivery_info": {"exchange": _, "routing_key": _}}}:
            return True
        case _:
            return False


def is_call(message: object) -> bool:
    """Return whether JSON is a call of a task that Celery can read: with what it reads without asking, in these types.

    See version 2 of Celery's message protocol. Calls with a time or a time limit are none of a run launcher.
    """
    match message:
        case {
            "body": str(body),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"task": str(), "id": str()} as headers,
            "properties": {
                "body_encoding": "base64",
                "delivery_tag": str(),
                "delivery_info": {"exchange": str(), "routing_key": str()},
            },
        }:
            return _has_arguments(body) and _is_immediate(headers)
        case _:
            return False


def _has_arguments(body: str) -> bool:
    try:
        arguments = json.loads(base64.b64decode(body))
    except (ValueError, RecursionError):  # binascii.Error, JSONDecodeError and UnicodeDecodeError are ValueErrors.
        return False
    match arguments:
        case [list(), dict(), dict() | None]:
            return True
        case _:
            return False


def _is_immediate(headers: Mapping[Any, Any]) -> bool:
    has_no_time = headers.get("eta") is None and headers.get("expires") is None
    return has_no_time and headers.get("timelimit") in (None, [None, None]) and headers.get("retries") in (None, 0)


def use_tolerant_transport(queue: str) -> None:
    """Let the connections of this process to Redis skip what is no message, and in ``queue`` what calls no task."""
    TolerantTransport.task_queues.add(queue)
    name = f"{__name__}:{TolerantTransport.__name__}"
    TRANSPORT_ALIASES.update({"redis": name, "rediss": name})


def _warn() -> None:
    _log.warning("an entry of the broker's queue is no message and is ignored: someone else writes to the queue")

"""Messages of a Redis broker: which runs they name, and whether Redis keeps them when it restarts.

A Redis that restarts without a file, or whose keys are deleted, loses the messages of the runs that wait in it. Other
brokers cannot be asked which messages wait in them.
"""

import base64
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis
from celery import Celery


def find_without_message(app: Celery, queue: str, run_ids: Collection[str]) -> list[str]:
    """Return the runs that no message of the broker names; none if the broker is not Redis.

    A message waits in its queue, or is with a worker that has not acknowledged it. What is not a message of Celery is
    skipped: anybody can write to a broker. Raises redis.RedisError or an error
    of kombu if the broker cannot be reached.
    """
    with _open_redis(app) as channel:
        if channel is None:
            return []
        bodies = [_read_body(message) for message in _list_messages(channel, queue)]
    return [run_id for run_id in run_ids if not any(run_id in body for body in bodies)]


def keeps_messages(app: Celery) -> bool | None:
    """Return whether the broker writes its messages to a file, or None if it is not Redis or does not say."""
    with _open_redis(app) as channel:
        if channel is None:
            return None
        try:
            settings = {**channel.client.config_get("save"), **channel.client.config_get("appendonly")}
        except redis.ResponseError:
            return None
    return bool(settings.get("save")) or settings.get("appendonly") == "yes"


@contextmanager
def _open_redis(app: Celery) -> Iterator[Any]:
    """Yield the channel of a connection to Redis, or None if the broker is another one."""
    with app.connection_for_read() as connection:
        is_redis = connection.transport.driver_type == "redis"
        yield connection.default_channel if is_redis else None


def _list_messages(channel: Any, queue: str) -> Iterator[Any]:
    # A message of a priority other than the lowest waits in a list whose name also has the priority.
    for priority in channel.priority_steps:
        name = f"{queue}{channel.sep}{priority}" if priority else queue
        yield from map(_parse, channel.client.lrange(name, 0, -1))
    # Read last: a message that a worker takes meanwhile is in both, not in neither.
    for delivery in channel.client.hvals(channel.unacked_key):
        match _parse(delivery):
            case [message, *_]:
                yield message


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_body(message: Any) -> str:
    match message:
        case {"body": str(body), "properties": {"body_encoding": "base64"}}:
            with suppress(ValueError):
                return base64.b64decode(body).decode(errors="replace")
            return ""
        case {"body": body}:
            return str(body)
        case _:
            return ""

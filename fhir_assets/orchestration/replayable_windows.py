"""The dead letters that can be replayed here: those of the resource types and windows that the settings include.

Others remain from earlier settings: types that are no longer in FHIR_RESOURCE_TYPES, and windows of another
FHIR_PARTITION. No run can replay them, so that they stay open.
"""

from collections.abc import Sequence

from fhir_assets.orchestration.received_windows import is_included
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import replays
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.ops.replays import ReplayRequest
from fhir_assets.warehouse.postgres.db.connections import Connection


def find_replayable(conn: Connection, settings: Settings, selection: Selection) -> list[ReplayRequest]:
    """Return the replayable dead letters of a selection that the settings include, grouped by type and window."""
    found = replays.find_replayable(conn, selection)
    return [request for request in found if is_included(settings, request.resource_type, request.partition_key)]


def request_replay(conn: Connection, settings: Settings, selection: Selection) -> int:
    """Mark the dead letters of ``find_replayable`` for the sensor, and return their number."""
    return replays.request_replay(conn, selection, within=find_replayable(conn, settings, selection))


def cancel_excluded(conn: Connection, settings: Settings, requested: Sequence[ReplayRequest]) -> int:
    """Reopen the requested dead letters that the settings do not include, and return their number."""
    keys_by_type: dict[str, list[str]] = {}
    for request in requested:
        if not is_included(settings, request.resource_type, request.partition_key):
            keys_by_type.setdefault(request.resource_type, []).append(request.partition_key)
    return sum(replays.cancel_requests(conn, [name], keys) for name, keys in keys_by_type.items())

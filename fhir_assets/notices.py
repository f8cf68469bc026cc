"""Notices: facts about a source that a person should know, such as a refused parameter or an incomplete answer.

A notice of severity ``error`` means that resources may be missing: the check ``reconciles`` of the window fails. A
``warning`` is shown in the metadata of the check and in the log. Notices contain no patient data.
"""

import logging
import threading
from collections.abc import Iterable
from typing import Literal

import msgspec

from fhir_assets.control_characters import escape_control_characters

_log = logging.getLogger(__name__)
Severity = Literal["warning", "error"]


class Notice(msgspec.Struct, frozen=True):
    """One notice. ``code`` names its kind (``sort-ignored``); ``message`` says what happened and what to do next.

    ``resource_type`` is None if the notice concerns every type that is read.
    """

    severity: Severity
    code: str
    message: str
    resource_type: str | None = None


def log_notices(notices: Iterable[Notice]) -> None:
    """Log notices that cannot be stored with a window."""
    for notice in notices:
        _log.warning(notice.message, extra={"notice": notice.code})


class Notices:
    """Collects the notices of a source until they are drained. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notices: dict[Notice, None] = {}

    def add(self, severity: Severity, code: str, message: str, resource_type: str | None = None) -> None:
        """Add a notice, unless it has been added already since the last ``drain``."""
        with self._lock:
            notice = Notice(severity, code, escape_control_characters(message), resource_type)
            self._notices.setdefault(notice)

    def drain(self) -> tuple[Notice, ...]:
        """Return the notices in the order in which they were added, and clear them."""
        with self._lock:
            notices = tuple(self._notices)
            self._notices.clear()
        return notices

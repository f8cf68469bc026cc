"""Sends alerts to a webhook: one message about opened and closed incidents, without patient data."""

from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlsplit

import orjson
import requests
from urllib3.exceptions import HTTPError

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.transport.limits import AnswerLimits
from fhir_assets.fhir.transport.session import Session
from fhir_assets.retries import Retrier, RetryPolicy, TransientFailure, read_retry_after
from fhir_assets.warehouse.ops.incidents import Incident

SAMPLE = 10
"""The maximum number of incidents, and of partitions of each, that a message names. The others are counted."""

MAX_REASON = 1000
"""The maximum length of the reason of a failed run in a message."""

_POLICY = RetryPolicy(attempts=3, first_wait=1, max_wait=2, max_retry_after=10, budget=60)
_TIMEOUT_SECONDS = 10
_MAX_ANSWER_BYTES = 1 << 20
_CARD_HOSTS = (".webhook.office.com", ".logic.azure.com", ".api.powerplatform.com")
_OPENED_TITLES = {
    "run": "Run of {name} failed",
    "check": "Check {name} failed",
    "behind": "{name} is behind schedule",
    "tick": "The last tick of {name} failed, so that it may start no run",
}
_CLOSED_TITLES = {
    "run": "Run of {name} succeeded again",
    "check": "Check {name} passes again",
    "behind": "{name} is up to date again",
    "tick": "{name} ticks again",
}


class Webhook:
    """A webhook that receives alerts. ``ui_url`` is the address of the Dagster UI that messages link to.

    A call may take ``seconds``.
    """

    def __init__(self, url: str, *, ui_url: str, seconds: float = 30, retrier: Retrier | None = None) -> None:
        self._url = url
        self._ui_url = ui_url.rstrip("/")
        self._limits = AnswerLimits(seconds, _MAX_ANSWER_BYTES)
        self._retrier = retrier or Retrier(_POLICY)

    def deliver(
        self, opened: Sequence[Incident], closed: Sequence[Incident], reasons: Mapping[str, str] | None = None
    ) -> bool:
        """Send one message, with retries. Return whether the webhook accepted it. ``reasons`` are those of failed runs.

        A redirect counts as a refusal and is not followed, because that could turn the message into a GET of a login
        page. A success status with an HTML page, or with a text that reports a failure (as Teams does), is a failure
        and is retried.
        """
        body = build_message(opened, closed, ui_url=self._ui_url, card=_takes_cards(self._url), reasons=reasons)

        def attempt() -> bool:
            try:
                with Session(self._limits) as session:
                    timeout = min(_TIMEOUT_SECONDS, self._limits.seconds)
                    response = session.exchange("POST", self._url, json=body, timeout=timeout, auth=Credentials())
            except (requests.RequestException, HTTPError):
                raise TransientFailure("no response") from None
            if response.status >= 500 or response.status in (408, 429):
                raise TransientFailure(
                    f"the server responded with {response.status}",
                    retry_after=read_retry_after(response.headers.get("Retry-After")),
                )
            if not 200 <= response.status < 300:
                return False
            if _contradicts(response.body):
                raise TransientFailure(f"the server responded with {response.status}, but not as a webhook does")
            return True

        try:
            return self._retrier.run("the alert webhook", attempt)
        except (ServerUnavailable, NotFhir):
            return False


def _contradicts(body: bytes) -> bool:
    """Return whether the body of a response says that the message was not accepted, even if the status is a success."""
    start = body[:512].strip().lower()
    if start.startswith(b"<") or b"message delivery failed" in start:
        return True
    try:
        answer = orjson.loads(body)  # Unlike json, it raises ValueError for brackets without end.
    except ValueError:
        return False
    return isinstance(answer, dict) and (answer.get("ok") is False or bool(answer.get("error")))


def build_message(
    opened: Sequence[Incident],
    closed: Sequence[Incident],
    *,
    ui_url: str,
    card: bool,
    reasons: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """Return the JSON of a message.

    It contains ``text`` for Slack and compatible webhooks, or an adaptive card for Teams, and the incidents as JSON:
    ``began`` contains opened incidents, ``over`` closed ones. ``reasons`` are those of failed runs, by their ids.
    """
    reasons = reasons or {}
    lines = [
        *(f"🔴 {_describe(incident, _OPENED_TITLES, ui_url, reasons)}" for incident in opened[:SAMPLE]),
        *_count_omitted(opened),
        *(f"🟢 {_describe(incident, _CLOSED_TITLES, ui_url, {})}" for incident in closed[:SAMPLE]),
        *_count_omitted(closed),
    ]
    facts: dict[str, object] = {
        "began": [_facts(incident, ui_url, reasons) for incident in opened],
        "over": [_facts(incident, ui_url, {}) for incident in closed],
    }
    if not card:
        return {"text": "\n".join(lines), **facts}
    blocks = [{"type": "TextBlock", "text": line, "wrap": True} for line in lines]
    content = {"type": "AdaptiveCard", "version": "1.4", "body": blocks}
    attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "content": content}
    return {"type": "message", "attachments": [attachment], **facts}


def _describe(incident: Incident, titles: dict[str, str], ui_url: str, reasons: Mapping[str, str]) -> str:
    text = titles[incident.kind].format(name=incident.name)
    partitions = [partition for partition in incident.partitions if partition]
    if partitions:
        more = f" and {len(partitions) - SAMPLE} more" if len(partitions) > SAMPLE else ""
        text += f": {', '.join(partitions[:SAMPLE])}{more}"
    if incident.counts:
        text += " (" + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in incident.counts.items()) + ")"
    if (reason := _find_reason(incident, reasons)) is not None:
        text += f": {reason}"
    return f"{text} {_link(incident, ui_url)}"


def _find_reason(incident: Incident, reasons: Mapping[str, str]) -> str | None:
    reason = reasons.get(incident.run_id) if incident.kind == "run" and incident.run_id else None
    return reason if reason is None or len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 1]}…"


def _facts(incident: Incident, ui_url: str, reasons: Mapping[str, str]) -> dict[str, object]:
    return {
        "incident": incident.id,
        "kind": incident.kind,
        "name": incident.name,
        "partitions": incident.partitions[:SAMPLE],
        "partition_count": len(incident.partitions),
        "counts": incident.counts,
        "reason": _find_reason(incident, reasons),
        "opened_at": incident.opened_at.isoformat(),
        "closed_at": incident.closed_at.isoformat() if incident.closed_at else None,
        "link": _link(incident, ui_url),
    }


def _link(incident: Incident, ui_url: str) -> str:
    if incident.kind == "check":
        asset, _, check = incident.name.rpartition(":")
        return f"{ui_url}/assets/{quote(asset)}?view=checks&checkDetail={quote(check)}"
    if incident.kind == "tick":
        return f"{ui_url}/automation"
    return f"{ui_url}/runs/{incident.run_id}" if incident.run_id else f"{ui_url}/runs"


def _count_omitted(incidents: Sequence[Incident]) -> list[str]:
    return [f"… and {len(incidents) - SAMPLE} more: {len(incidents)} in all"] if len(incidents) > SAMPLE else []


def _takes_cards(url: str) -> bool:
    return f".{urlsplit(url).hostname or ''}".endswith(_CARD_HOSTS)

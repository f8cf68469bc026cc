"""One message to ALERT_WEBHOOK_URL of what began to fail and what is over. It holds no patient's data."""

from collections.abc import Sequence
from urllib.parse import quote, urlsplit

import requests

from fhir_assets.errors import ServerUnavailable
from fhir_assets.retries import Retrier, RetryPolicy, TransientFailure, read_retry_after
from fhir_assets.warehouse.ops.incidents import Incident

SAMPLE = 10
"""How many incidents, and how many partitions of each, a message names; it says how many more there are."""

_POLICY = RetryPolicy(attempts=3, first_wait=1, max_wait=2, max_retry_after=10, budget=60)
_TIMEOUT_SECONDS = 10
_CARD_HOSTS = (".webhook.office.com", ".logic.azure.com", ".api.powerplatform.com")
_BEGAN = {
    "run": "Run of {name} failed",
    "check": "Check {name} failed",
    "behind": "{name} is behind schedule",
}
_OVER = {
    "run": "Run of {name} succeeded again",
    "check": "Check {name} passes again",
    "behind": "{name} is up to date again",
}


class Webhook:
    """Where alerts go. ``ui_url`` is the Dagster UI that the messages link to."""

    def __init__(self, url: str, *, ui_url: str, retrier: Retrier | None = None) -> None:
        self._url = url
        self._ui_url = ui_url.rstrip("/")
        self._retrier = retrier or Retrier(_POLICY)

    def deliver(self, began: Sequence[Incident], over: Sequence[Incident]) -> bool:
        """Send one message, with retries. Return True if the webhook accepted it."""
        body = message(began, over, ui_url=self._ui_url, card=_takes_cards(self._url))

        def attempt() -> bool:
            try:
                response = requests.post(self._url, json=body, timeout=_TIMEOUT_SECONDS)
            except requests.RequestException:
                raise TransientFailure("no answer") from None
            if response.status_code >= 500 or response.status_code in (408, 429):
                raise TransientFailure(
                    f"the server answered {response.status_code}",
                    retry_after=read_retry_after(response.headers.get("Retry-After")),
                )
            return response.ok

        try:
            return self._retrier.run("the alert webhook", attempt)
        except ServerUnavailable:
            return False


def message(began: Sequence[Incident], over: Sequence[Incident], *, ui_url: str, card: bool) -> dict[str, object]:
    """The JSON of a message: ``text`` for Slack and all that take its form, an adaptive card for Teams; for programs
    the same facts as ``began`` and ``over``.
    """
    lines = [
        *(f"🔴 {_said(incident, _BEGAN, ui_url)}" for incident in began[:SAMPLE]),
        *_more(began),
        *(f"🟢 {_said(incident, _OVER, ui_url)}" for incident in over[:SAMPLE]),
        *_more(over),
    ]
    facts: dict[str, object] = {
        "began": [_facts(incident, ui_url) for incident in began],
        "over": [_facts(incident, ui_url) for incident in over],
    }
    if not card:
        return {"text": "\n".join(lines), **facts}
    blocks = [{"type": "TextBlock", "text": line, "wrap": True} for line in lines]
    content = {"type": "AdaptiveCard", "version": "1.4", "body": blocks}
    attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "content": content}
    return {"type": "message", "attachments": [attachment], **facts}


def _said(incident: Incident, words: dict[str, str], ui_url: str) -> str:
    said = words[incident.kind].format(name=incident.name)
    named = [partition for partition in incident.partitions if partition]
    if named:
        more = f" and {len(named) - SAMPLE} more" if len(named) > SAMPLE else ""
        said += f": {', '.join(named[:SAMPLE])}{more}"
    if incident.counts:
        said += " (" + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in incident.counts.items()) + ")"
    return f"{said} {_link(incident, ui_url)}"


def _facts(incident: Incident, ui_url: str) -> dict[str, object]:
    return {
        "incident": incident.id,
        "kind": incident.kind,
        "name": incident.name,
        "partitions": incident.partitions[:SAMPLE],
        "partition_count": len(incident.partitions),
        "counts": incident.counts,
        "opened_at": incident.opened_at.isoformat(),
        "closed_at": incident.closed_at.isoformat() if incident.closed_at else None,
        "link": _link(incident, ui_url),
    }


def _link(incident: Incident, ui_url: str) -> str:
    if incident.kind == "check":
        asset, _, check = incident.name.rpartition(":")
        return f"{ui_url}/assets/{quote(asset)}?view=checks&checkDetail={quote(check)}"
    return f"{ui_url}/runs/{incident.run_id}" if incident.run_id else f"{ui_url}/runs"


def _more(incidents: Sequence[Incident]) -> list[str]:
    return [f"… and {len(incidents) - SAMPLE} more: {len(incidents)} in all"] if len(incidents) > SAMPLE else []


def _takes_cards(url: str) -> bool:
    return f".{urlsplit(url).hostname or ''}".endswith(_CARD_HOSTS)

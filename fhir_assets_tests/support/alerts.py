"""A webhook that records its messages, and the sensor ``alerts`` of a deployment."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import dagster as dg

from fhir_assets.definitions import build_definitions
from fhir_assets_tests.support.deployment import Deployment


class WebhookReceiver:
    """A webhook: the messages that it accepted, and the statuses of its next answers; then it answers 200."""

    def __init__(self, url: str, statuses: list[int]) -> None:
        self.url = url
        self.statuses = statuses
        self.messages: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return json.dumps(self.messages, ensure_ascii=False)


@contextmanager
def receive_webhooks(*statuses: int) -> Iterator[WebhookReceiver]:
    """Serve a webhook during the block. Its first answers have the given statuses, the others 200."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = hook.statuses.pop(0) if hook.statuses else 200
            if status == 200:
                hook.messages.append(body)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hook = WebhookReceiver(f"http://127.0.0.1:{server.server_port}/hook", list(statuses))
        Thread(target=server.serve_forever, daemon=True).start()
        yield hook
        server.shutdown()


class AlertsSensor:
    """Evaluates the sensor and keeps its cursor between ticks."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._cursor: str | None = None

    def tick(self) -> str:
        repository = build_definitions(self._deployment.settings).get_repository_def()
        with dg.build_sensor_context(
            self._deployment.instance, cursor=self._cursor, repository_def=repository
        ) as context:
            result = repository.get_sensor_def("alerts").evaluate_tick(context)
        self._cursor = result.cursor
        for event in result.asset_events:  # As the daemon does.
            self._deployment.instance.report_runless_asset_event(event)
        return result.skip_message or ""

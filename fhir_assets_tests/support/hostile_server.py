"""A FHIR server that lies at random: status lines, headers, redirects, links, codings, sizes and pauses.

One server plays all roles: searches, exports, the token endpoint, and the target of uploads and of the connector. An
answer is right but for what a ``Lie`` says about its role, so that the client gets far enough to meet the lie.
"""

import json
import time
from collections.abc import Iterable

from fhir_assets_tests.support.hostile_answers import Lie, LyingServer, build_answer

ROLES = ("metadata", "discovery", "token", "search", "kickoff", "status", "file", "write")
BODIES = (
    *(b"", b"null", b"[]", b"\0", b"<html>", b"{", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"1e999", b"\xff\xfe{}"),
    *(b'{"resourceType":"Bundle","entry":[null,0,{"resource":7}]}', b'{"resourceType":"Bundle","type":"searchset"}'),
    *(b'{"transactionTime":"0001-01-01T00:00:00Z","output":{}}', b'{"access_token":"a\\r\\nb","expires_in":1e400}'),
    *(b'{"access_token":"t","expires_in":-1}', b'{"token_endpoint":7}', b'{"resourceType":"OperationOutcome"}'),
    *(b'{"resourceType":"Patient","id":"\\u0000"}', b'{"resourceType":"Patient","id":"\\ud800"}', b"x" * 300_000),
)


class HostileServer(LyingServer):
    """A server whose lies are those of its roles."""

    def answer(self, head: bytes) -> Iterable[bytes]:
        """Yield the pieces of the answer to a request."""
        self.requests += 1
        path = head.split(b" ")[1].decode("latin-1") if head.count(b" ") > 1 else "/"
        role = _role(head.split(b" ")[0], path)
        lie = self.lies.get(role, Lie())
        status, headers, body = self._right_answer(role, path, lie)
        if lie.status is not None:
            status = lie.status
            headers["Location"] = self.link(lie.link or "/fhir/other~")
        return build_answer(lie, status, headers, body)

    def _right_answer(self, role: str, path: str, lie: Lie) -> tuple[int, dict[str, str], bytes]:
        link = self.link(lie.link)
        headers = {"Content-Type": "application/fhir+json"}
        patient = {"resourceType": "Patient", "id": f"p{self.requests}"}
        document: object = patient
        if role == "metadata":
            document = {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"}
        elif role == "discovery":
            document = {"token_endpoint": link or f"{self.origin}/token"}
        elif role == "token":
            document = {"access_token": "canary-token", "expires_in": 300}
        elif role == "search":
            links = [{"relation": "next", "url": link}] if lie.link is not None else []
            kind = "history" if "/_history" in path else "searchset"
            document = {"resourceType": "Bundle", "type": kind, "link": links, "entry": [{"resource": patient}]}
        elif role == "kickoff":
            return 202, {**headers, "Content-Location": link or f"{self.origin}/fhir/status"}, b""
        elif role == "status":
            urls = [f"{self.origin}/fhir/file/1", *([link] if lie.link is not None else [])]
            parts = [{"relation": "next", "url": link}] if lie.link is not None and self.requests % 2 else []
            moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            output = [{"type": "Patient", "url": url} for url in urls]
            document = {"transactionTime": moment, "requiresAccessToken": True, "output": output, "link": parts}
        return 200, headers, json.dumps(document).encode()


def _role(method: bytes, path: str) -> str:
    if method != b"GET":
        return "token" if path.startswith("/token") else "write"
    for part, role in (
        ("/metadata", "metadata"),
        ("/.well-known", "discovery"),
        ("$export", "kickoff"),
        ("/status", "status"),
        ("/file", "file"),
    ):
        if part in path:
            return role
    return "search"

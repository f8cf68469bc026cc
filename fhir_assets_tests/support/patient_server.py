"""A FHIR server of Patients that allows several with one identifier, and whose conditional delete removes them all."""

import json
from collections.abc import Callable
from threading import RLock
from typing import Any
from urllib.parse import parse_qs

from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply

Patient = dict[str, Any]
Intercept = Callable[[ReceivedRequest], Reply | None]


class PatientServer(ScriptedServer):
    """Patients by id, with versions, conditional create, update and delete, and If-Match.

    ``intercept`` may answer a request instead of the server, except the CapabilityStatement. ``lose`` is how many
    writes are executed, but answered with status 500. A server that does not ``create_conditionally`` refuses POST.
    """

    creates_conditionally = True

    def __init__(self, intercept: Intercept = lambda request: None) -> None:
        self.patients: dict[str, Patient] = {}
        self.versions: dict[str, int] = {}
        self.intercept = intercept
        self.lose = 0
        self._lock = RLock()
        super().__init__(self._answer)

    def add(self, resource_id: str, identifier: tuple[str, str], family: str = "Foreign") -> Patient:
        """Store a Patient as somebody else does, and return it."""
        system, value = identifier
        resource = {
            "resourceType": "Patient",
            "identifier": [{"system": system, "value": value}],
            "name": [{"family": family}],
        }
        return self._store(resource_id, resource)

    def change(self, resource_id: str, **elements: object) -> None:
        """Change elements of a Patient as somebody else does; this creates a new version."""
        self._store(resource_id, self.patients[resource_id] | elements)

    def families(self) -> dict[str, str]:
        """Return the family names by id."""
        return {resource_id: patient["name"][0]["family"] for resource_id, patient in self.patients.items()}

    def identifiers(self) -> dict[str, str]:
        """Return the values of the first identifiers by id."""
        return {resource_id: patient["identifier"][0]["value"] for resource_id, patient in self.patients.items()}

    def count(self, method: str) -> int:
        """Return the number of requests with this method."""
        return self.methods().count(method)

    def methods(self) -> list[str]:
        """Return the methods of the requests, without those of the CapabilityStatement."""
        return [request.method for request in self.requests if request.path != "/fhir/metadata"]

    def _store(self, resource_id: str, resource: Patient) -> Patient:
        self.versions[resource_id] = self.versions.get(resource_id, 0) + 1
        meta = {"versionId": str(self.versions[resource_id])}
        self.patients[resource_id] = {**resource, "id": resource_id, "meta": meta}
        return self.patients[resource_id]

    def _answer(self, request: ReceivedRequest) -> Reply:
        if request.path == "/fhir/metadata":
            types = [{"type": "Patient", "conditionalCreate": self.creates_conditionally}]
            return reply({"resourceType": "CapabilityStatement", "rest": [{"mode": "server", "resource": types}]})
        answer = self.intercept(request)
        return self.execute(request) if answer is None else answer

    def execute(self, request: ReceivedRequest) -> Reply:
        """Execute a request and return its answer; requests at once are executed one after the other."""
        with self._lock:
            return self._execute(request)

    def _execute(self, request: ReceivedRequest) -> Reply:
        resource_id = request.path.removeprefix("/fhir/Patient").strip("/")
        answer = getattr(self, f"_{request.method.lower()}")(request, resource_id)
        if request.method != "GET" and self.lose:
            self.lose -= 1
            return reply(b"", 500)
        assert isinstance(answer, Reply)
        return answer

    def _get(self, request: ReceivedRequest, resource_id: str) -> Reply:
        if not resource_id:
            entries = [{"resource": self.patients[match]} for match in self._find(request)]
            return reply({"resourceType": "Bundle", "type": "searchset", "entry": entries})
        if resource_id not in self.patients:
            return reply(b"", 404)
        return reply(self.patients[resource_id], ETag=f'W/"{self.versions[resource_id]}"')

    def _put(self, request: ReceivedRequest, resource_id: str) -> Reply:
        matches = [resource_id] if resource_id else self._find(request)
        if len(matches) > 1:
            return reply(b"", 412)
        target = matches[0] if matches else f"made-{len(self.versions) + 1}"
        created = target not in self.patients
        stored = self._store(target, json.loads(request.body))
        location = f"{self.url}/Patient/{target}/_history/{self.versions[target]}"
        return reply(stored, 201 if created else 200, Location=location)

    def _post(self, request: ReceivedRequest, resource_id: str) -> Reply:
        assert not resource_id
        if not self.creates_conditionally:
            return reply(b"", 405)
        matches = self._find(request, request.headers.get("If-None-Exist"))
        if len(matches) > 1:
            return reply(b"", 412)
        if matches:
            return reply(self.patients[matches[0]], 200)
        stored = self._store(f"made-{len(self.versions) + 1}", json.loads(request.body))
        return reply(stored, 201, Location=f"{self.url}/Patient/{stored['id']}/_history/1")

    def _delete(self, request: ReceivedRequest, resource_id: str) -> Reply:
        wanted = request.headers.get("If-Match")
        if resource_id and wanted and wanted != f'W/"{self.versions.get(resource_id)}"':
            return reply(b"", 412)
        for match in [resource_id] if resource_id else self._find(request):
            self.patients.pop(match, None)
        return reply(b"", 204)

    def _find(self, request: ReceivedRequest, condition: str | None = None) -> list[str]:
        (token,) = parse_qs(condition)["identifier"] if condition is not None else request.all("identifier")
        system, value = _split(token)
        return [
            resource_id
            for resource_id, patient in self.patients.items()
            if {"system": system, "value": value} in patient["identifier"]
        ]


def _split(token: str) -> tuple[str, str]:
    """Return the system and the value of a token, in which a backslash escapes the next character."""
    parts = [""]
    characters = iter(token)
    for character in characters:
        if character == "\\":
            parts[-1] += next(characters)
        elif character == "|":
            parts.append("")
        else:
            assert character not in ",$", "a separator of search values is not escaped"
            parts[-1] += character
    system, value = parts
    return system, value

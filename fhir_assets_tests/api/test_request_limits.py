"""Requests with more values or issues than their limits."""

from fhir_assets_tests.support.api import Serve


def test_a_request_with_too_many_values_is_413_and_issues_beyond_their_limit_are_counted(
    serve_in_threads: Serve,
) -> None:
    api = serve_in_threads(validation_max_values=1000, validation_max_issues=5)
    names = [{"family": 1} for _ in range(50)]
    body = {"records": [{"resourceType": "Patient", "id": "a", "name": names}]}
    issues = api.post("/api/v1/ingest", json=body).json()["results"][0]["issues"]
    assert len(issues) == 6
    assert issues[-1]["rule"] == "unlisted"
    for path, sent in (("/api/v1/ingest", {"records": [1] * 1100}), ("/fhir", [{}] * 1100), ("/ingest", [{}] * 1100)):
        answer = api.post(path, json=sent)
        assert (answer.status_code, "VALIDATION_MAX_VALUES" in answer.text) == (413, True)

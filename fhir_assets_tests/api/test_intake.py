"""Records and resources that are posted."""

import gzip
from concurrent.futures import ThreadPoolExecutor

import orjson
import pytest

from fhir_assets.deployment.store import build_store
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.api import Api, Serve

ADA = {
    "resourceType": "Patient",
    "mrn": "SECRET-MRN-1",
    "name": {"first": "Ada", "last": "Lovelace"},
    "birthDate": "1815-12-10",
    "gender": "female",
    "ssn": "123456789",
    "consent": {"data_sharing": True, "research": False},
}


def received(api: Api) -> dict[str, int]:
    assert api.settings.db_url
    with connect(api.settings.db_url.get_secret_value()) as conn:
        return dict(conn.execute("SELECT resource_type, sum(rows)::int FROM ops.received GROUP BY 1").fetchall())


def raw(api: Api, resource_type: str) -> list[bytes]:
    store = build_store(api.settings)
    manifests = store.manifests("raw", resource_type, store.partition_keys("raw", resource_type))
    return [line for manifest in manifests for batch in store.batches(manifest.parts) for line in batch]


def test_records_and_resources_of_a_list_have_separate_results(api: Api) -> None:
    heart_rate = {
        "resourceType": "Observation",
        "id": "o1",
        "status": "final",
        "code": {"text": "Heart rate"},
    }
    wrong = {**heart_rate, "id": "o2", "status": "finale", "value": 1}
    answer = api.post("/api/v1/ingest", json={"records": [ADA, heart_rate, wrong, {"resourceType": "Claim"}]})
    assert answer.status_code == 202
    content = answer.json()
    assert [result["status"] for result in content["results"]] == ["accepted", "accepted", "rejected", "rejected"]
    assert (content["accepted"], content["rejected"]) == (2, 2)
    ada, good, bad, claim = content["results"]
    assert good["id"] == "o1"
    assert {issue["rule"] for issue in bad["issues"]} >= {"required-binding", "structure"}
    assert "finale" not in answer.text
    assert claim["issues"]
    assert "SECRET" not in ada["id"]
    assert received(api) == {"Patient": 1, "Consent": 1, "Observation": 1}


def test_the_result_lists_all_errors_of_a_record_with_paths_and_without_values(api: Api) -> None:
    wrong = {
        "resourceType": "Patient",
        "mrn": "",
        "birthDate": "1815-13-10",
        "gender": "lady",
        "ssn": "12",
        "consent": {"data_sharing": "yes"},
        "nickname": "Countess",
    }
    answer = api.post("/api/v1/ingest", json={"records": [wrong]})
    (result,) = answer.json()["results"]
    assert {issue["path"] for issue in result["issues"]} == {
        "Patient",
        "Patient.mrn",
        "Patient.birthDate",
        "Patient.gender",
        "Patient.ssn",
        "Patient.consent.data_sharing",
    }
    assert not any(word in answer.text for word in ("lady", "1815", "yes", "Countess"))
    assert received(api) == {}


def test_the_same_person_has_the_same_id_and_a_new_version_each_time(api: Api) -> None:
    ids = {
        api.post("/api/v1/ingest", json={"records": [{**ADA, "name": name}]}).json()["results"][0]["id"]
        for name in ("Ada Byron", "Ada Lovelace")
    }
    assert len(ids) == 1
    assert received(api)["Patient"] == 2


def test_a_repeated_request_with_the_same_key_gets_the_first_response_and_is_processed_once(api: Api) -> None:
    body = {"records": [ADA, {"resourceType": "Patient", "gender": "female", "active": True}]}
    answers = [api.post("/api/v1/ingest", json=body, headers={"Idempotency-Key": "k1"}) for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert answers[1].headers["Idempotent-Replayed"] == "true"
    assert received(api)["Patient"] == 2
    another = api.post("/api/v1/ingest", json={"records": []}, headers={"Idempotency-Key": "k1"})
    assert another.status_code == 422
    others = api.post("/api/v1/ingest", json={"records": []}, headers={"Idempotency-Key": "k1"}, role="ingester")
    assert others.status_code == 202


def test_a_batch_stores_the_valid_entries_and_a_transaction_all_or_none(api: Api) -> None:
    good = {"resourceType": "Patient", "id": "p1", "gender": "female"}
    bad = {"resourceType": "Patient", "id": "p2", "gender": "lady"}
    for kind, status, rows in (("transaction", 422, {}), ("batch", 200, {"Patient": 1})):
        bundle = {"resourceType": "Bundle", "type": kind, "entry": [{"resource": good}, {"resource": bad}]}
        answer = api.post("/fhir", json=bundle)
        assert answer.status_code == status
        assert answer.headers["Content-Type"] == "application/fhir+json"
        outcome = answer.json()
        assert outcome["resourceType"] == "OperationOutcome"
        assert [issue["expression"] for issue in outcome["issue"]] == [["Bundle.entry[1].resource.gender"]]
        assert received(api) == rows


def test_references_between_bundle_entries_use_the_assigned_ids(api: Api) -> None:
    urn = "urn:uuid:8f2c1c6e-2f4b-4f0e-9a57-2d3c8b1a9f10"
    entries = [
        {"fullUrl": urn, "resource": {"resourceType": "Patient", "gender": "other"}},
        {
            "resource": {
                "resourceType": "Observation",
                "status": "final",
                "code": {"text": "x"},
                "subject": {"reference": urn},
            }
        },
    ]
    answer = api.post("/fhir", json={"resourceType": "Bundle", "type": "transaction", "entry": entries})
    assert answer.status_code == 200, answer.text
    (patient,), (observation,) = (
        [orjson.loads(line) for line in raw(api, name)] for name in ("Patient", "Observation")
    )
    assert observation["subject"]["reference"] == f"Patient/{patient['id']}"


def test_the_resources_of_every_container_are_received(api: Api) -> None:
    def bundle(kind: str, *resources: object, **more: object) -> dict[str, object]:
        entries = [{"resource": resource} for resource in resources]
        return {"resourceType": "Bundle", "type": kind, "entry": entries, **more}

    named = iter(range(100))

    def patient() -> dict[str, object]:
        return {"resourceType": "Patient", "id": f"p{next(named)}"}

    bodies = [
        *(bundle(kind, patient()) for kind in ("searchset", "history", "document", "message", "batch-response")),
        bundle("batch-response", bundle("searchset", patient())),
        {"resourceType": "Parameters", "parameter": [{"name": "return", "resource": bundle("collection", patient())}]},
        [patient(), bundle("searchset", patient())],
    ]
    for body in bodies:
        answer = api.post("/fhir", json=body)
        assert answer.status_code == 200, answer.text
    assert len(raw(api, "Patient")) == next(named)


def test_a_container_with_a_part_that_cannot_be_received_is_refused(api: Api) -> None:
    patient = {"resource": {"resourceType": "Patient", "id": "a"}}
    deletion = {"request": {"method": "DELETE", "url": "Patient/b"}}
    link = [{"relation": "next", "url": "https://h.example/next"}]
    for more, place in (({"entry": [patient, deletion]}, "entry[1]"), ({"entry": [patient], "link": link}, "link")):
        answer = api.post("/fhir", json={"resourceType": "Bundle", "type": "searchset", **more})
        assert answer.status_code == 400
        assert place in answer.json()["issue"][0]["details"]["text"]
    assert received(api) == {}


def test_a_posted_resource_keeps_its_digits(api: Api) -> None:
    body = (
        b'{"resourceType":"Observation","id":"d","status":"final","code":{"text":"x"},"valueQuantity":{"value":1.10}}'
    )
    answer = api.post("/fhir", data=body, headers={"Content-Type": "application/fhir+json"})
    assert answer.status_code == 200, answer.text
    assert b"1.10" in raw(api, "Observation")[0]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"records": {}}', b'{"records": [], "x": 1}', b"\xff", b"[" * 9999]
)
def test_an_unreadable_body_is_answered_400(api: Api, body: bytes) -> None:
    answer = api.post("/api/v1/ingest", data=body)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert api.post("/fhir", data=body).status_code == 400


def test_bodies_over_the_limit_are_refused_with_and_without_content_length(serve: Serve) -> None:
    api = serve(api_max_body_bytes=2048, api_max_records=2)
    body = b'{"records": [' + b" " * 4096 + b"]}"
    for data in (body, iter([body[:1000], body[1000:]])):
        answer = api.post("/api/v1/ingest", data=data)
        assert (answer.status_code, answer.json()["max_bytes"]) == (413, 2048)
    answer = api.post("/api/v1/ingest", json={"records": [{}, {}, {}]})
    assert (answer.status_code, answer.json()["max_records"]) == (413, 2)


def test_intake_is_audited_with_the_token_name_and_logs_contain_no_patient_data(api: Api) -> None:
    api.post("/api/v1/ingest", json={"records": [ADA]}, role="ingester")
    api.get("/patients?mrn=SECRET-MRN-1&last_name=Lovelace")
    assert api.settings.db_url
    with connect(api.settings.db_url.get_secret_value()) as conn:
        audit_records = conn.execute("SELECT action, actor, resource_type FROM ops.audit_log ORDER BY seq").fetchall()
    assert ("create", "api:ingester", "Patient") in audit_records
    assert ("read", "api:admin", "Patient") in audit_records
    log = api.log.read_text()
    assert '"/patients"' in log
    assert not any(word in log for word in ("SECRET", "Lovelace", "the-secret-of"))


def test_simultaneous_requests_are_all_stored_and_audited(api: Api) -> None:
    def post(number: int) -> tuple[int, int]:
        record = {"resourceType": "Patient", "mrn": f"together-{number}", "gender": "other"}
        answer = api.post("/api/v1/ingest", json={"records": [record, {"resourceType": "Patient", "mrn": ""}]})
        return answer.json()["accepted"], answer.json()["rejected"]

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(post, range(48))) == {(1, 1)}
    lines = [line for line in raw(api, "Patient") if b"together-" in line]
    assert len(set(lines)) == len(lines) == 48
    assert received(api) == {"Patient": 48}
    assert api.settings.db_url
    with connect(api.settings.db_url.get_secret_value()) as conn:
        (origins,) = conn.execute("SELECT count(DISTINCT origin) FROM ops.received").fetchone() or (0,)
        (audit_records,) = conn.execute(
            "SELECT count(DISTINCT request_id) FROM ops.audit_log WHERE action = 'create'"
            " AND seq > (SELECT max(seq) FROM ops.audit_log) - 48"
        ).fetchone() or (0,)
    assert 0 < origins < 48
    assert audit_records == 48


def test_a_patient_record_with_a_value_that_a_spreadsheet_damaged_is_rejected(api: Api) -> None:
    damaged = [("mrn", "1.23457E+11"), ("mrn", "NULL"), ("mrn", "12\u200b3"), ("birthDate", "0080-01-01")]
    records = [
        {"resourceType": "Patient", "mrn": "M1", "birthDate": "1980-01-01", name: text} for name, text in damaged
    ]
    results = api.post("/api/v1/ingest", json={"records": records}).json()["results"]
    found = [(result["status"], result["issues"][0]["path"]) for result in results]
    assert found == [("rejected", f"Patient.{name}") for name, _ in damaged]


NOT_JSON: list[tuple[bytes, dict[str, str], str]] = [
    (gzip.compress(b"{}"), {}, "gzip"),
    (b"{}", {"Content-Encoding": "gzip"}, "uncompressed"),
    (b'<Patient xmlns="http://hl7.org/fhir"/>', {}, "XML"),
    (b"\n <?xml?>", {"Content-Type": "application/json"}, "XML"),
    (b"x", {"Content-Type": "application/fhir+xml"}, "XML"),
    (b'{"a":1}\n{"a":2}\n', {}, "NDJSON"),
    (b"{}", {"Content-Type": "application/fhir+ndjson"}, "NDJSON"),
    (b"mrn,first_name", {"Content-Type": "text/csv; charset=utf-8"}, "CSV"),
    ("{}".encode("utf-16"), {}, "UTF-8"),
]


def test_a_body_that_is_not_json_is_answered_415_with_what_it_is(api: Api) -> None:
    for path in ("/fhir", "/api/v1/ingest", "/ingest"):
        for body, headers, word in NOT_JSON:
            answer = api.post(path, data=body, headers=headers)
            assert answer.status_code == 415, (path, word)
            assert word in answer.json()["detail"]


def test_a_byte_order_mark_and_odd_media_types_are_accepted(api: Api) -> None:
    body = b'\xef\xbb\xbf{\n"resourceType": "Patient", "id": "a"}\n'
    for media_type in ("application/fhir+json", "application/json; charset=utf-8", "application/x-www-form-urlencoded"):
        assert api.post("/fhir", data=body, headers={"Content-Type": media_type}).status_code == 200


def test_a_post_of_which_every_record_is_rejected_is_422_with_the_reasons(api: Api) -> None:
    answer = api.post("/api/v1/ingest", json={"records": [{"resourceType": "Patient", "gender": "x"}, {}]})
    assert (answer.status_code, answer.headers["Content-Type"]) == (422, "application/json")
    assert (answer.json()["accepted"], answer.json()["rejected"]) == (0, 2)
    assert all(result["issues"] for result in answer.json()["results"])


@pytest.mark.parametrize(("path", "records"), [("/api/v1/ingest", 1), ("/api/v1/ingest", 300), ("/fhir", 300)])
def test_an_answer_lists_a_bounded_number_of_issues(api: Api, path: str, records: int) -> None:
    names = [{"use": "x", "text": "a"} for _ in range(150)]
    bodies = [{"resourceType": "Patient", "id": f"p{n}", "name": names} for n in range(records)]
    bundle = {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": body} for body in bodies]}
    answer = api.post(path, json=bundle if path == "/fhir" else {"records": bodies})
    assert answer.status_code == 422
    found = answer.json()
    issues = (
        [each for result in found["results"] for each in result["issues"]] if "results" in found else found["issue"]
    )
    assert len(issues) == (101 if records == 1 else 49 * 101 + 251 * 2)
    assert "not listed" in str(issues[-1])


def test_an_unknown_query_parameter_is_422_and_not_repeated(api: Api) -> None:
    answer = api.get("/patients?SECRETNAME=1", role="reader")
    assert (answer.status_code, answer.headers["Content-Type"]) == (422, "application/problem+json")
    assert "it supports after, first_name, last_name, mrn, number, page, page_size, ssn" in answer.json()["detail"]
    assert "SECRETNAME" not in answer.text
    assert "it supports none" in api.get("/health/live?x=1", role=None).json()["detail"]

"""Two machines receive posts, one of them with a clock that is two hours fast or slow: the later post wins.

The clock of a process is set by libfaketime, Debian's package ``faketime``.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fhir_assets_tests.support.api import TOKENS, Api, api_process
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.landing import load_received
from fhir_assets_tests.support.posts import deploy_hospital
from fhir_assets_tests.support.soak.clock import SteppedClock

HOURS = 7200
MRN = "123-45-6789"

pytestmark = pytest.mark.slow


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path) -> Deployment:
    return deploy_hospital(deploy, tmp_path, consent_policy="opt-out", fhir_resource_types=("Patient", "Consent"))


@pytest.fixture(params=[HOURS, -HOURS], ids=["ahead", "behind"])
def machines(request: pytest.FixtureRequest, deployment: Deployment, tmp_path: Path) -> Iterator[tuple[Api, Api]]:
    """The API on two machines, of which the first has the later time; one of the clocks is right."""
    clock = SteppedClock(tmp_path)
    if not clock.environment:
        pytest.skip("needs libfaketime (Debian's package faketime), which CI installs")
    clock.step(request.param)
    values: dict[str, object] = {
        "db_url": deployment.url,
        "fhir_assets_home": deployment.settings.home,
        "fhir_landing_url": deployment.settings.fhir_landing_url,
        "fhir_resource_types": "Patient,Consent",
        "fhir_last_updated_gte": "2024-01-01",
        "consent_policy": "opt-out",
        "api_tokens": TOKENS,
        "metrics_port": 0,
    }
    with ExitStack() as stack:
        wrong = stack.enter_context(api_process(values, tmp_path, environment=clock.environment))
        right = stack.enter_context(api_process(values, tmp_path))
        yield (wrong, right) if request.param > 0 else (right, wrong)


def post(api: Api, name: str, *, shares: bool) -> None:
    record = {"resourceType": "Patient", "mrn": MRN, "name": f"{name} Example", "consent": {"data_sharing": shares}}
    response = api.post("/api/v1/ingest", json={"records": [record]})
    assert response.status_code == 202, response.text


def test_the_later_of_two_posts_wins(machines: tuple[Api, Api], deployment: Deployment) -> None:
    fast, slow = machines
    post(fast, "Earlier", shares=True)
    assert load_received(deployment) == []
    post(slow, "Later", shares=True)
    assert load_received(deployment) == []
    assert deployment.query("SELECT given FROM fhir.patient") == [("Later",)]
    post(fast, "Permits", shares=True)
    post(slow, "Denies", shares=False)
    assert load_received(deployment) == []
    assert deployment.query("SELECT given FROM fhir.patient") == []

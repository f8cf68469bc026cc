"""Clients of scripted servers, with a clock that advances only while the client waits."""

from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.retries import Retrier, RetryPolicy


class Clock:
    """A clock that advances only in ``sleep``. ``waits`` are the seconds of each sleep."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        """Advance the clock."""
        self.waits.append(seconds)
        self.now += seconds


def build_client(
    url: str, clock: Clock | None = None, *, auth: Credentials | None = None, **policy: float
) -> FhirClient:
    """Return a client whose retries have no jitter and follow ``policy``, the members of a RetryPolicy."""
    clock = clock or Clock()
    retry = RetryPolicy(**policy)  # type: ignore[arg-type]
    return FhirClient(
        url, credentials=auth, timeout=5, retrier=Retrier(retry, clock.sleep, lambda: clock.now, lambda: 1)
    )

"""The HTTP session of every client that uses ``requests``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from fhir_assets.fhir.transport.body import decode_answer, read_answer
from fhir_assets.fhir.transport.connections import limit_pools
from fhir_assets.fhir.transport.limits import AnswerLimits


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. ``body`` is decompressed."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Session(requests.Session):
    """A session whose answers have limits, and that follows no redirect.

    Each client decides itself which addresses it sends its credentials to. ``requests`` would also parse the address of
    a redirect that it does not follow, and fail if it is not a URL.
    """

    def __init__(self, limits: AnswerLimits, *, connections: int = 1) -> None:
        super().__init__()
        self._limits = limits
        self.headers["Accept-Encoding"] = "gzip, deflate"
        adapter = _Adapter(limits, pool_connections=1, pool_maxsize=connections, pool_block=True)
        self.mount("http://", adapter)
        self.mount("https://", adapter)

    def resolve_redirects(self, *args: Any, **options: Any) -> Iterator[requests.Response]:
        """Return nothing."""
        return iter(())

    def exchange(self, method: str, url: str, **options: Any) -> Answer:
        """Send a request and return the complete answer.

        Raises ``requests.RequestException``, LimitExceeded, TransientFailure for a damaged body, and NotFhir for one
        with an unknown compression.
        """
        with self.request(method, url, stream=True, **options) as response:
            raw = read_answer(lambda size: response.raw.read1(size, decode_content=False))
            return Answer(response.status_code, response.headers, decode_answer(raw, response.headers, self._limits))


class _Adapter(HTTPAdapter):
    """The connections of a session, with limits, directly or through a proxy."""

    def __init__(self, limits: AnswerLimits, **options: Any) -> None:
        self._limits = limits
        super().__init__(**options)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Create the pool of direct connections."""
        super().init_poolmanager(*args, **options)
        limit_pools(self.poolmanager, self._limits)

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        """Return the pool of connections through a proxy."""
        manager = super().proxy_manager_for(*args, **options)
        limit_pools(manager, self._limits)
        return manager

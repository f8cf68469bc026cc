"""The HTTP session of every client that uses ``requests``."""

from collections.abc import Iterator
from typing import Any

import requests


class Session(requests.Session):
    """A session that follows no redirect: each client decides which addresses it sends its credentials to.

    ``requests`` would also parse the address of a redirect that it does not follow, and fail if it is not a URL.
    """

    def resolve_redirects(self, *args: Any, **options: Any) -> Iterator[requests.Response]:
        """Return nothing."""
        return iter(())

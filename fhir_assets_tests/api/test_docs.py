"""The pages that show the OpenAPI document work without the internet."""

import re
from urllib.parse import urljoin

import pytest

from fhir_assets.api.docs import FILES
from fhir_assets_tests.support.api import Api, role_secret

TYPES = {".js": "text/javascript", ".css": "text/css", ".png": "image/png"}


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_a_page_names_no_other_server_and_each_of_its_files_is_served(api: Api, page: str) -> None:
    answer = api.get(page, role="reader")
    assert answer.status_code == 200
    assert not re.findall(r"[\"'(]\s*(?:https?:)?//", answer.text)
    policy = answer.headers["Content-Security-Policy"]
    assert "http" not in policy
    assert "script-src 'self'" in policy
    files = re.findall(r"(?:src|href|spec-url)=\"([^\"]+)\"", answer.text)
    assert [name for name in files if name.endswith(".js")]
    for name in files:
        loaded = api.get(urljoin(page, name), role="reader")
        assert loaded.status_code == 200, name
        assert loaded.content
    assert "/openapi.json" in answer.text


def test_the_files_have_types_and_need_a_token_that_a_browser_asks_for(api: Api) -> None:
    for name in FILES:
        path = f"/docs/files/{name}"
        # A browser sends what it has asked for as Basic authentication.
        loaded = api.get(path, role=None, auth=("", role_secret("reader")))
        assert loaded.headers["Content-Type"].startswith(TYPES[name[name.rindex(".") :]])
        refused = api.get(path, role=None)
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, 'Basic realm="fhir_assets"')
    for name in ("unknown.js", "..%2F__init__.py", "%2e%2e%2fcore.py"):
        assert api.get(f"/docs/files/{name}", role="reader").status_code == 404

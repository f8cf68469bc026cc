"""The bodies of posts: JSON in UTF-8. Any other body is answered with 415, its format and the expected one."""

from collections.abc import Mapping

from fhir_assets.api.problems import Problem

_BOM = b"\xef\xbb\xbf"
_MARKS = (
    (b"\x1f\x8b", "compressed with gzip", "send it uncompressed"),
    (b"(\xb5/\xfd", "compressed with zstd", "send it uncompressed"),
    (b"PK\x03\x04", "a ZIP file", "send its content as JSON"),
    (b"\xff\xfe", "in UTF-16", "send it in UTF-8"),
    (b"\xfe\xff", "in UTF-16", "send it in UTF-8"),
    (b"<", "XML or HTML", "send FHIR as JSON"),
)
_NDJSON = "NDJSON", "send a JSON array or a Bundle, or put the file into the landing zone"
_MEDIA_TYPES = (
    ("xml", "XML", "send FHIR as JSON"),
    ("ndjson", *_NDJSON),
    ("jsonl", *_NDJSON),
    ("gzip", "compressed with gzip", "send it uncompressed"),
    ("zip", "a ZIP file", "send its content as JSON"),
    ("csv", "CSV", "send JSON, or put the file into the landing zone"),
    ("multipart", "a form", "send JSON"),
)


def read_json_body(body: bytes, headers: Mapping[str, str]) -> bytes:
    """Return a body without a byte order mark.

    Raises Problem with status 415 if the headers or the first bytes show that the body is not JSON in UTF-8. If the
    media type is missing or unspecific, the first bytes decide.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise _refuse("compressed (Content-Encoding)", "send it uncompressed")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if "json" not in media_type or "ndjson" in media_type or "jsonl" in media_type:
        for name, what, advice in _MEDIA_TYPES:
            if name in media_type:
                raise _refuse(what, advice)
    text = body.removeprefix(_BOM)
    start = text[:64].lstrip()
    for mark, what, advice in _MARKS:
        if start.startswith(mark):
            raise _refuse(what, advice)
    if start[:1] == b"{" and _is_lines(text):
        raise _refuse(*_NDJSON)
    return text


def _is_lines(text: bytes) -> bool:
    """Return whether the text is NDJSON: its first line is an object, and another object follows."""
    first, _, rest = text.lstrip().partition(b"\n")
    return first.rstrip().endswith(b"}") and rest.lstrip()[:1] == b"{"


def _refuse(what: str, advice: str) -> Problem:
    return Problem(415, f"the body is {what}, which is not received here: {advice}")

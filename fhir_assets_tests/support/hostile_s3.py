"""A server of S3 that lies at random: about the objects that it has, their sizes and names, and the next page."""

import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qs, quote

from fhir_assets_tests.support.hostile_answers import Lie, LyingServer, build_answer

ROLES = ("list", "get", "put", "post", "delete")
PREFIX = "some/prefix/"
LINE = b'{"resourceType":"Patient","id":"p","meta":{"lastUpdated":"2024-01-05T10:00:00Z"}}\n'
KEYS = (
    *("../out.ndjson", "../../../out.ndjson", "/etc/passwd.ndjson", "a/./b.ndjson", "a//b.ndjson", "..", "/", ""),
    *("new\nline.ndjson", "\x1b[2J.ndjson", "\0.ndjson", "\x7f.csv", "n" * 1020 + ".ndjson", "caf\udce9.ndjson"),
    *("a.ndjson", "a.ndjson", "a.csv", "a.json", "b.ndjson.gz", "a.done", ".hidden.ndjson", "a.ndjson/b.ndjson"),
    *("raw/patient/2024/manifest.json", "raw/part-1.ndjson.gz", "raw/a/b/c/part-1.ndjson.gz", "manifest.json"),
)
TOKENS = ("~", "same", "", None, "\x1b" * 2000)
SIZES = ("0", "-1", "9" * 30, "x", "", None)
TIMES = ("2024-01-05T10:00:00.000Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "never", "", "9" * 30)
ETAGS = ('"e~"', "", None, "x" * 200_000)
BODIES = (
    *(b"", b"<html>no</html>", b"<a>" * 100_000, b"<Error><Code>NoSuchKey</Code></Error>", b"\xff\xfe", b"\0" * 99),
    *(b"<Error>" + b"<Code>" * 5000 + b"</Code>" * 5000 + b"</Error>", b"<Error><Code>SlowDown</Code></Error>"),
    b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><Error><Code>&b;</Code></Error>',
    b"<Error><Code>PermanentRedirect</Code><Endpoint>127.0.0.2</Endpoint><Region>a.b/c</Region></Error>",
    *(b"<ListBucketResult>" + b"<Contents/>" * 300_000, b"<ListBucketResult><Contents>x</Contents></ListBucketResult>"),
    *(LINE * 20_000, gzip.compress(LINE * 3), gzip.compress(bytes(1 << 24)) * 20, b"{}" * 5000, b"[" * 99_999),
    *(
        b"visit_id,visit_date\n" + b"1,\n" * 5000,
        b'{"layer":"raw","parts":[]}',
        b"\x1f\x8b\x08\x08\0\0\0\0\0\0" + b"n" * 99_999,
    ),
)


@dataclass(frozen=True, slots=True)
class S3Lie(Lie):
    """What differs from a right answer, also in a listing, which is endless if ``token`` always differs."""

    keys: tuple[str, ...] = ("a.ndjson", "new.ndjson")
    token: str | None = None
    truncated: bool = False
    size: str | None = str(len(LINE))
    modified: str = "2024-01-05T10:00:00.000Z"
    etag: str | None = '"e"'


class HostileS3(LyingServer):
    """A server whose lies are those of its roles. Its bucket has one object, unless the listing says otherwise."""

    def answer(self, head: bytes) -> Iterable[bytes]:
        """Return the pieces of the answer to a request."""
        self.requests += 1
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].decode("latin-1")
        role = "list" if method == b"GET" and "list-type=2" in path else method.decode("latin-1").lower()
        lie = self.lies.get(role, S3Lie())
        assert isinstance(lie, S3Lie)
        headers = {"Content-Type": "application/xml", "x-amz-request-id": "1"}
        if lie.etag is not None:
            headers["ETag"] = lie.etag.replace("~", str(self.requests))
        body = b""
        if role == "list":
            prefix = parse_qs(path.partition("?")[2])["prefix"][0]
            body = self._list(lie, [key for key in lie.keys if role in self.lies or (PREFIX + key).startswith(prefix)])
        elif role == "get":
            body = LINE
        elif role == "post":
            upload = b"<UploadId>u</UploadId>" if "uploads" in path else b""
            body = b"<Result><Bucket>b</Bucket><Key>k</Key>%s</Result>" % upload
        status = lie.status or (204 if role == "delete" else 200)
        if lie.link is not None:
            headers["Location"] = self.link(lie.link)
            headers["x-amz-bucket-region"] = self.link(lie.link).rpartition("/")[2]
        return build_answer(lie, status, headers, body)

    def _list(self, lie: S3Lie, keys: Iterable[str]) -> bytes:
        token = None if lie.token is None else lie.token.replace("~", str(self.requests))
        entries = "".join(
            "<Contents>"
            + f"<Key>{quote((PREFIX + key).encode('utf-8', 'surrogateescape'))}</Key>"
            + f"<LastModified>{lie.modified}</LastModified>"
            + ("" if lie.etag is None else f"<ETag>{lie.etag}</ETag>")
            + ("" if lie.size is None else f"<Size>{lie.size}</Size>")
            + "</Contents>"
            for key in keys
        )
        return (
            "<ListBucketResult><Name>b</Name><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(lie.truncated).lower()}</IsTruncated>"
            + ("" if token is None else f"<NextContinuationToken>{quote(token)}</NextContinuationToken>")
            + entries
            + "</ListBucketResult>"
        ).encode()

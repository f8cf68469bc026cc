"""Places: what an encrypted value belongs to. A value that was moved to another place is not decrypted.

The place of a value is the associated data of its encryption (RFC 5116, section 2.1). Its parts do not change while the
value is stored: statements copy the resource of a row from ``fhir.resource`` to ``ops.withheld`` and back, and to
``ops.consent_records``, and that of a dead letter to its correction, so these tables share the place of a resource, or
of a dead letter.
"""

from typing import NamedTuple


class Place(NamedTuple):
    """A column of a table, a source, and the key of the row. ``table`` and ``column`` may appear in messages."""

    table: str
    column: str
    source: str
    key: str

    @property
    def associated_data(self) -> bytes:
        """The place as bytes. Only the key, which is the last part, can contain the separator."""
        table, column, source, key = self
        return f"{table}\0{column}\0{source}\0{key}".encode("utf-8", "surrogatepass")


def resource_place(source: str, resource_type: str, resource_id: str) -> Place:
    """Return the place of a resource, whether it is loaded, withheld or recorded as a Consent."""
    return Place("fhir.resource", "resource", source, f"{resource_type}/{resource_id}")


def resource_associated_data(source: str, resource_type: str, resource_id: str) -> bytes:
    """Return the associated data of the place of a resource. A load calls this once for each resource."""
    return f"fhir.resource\0resource\0{source}\0{resource_type}/{resource_id}".encode("utf-8", "surrogatepass")


def value_place(view: str, column: str, source: str, resource_id: str) -> Place:
    """Return the place of a value in the table of a view. All rows of a resource have the same."""
    return Place(table_in_places(view), column, source, resource_id)


def table_in_places(view: str) -> str:
    """Return the ``table`` of the places in the table of a view."""
    return f"fhir.{view}"


def dead_letter_place(source: str, fingerprint: bytes) -> Place:
    """Return the place of the resource of a dead letter, also as the original of a correction."""
    return Place("ops.dead_letters", "resource", source, fingerprint.hex())


def correction_place(source: str, fingerprint: bytes) -> Place:
    """Return the place of the resource that corrects the dead letter with a fingerprint."""
    return Place("ops.corrections", "resource", source, fingerprint.hex())


def answer_place(key: bytes) -> Place:
    """Return the place of the stored response to an API request."""
    return Place("ops.idempotency", "answer", "", key.hex())


def landing_name_place(source: str, zone: str, label: str) -> Place:
    """Return the place of the name of a file of a landing zone; ``label`` stands for it in its row."""
    return Place("ops.landing_files", "name", source, f"{zone}\0{label}")


SECRET_PLACE = Place("ops.encryption", "secret", "", "")
"""The place of the secret of the keyed hashes."""


FILE = "file"
"""The ``column`` of the places of files."""


def file_place(folder: str, source: str, name: str) -> Place:
    """Return the place of a file: ``folder`` is ``store`` or ``landing zone``, ``name`` the path in it."""
    return Place(folder, FILE, source, name)


def frame_place(file: Place, number: int) -> Place:
    """Return the place of a frame of a file. The frames are numbered from 0."""
    return file._replace(key=f"{file.key}\0{number}")


def undelivered_place(column: str, resource_type: str, resource_id: str | None, location: str) -> Place:
    """Return the place of a resource in the journal of an upload, or of the server's answer to it."""
    return Place("the journal of the upload", column, "", f"{resource_type}/{resource_id or ''}/{location}")

"""The names of a FHIR server's settings in error messages.

The modules of ``fhir`` do not read settings themselves. A caller that reads them from environment variables passes the
names of the variables, so that a message states which variable to change.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLabels:
    """The names of settings in error messages. Each name is a noun phrase."""

    base_url: str = "the base URL"
    link_base: str = "the link base"
    username: str = "the user name"
    password: str = "the password"
    token: str = "the token"
    client_id: str = "the client id"
    private_key: str = "the private key"
    scope: str = "the scope"
    token_url: str = "the token URL"
    timeout: str = "the timeout"
    page_size: str = "the page size"
    resource_types: str = "the resource types"
    deletions: str = "the reading of deletions"
    export_level: str = "the export level"
    type_filter: str = "the type filter of an export"
    export_days: str = "the time limit of an export"
    answer_seconds: str = "the time limit of an answer"
    answer_bytes: str = "the size limit of an answer"
    max_pages: str = "the limit of pages"
    file_seconds: str = "the time limit of a file"
    file_bytes: str = "the size limit of a file"
    max_files: str = "the limit of files of an export"
    file_origins: str = "the origins of files"
    file_source: str = "files as the source"


DEFAULT_LABELS = ServerLabels()

"""Names of the settings of a FHIR server, as error messages show them.

The modules below ``fhir`` do not know where their settings come from. A caller that reads them from environment
variables passes the names of the variables, so that a message says which variable to change.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLabels:
    """The names by which error messages refer to settings. Each one fits into a sentence as a noun."""

    base_url: str = "the base URL"
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
    file_source: str = "files as the source"


DEFAULT_LABELS = ServerLabels()

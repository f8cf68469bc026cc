"""The environment variables that error messages of FHIR clients name, for each account of the deployment."""

from fhir_assets.fhir.labels import ServerLabels

SOURCE_LABELS = ServerLabels(
    base_url="FHIR_BASE_URL",
    link_base="FHIR_LINK_BASE",
    username="FHIR_AUTH_USERNAME",
    password="FHIR_AUTH_PASSWORD",
    token="FHIR_AUTH_TOKEN",
    client_id="FHIR_AUTH_CLIENT_ID",
    private_key="FHIR_AUTH_PRIVATE_KEY",
    scope="FHIR_AUTH_SCOPE",
    token_url="FHIR_AUTH_TOKEN_URL",
    timeout="FHIR_TIMEOUT_SECONDS",
    page_size="FHIR_PAGE_SIZE",
    resource_types="FHIR_RESOURCE_TYPES",
    deletions="FHIR_DELETES",
    export_level="FHIR_BULK_LEVEL",
    type_filter="FHIR_BULK_TYPE_FILTER",
    export_days="FHIR_BULK_DAYS",
    answer_seconds="FHIR_ANSWER_SECONDS",
    answer_bytes="FHIR_ANSWER_BYTES",
    max_pages="FHIR_MAX_PAGES",
    file_seconds="FHIR_BULK_FILE_SECONDS",
    file_bytes="FHIR_BULK_FILE_BYTES",
    max_files="FHIR_BULK_MAX_FILES",
    file_origins="FHIR_FILE_ORIGINS",
    file_source="FHIR_SOURCE=ndjson",
)
"""The server that resources are loaded from and that `fhir-assets upload` writes to."""

DELIVERY_LABELS = ServerLabels(
    base_url="FHIR_DELIVERY_URL",
    username="FHIR_DELIVERY_USERNAME",
    password="FHIR_DELIVERY_PASSWORD",
    token="FHIR_DELIVERY_TOKEN",
    client_id="FHIR_DELIVERY_CLIENT_ID",
    private_key="FHIR_DELIVERY_PRIVATE_KEY",
    scope="FHIR_DELIVERY_SCOPE",
    token_url="FHIR_DELIVERY_TOKEN_URL",
    timeout="FHIR_TIMEOUT_SECONDS",
    answer_seconds="FHIR_ANSWER_SECONDS",
    answer_bytes="FHIR_ANSWER_BYTES",
    page_size="FHIR_PAGE_SIZE",
    resource_types="FHIR_RESOURCE_TYPES",
)
"""The server that the assets ``delivered/<type>`` write to."""

CONNECTOR_LABELS = ServerLabels(
    base_url="CONNECTOR_URL",
    username="CONNECTOR_AUTH_USERNAME",
    password="CONNECTOR_AUTH_PASSWORD",
    token="CONNECTOR_AUTH_TOKEN",
    client_id="CONNECTOR_AUTH_CLIENT_ID",
    private_key="CONNECTOR_AUTH_PRIVATE_KEY",
    scope="CONNECTOR_AUTH_SCOPE",
    token_url="CONNECTOR_AUTH_TOKEN_URL",
    timeout="FHIR_TIMEOUT_SECONDS",
    answer_seconds="FHIR_ANSWER_SECONDS",
    answer_bytes="FHIR_ANSWER_BYTES",
)
"""The server that the connector writes to, if it is not the one of ``SOURCE_LABELS``."""

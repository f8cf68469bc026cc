"""The hospital whose outbox the tests of the connector deliver."""

from fhir_assets_tests.support.hospital import hospital  # noqa: F401

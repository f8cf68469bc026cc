"""Fixtures of the tests of the warehouse."""

from fhir_assets_tests.support.database_users import user as user

"""The upload command of a test."""

from fhir_assets_tests.support.uploads import upload as upload

"""The fixtures of the end-to-end tests."""

from fhir_assets_tests.support.deployment import deploy as deploy
from fhir_assets_tests.support.hapi import hapi as hapi
from fhir_assets_tests.support.uploads import upload as upload

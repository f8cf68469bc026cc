"""With keys, the shipped views store names, addresses, telecoms, identifiers and comments of persons encrypted."""

import json
import re
from datetime import UTC, datetime
from functools import cache

import pytest

from fhir_assets.catalog import CATALOG
from fhir_assets.deployment.views import build_views
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher, new_secret
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.settings import load_settings
from fhir_assets_tests.support.saturated_resources import saturated_resources

CIPHER = Cipher(parse_keys([new_key()]), new_secret())

PERSONAL_DATA = re.compile(
    rb"HumanName\.(?!use)\w+|Address\.(?:text|line|city|district|postalCode)|ContactPoint\.value|Identifier\.value"
    rb"|Annotation\.\w+|Attachment\.(?:url|title|data)"
)
"""Matches strings of saturated resources: each string contains the path of its element."""

NOT_PERSONS = {"Organization", "Location"}
"""The types whose names and addresses are not personal data and are stored as clear text."""


@cache
def load_shipped_views() -> tuple[View, ...]:
    """Return all shipped views, read once."""
    return tuple(build_views(load_settings()).views)


def build_view_rows(resource_type: str, cipher: Cipher) -> dict[str, bytes]:
    """Return the rows of each view of a type, as they are copied into its table."""
    views = [view for view in load_shipped_views() if view.resource_type == resource_type]
    build_rows = RowBuilder(views, cipher, "default")
    lines = [json.dumps(resource).encode() for resource in saturated_resources(resource_type)]
    built = build_rows(Batch(lines, "2020-02-03", datetime.now(UTC)))
    assert built.block, built.rejected
    return {view.name: texts.text for view, texts in zip(views, built.block.view_lines, strict=True)}


@pytest.mark.parametrize("resource_type", [t.name for t in CATALOG if t.name not in NOT_PERSONS])
def test_personal_data_is_encrypted_in_every_view(resource_type: str) -> None:
    for view, text in build_view_rows(resource_type, CIPHER).items():
        assert set(PERSONAL_DATA.findall(text)) == set(), view


def test_without_keys_personal_data_is_clear_text() -> None:
    clear = build_view_rows("Patient", NO_ENCRYPTION)
    assert {name for name, text in clear.items() if PERSONAL_DATA.search(text)} >= {
        "patient",
        "patient_name",
        "patient_address",
        "patient_contact",
        "patient_identifier",
        "patient_telecom",
    }

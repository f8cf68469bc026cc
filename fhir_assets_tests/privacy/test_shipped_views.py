"""No shipped view holds a person's name, address, telecom, identifier or comment in the clear, once there are keys."""

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

PERSONAL = re.compile(
    rb"HumanName\.(?!use)\w+|Address\.(?:text|line|city|district|postalCode)|ContactPoint\.value|Identifier\.value"
    rb"|Annotation\.\w+|Attachment\.(?:url|title|data)"
)
"""A string of a saturated resource says where it stands."""

NOBODYS = {"Organization", "Location"}
"""Houses are no persons: their names and addresses are in the clear."""


@cache
def shipped() -> tuple[View, ...]:
    """All shipped views, read once."""
    return tuple(build_views(load_settings()).views)


def rows(resource_type: str, cipher: Cipher) -> dict[str, bytes]:
    """The rows of each view of a type, as they are copied into its table."""
    views = [view for view in shipped() if view.resource_type == resource_type]
    make = RowBuilder(views, cipher)
    lines = [json.dumps(resource).encode() for resource in saturated_resources(resource_type)]
    made = make(Batch(lines, "2020-02-03", datetime.now(UTC)))
    assert made.block, made.rejected
    return {view.name: texts.text for view, texts in zip(views, made.block.view_lines, strict=True)}


@pytest.mark.parametrize("resource_type", [each.name for each in CATALOG if each.name not in NOBODYS])
def test_what_tells_a_person_is_sealed_in_every_view(resource_type: str) -> None:
    for view, text in rows(resource_type, CIPHER).items():
        assert set(PERSONAL.findall(text)) == set(), view


def test_without_keys_the_same_would_be_found() -> None:
    clear = rows("Patient", NO_ENCRYPTION)
    assert {name for name, text in clear.items() if PERSONAL.search(text)} >= {
        "patient",
        "patient_name",
        "patient_address",
        "patient_contact",
        "patient_identifier",
        "patient_telecom",
    }

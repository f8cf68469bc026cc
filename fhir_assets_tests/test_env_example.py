"""``.env.example`` names every setting of the project, and no other variable."""

import re
from pathlib import Path

from fhir_assets.settings import Settings

NAMED = re.findall(r"^#?([A-Z][A-Z0-9_]+)=", (Path(__file__).parent.parent / ".env.example").read_text(), re.MULTILINE)


def test_it_names_every_setting_once_and_no_other() -> None:
    assert sorted(NAMED) == sorted(name.upper() for name in Settings.model_fields)

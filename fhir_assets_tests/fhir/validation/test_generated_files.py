"""The generated data files of the package are up to date with the published definitions (``make rules``)."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.fhir import build_model
from fhir_assets.fhir.validation import build_rules
from fhir_assets.fhir.validation.rules import RULES_FILE

DEFINITIONS = Path(__file__).resolve().parents[3].parent / "shared" / "fhir-r4"


@pytest.mark.skipif(not DEFINITIONS.is_dir(), reason=f"the R4 definitions are not in {DEFINITIONS}")
@pytest.mark.parametrize(
    ("build", "encode", "file"),
    [
        (build_rules.build, build_rules.encode, RULES_FILE),
        (build_model.build, build_model.encode, build_model.MODEL_FILE),
    ],
    ids=["rules", "model"],
)
def test_rebuilding_a_generated_file_gives_the_same_content(
    build: Callable[[Path], dict[str, Any]], encode: Callable[[dict[str, Any]], bytes], file: Path
) -> None:
    rebuilt = encode(build(DEFINITIONS))
    assert gzip.decompress(rebuilt) == gzip.decompress(file.read_bytes())
    assert rebuilt[4:8] == bytes(4), "the gzip header has a time stamp"

"""The IO manager ``ndjson`` describes committed partitions. What nobody has committed it refuses, so it is not lost."""

from unittest.mock import Mock

import dagster as dg
import pytest

from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.io_managers.ndjson import NdjsonIOManager
from fhir_assets.pipeline.fetch.step import RawUpdate


def test_an_output_that_no_step_has_committed_is_refused_by_name() -> None:
    manager = NdjsonIOManager(Mock(), Mock())
    with pytest.raises(ConfigurationError, match="cannot store a RawUpdate"):
        manager.handle_output(dg.build_output_context(), RawUpdate("Patient", (), {}))  # type: ignore[arg-type]

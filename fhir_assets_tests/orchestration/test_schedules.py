"""The cron expressions of the schedules are checked when the definitions are built."""

import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import load_settings


@pytest.mark.parametrize("variable", ["FHIR_SCHEDULE", "CHECKS_SCHEDULE"])
@pytest.mark.parametrize("value", ["every day", "* * * *", "61 * * * *", "0 0 30 2 *"])
def test_an_invalid_cron_expression_is_refused_with_the_name_of_its_variable(variable: str, value: str) -> None:
    settings = load_settings(**{variable.lower(): value})
    with pytest.raises(ConfigurationError, match=f"{variable} is not a cron expression: '"):
        build_definitions(settings)

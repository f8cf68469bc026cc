"""The time up to which a bulk export is complete, if the server's clock is far from ours."""

from datetime import UTC, datetime

from fhir_assets.fhir.bulk.transaction_time import bound_transaction_time
from fhir_assets.windows import EARLIEST, LATEST

NOW = datetime(2026, 1, 5, tzinfo=UTC)


def test_a_date_header_at_the_end_of_time_does_not_move_the_bound() -> None:
    bound = bound_transaction_time(
        NOW, since=EARLIEST, requested_at=NOW, kick_off_date=LATEST, answer_date=LATEST, now=NOW
    )
    assert bound == NOW

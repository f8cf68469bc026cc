"""The days and resource types of the small populations that several tests load."""

from datetime import UTC, datetime

START = datetime(2024, 1, 1, tzinfo=UTC)
END = datetime(2024, 1, 3, tzinfo=UTC)
RESOURCE_TYPES = "Patient,Encounter,Observation"

"""Names that runs, steps and sensors share: run tags and pools."""

FHIR_SERVER_POOL = "fhir_server"
"""Dagster's pool of all steps that call the FHIR server, for operators: FHIR_MAX_CONNECTIONS holds without it."""

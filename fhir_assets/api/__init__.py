"""The HTTP API: intake, look-ups, runs. See app.py."""

WORKERS = "FHIR_ASSETS_API_WORKERS"
"""Environment variable: how many worker processes share a token's rate. `fhir-assets api` sets it for its own."""

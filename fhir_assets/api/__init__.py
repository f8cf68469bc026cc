"""The HTTP API: intake of records, patient look-ups and runs.

``app.py`` assembles the application. The modules of routes parse requests, call ``pipeline`` and ``warehouse``, and
build answers; SQL and business rules do not belong here.
"""

WORKERS_VARIABLE = "FHIR_ASSETS_API_WORKERS"
"""Environment variable with the number of worker processes that share the request rate of a token. `fhir-assets api`
sets it for its workers.
"""

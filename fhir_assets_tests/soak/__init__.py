"""A deployment under traffic, kills and outages for as long as one wants: ``python -m fhir_assets_tests.soak``."""

"""Tests of fhir_assets.ingestion."""

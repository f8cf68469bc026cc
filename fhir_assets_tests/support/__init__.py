"""Shared test helpers. Tests import from here and from the product, never from each other."""

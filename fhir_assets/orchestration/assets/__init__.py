"""The assets, one module for each key prefix."""

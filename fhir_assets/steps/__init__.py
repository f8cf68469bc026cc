"""What the steps of a load do: fetch, validate and load windows of resource types. Nothing here imports Dagster.

The assets of ``orchestration`` call these functions and show their results. The command line and the post loader call
them without Dagster, and report afterwards or meanwhile.
"""

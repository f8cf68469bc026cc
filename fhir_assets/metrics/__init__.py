"""Prometheus metrics of a process and of a deployment's database."""

"""Measurements: `python -m profiling <what>`."""

"""Benchmarks: ``python -m benchmarks.NAME --json`` prints one JSON object a line; without ``--json`` a table."""

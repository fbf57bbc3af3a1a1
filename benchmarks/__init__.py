"""Measurements behind the project's claims; ``python -m benchmarks.<name>`` from the checkout. See README.md."""

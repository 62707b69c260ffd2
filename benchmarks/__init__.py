"""Timings of the operators, checked and comparable: ``python -m benchmarks --help``, from a checkout."""

"""Measure what authentication costs. `make bench` writes docs/benchmarks/."""

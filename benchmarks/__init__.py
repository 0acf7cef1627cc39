"""What authentication costs, measured: `make bench` writes docs/benchmarks/."""

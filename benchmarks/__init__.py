"""Speed against torch, measured: ``python -m benchmarks``."""

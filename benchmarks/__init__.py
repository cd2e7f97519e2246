"""Benchmarks of the losses: `python -m benchmarks` in a checkout, `fastkd bench` anywhere (docs/benchmarks.md)."""

"""Benchmarks of the losses: `python -m benchmarks` runs all, `python -m benchmarks.bench_nfd` one."""

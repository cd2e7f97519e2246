"""All benchmarks, one table."""

from . import bench_cwd, bench_kd, bench_nfd
from .harness import main

main(bench_nfd.CASES + bench_kd.CASES + bench_cwd.CASES)

"""All benchmarks, one table."""

from . import bench_cwd, bench_kd, bench_nfd, bench_rdd, bench_resized_cross_entropy, bench_resized_kd
from .harness import main

FAMILIES = (bench_nfd, bench_kd, bench_cwd, bench_resized_cross_entropy, bench_resized_kd, bench_rdd)

main([case for family in FAMILIES for case in family.CASES])

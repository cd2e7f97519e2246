"""`python -m benchmarks`: times the losses on this machine; for GPUs, predictions and measurements."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastkd import backends

from .cases import LOSSES, cases, gpu_cases
from .harness import DEVICE, RESULTS, measure, read, rows
from .report import PREDICTION, losses_table, origin, predictions_table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=tuple(LOSSES), help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    parser.add_argument(
        "--resume", action="store_true", help="skip cases that the CSV has from this commit and machine"
    )
    parser.add_argument("--seconds", type=float, help="seconds of timing per case")
    args = parser.parse_args()
    if (reason := backends.why_not("cpu" if DEVICE == "cpu" else "triton")) is not None:
        sys.exit(f"nothing to measure: {reason}")
    path = args.out / f"{DEVICE}.csv"
    wanted = cases(DEVICE, args.losses)
    records = measure(wanted, path, resume=args.resume, seconds=args.seconds)
    if records:
        print(f"Measured: {origin(records[0])}\n\n{losses_table(rows(records), {c.key: c.targets for c in wanted})}\n")
    print(f"{PREDICTION}\n\n{predictions_table(gpu_cases(), rows(read(args.out / 'cuda.csv')))}")


if __name__ == "__main__":
    main()

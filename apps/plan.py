"""Tells whether training fits a number of GPUs, before it starts and without any.

    python apps/plan.py [CONFIG.yaml ...] [world=HOSTSxGPUS] [hbm=GIB] [plan.num_items=N] [key=value ...]

It prints the sharding plan, what a rank holds, what it sends in a step and how evenly steps are dealt; the
exit code is 1 when it does not fit. `help` lists the keys; `apps/benchmark.py memory` measures the same.
"""

import sys

from hstu_rec.config import help_text, load, run_app
from hstu_rec.planning import PlannedRun, report


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        print(f"{__doc__}\n{help_text(PlannedRun)}")
        return
    text, fits = report(load(PlannedRun, arguments))
    print(text)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    run_app(main)

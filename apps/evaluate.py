"""Measures a finished run's best checkpoint again, at any number of processes.

python apps/evaluate.py RUN_FOLDER [key=value ...]

The keys are eval.*, data.path, train.device, train.precision, encoder.attention_kernel and table.sharding, as
in apps/train.py (python apps/train.py help), for example eval.min_train_count=20. Prints a table and, as its
last line, JSON.
"""

import json
from pathlib import Path
from typing import Any

from hstu_rec import distributed
from hstu_rec.config import run_app
from hstu_rec.report import metric_table
from hstu_rec.trainer import evaluate_run


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        print(__doc__)
        return
    if not arguments or "=" in arguments[0]:
        raise ValueError(
            "give the run's folder: python apps/evaluate.py RUN_FOLDER [key=value ...]"
        )
    result = evaluate_run(Path(arguments[0]), arguments[1:])
    if distributed.launched_rank() == 0:
        print(metric_table(result))
        print(json.dumps(_printed(result)))


def _printed(result: dict[str, Any]) -> dict[str, Any]:
    """Validation and test, and with eval.min_train_count the test over frequent targets alone."""
    printed = {part: result[part] for part in ("valid", "test")}
    protocol = result["protocol"]
    if least := protocol.get("min_train_count"):
        printed["frequent"] = {
            "min_train_count": least,
            "num_targets": protocol["num_frequent_targets"],
            "test": result["further"][f"model, {least}+ events"],
        }
    return printed


if __name__ == "__main__":
    run_app(main)

"""Measures a finished run's best checkpoint again, at any number of processes.

python apps/evaluate.py RUN_FOLDER [key=value ...]

It prints a table, or with json=true the figures as one line of JSON. `help` lists the keys, whose defaults
here are what the run was trained with.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_rec import distributed
from hstu_rec.config import RunConfig, help_text, load, run_app
from hstu_rec.report import summary
from hstu_rec.runs import MEASURING_KEYS
from hstu_rec.trainer import evaluate_run


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How the figures are printed."""

    json: bool = False


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        print(f"{__doc__}\n{help_text(RunConfig, MEASURING_KEYS)}")
        return
    if not arguments or "=" in arguments[0]:
        raise ValueError(
            "give the run's folder: python apps/evaluate.py RUN_FOLDER [key=value ...]"
        )
    overrides = [one for one in arguments[1:] if not one.startswith("json=")]
    wishes = [one for one in arguments[1:] if one.startswith("json=")]
    is_json = load(Shown, wishes).json
    result = evaluate_run(Path(arguments[0]), overrides)
    if distributed.launched_rank() == 0:
        print(json.dumps(_printed(result)) if is_json else summary(result), flush=True)


def _printed(result: dict[str, Any]) -> dict[str, Any]:
    """Figures of validation and test, and what the settings of eval.* add."""
    shown = ("valid", "test", "groups", "recommended", "examples")
    printed = {part: result[part] for part in shown if part in result}
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

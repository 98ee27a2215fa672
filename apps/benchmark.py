"""Times training on this machine, or measures how good its models are.

    python apps/benchmark.py step [CONFIG.yaml ...] [key=value ...]     jagged histories, and the same padded
    python apps/benchmark.py epoch [CONFIG.yaml ...] [key=value ...]    whole epochs, without validation
    python apps/benchmark.py curve [CONFIG.yaml ...] [key=value ...]    test figures after every epoch
    python apps/benchmark.py attention [key=value ...]                  attention alone, by shape
    python apps/benchmark.py quality RECIPE.yaml ... [quality.key=value ...] [key=value ...]

torchrun and torchx launch step, epoch and curve on several ranks, as they do apps/train.py. quality trains
every recipe with several seeds, in processes that it launches itself, and writes quality.md, quality.json and
quality.png: mean and deviation over seeds beside published figures and baselines. Runs that are done are not
run again. quality.* are its own settings; every other key=value is given to all runs. `help` lists its keys.
"""

import sys
from datetime import date
from typing import Any

from hstu_rec import distributed
from hstu_rec.attention_benchmark import AttentionTimes, attention_times
from hstu_rec.benchmark import compare_steps, figures_by_epoch, time_epochs
from hstu_rec.config import RunConfig, help_text, load, run_app
from hstu_rec.quality import QualitySettings, quality
from hstu_rec.versions import versions

MEASURES: dict[str, Any] = {"step": compare_steps, "epoch": time_epochs, "curve": figures_by_epoch}


def main(arguments: list[str]) -> None:
    measure, options = "".join(arguments[:1]), arguments[1:]
    if {"help", "--help", "-h"} & set(arguments):
        keys = [help_text(QualitySettings), "Keys of attention:\n", help_text(AttentionTimes)]
        print("\n".join([__doc__ or "", *keys]))
    elif measure == "quality":
        sys.exit(0 if quality(options) else 1)
    elif measure in (*MEASURES, "attention"):
        show(measure, options)
    else:
        raise ValueError(
            f"give what to measure, {', '.join(MEASURES)}, attention or quality; got {measure or 'nothing'}: "
            "python apps/benchmark.py step [CONFIG.yaml ...] [key=value ...]"
        )


def show(measure: str, options: list[str]) -> None:
    schema: Any = RunConfig if measure in MEASURES else AttentionTimes
    config = load(schema, options)
    choice = config.train.device if measure in MEASURES else "auto"
    with distributed.process_group(choice) as device:
        if distributed.is_main():
            name = distributed.device_name(device)
            print(f"{date.today()}  {distributed.world_size()} processes on {name}  {versions()}")
        for line in MEASURES.get(measure, attention_times)(config, device):
            if distributed.is_main():
                print(line, flush=True)


if __name__ == "__main__":
    run_app(main)

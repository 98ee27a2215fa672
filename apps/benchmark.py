"""Times training on this machine, or measures how good its models are.

    python apps/benchmark.py step [CONFIG.yaml ...] [key=value ...]     jagged histories beside padded ones
    python apps/benchmark.py epoch [CONFIG.yaml ...] [key=value ...]    whole epochs, without validation
    python apps/benchmark.py curve [CONFIG.yaml ...] [key=value ...]    test figures after every epoch
    python apps/benchmark.py attention|encoder|candidates|loss|ranking [key=value ...]        a part alone
    python apps/benchmark.py tune [key=value ...]                       attention's compile options, on CUDA
    python apps/benchmark.py saving [CONFIG.yaml ...] [key=value ...]   checkpoints beside training
    python apps/benchmark.py guards [CONFIG.yaml ...] [key=value ...]   steps with the guards and without
    python apps/benchmark.py memory [CONFIG.yaml ...] [key=value ...]   what a rank holds beside its estimate
    python apps/benchmark.py serving bundle=BUNDLE [key=value ...]      answers of apps/serve.py
    python apps/benchmark.py quality RECIPE.yaml ... [quality.key=value ...] [key=value ...]

torchrun and torchx launch step, epoch, curve, ranking, saving, guards and memory. `MEASURE help` lists keys.
quality trains recipes with several seeds, in processes that it launches, but for runs that are done, and
writes quality.md, .json and .png beside published figures; its own settings are quality.*, all others are
given to the runs.
"""

import sys

from hstu_rec.benchmarks import MEASURES
from hstu_rec.benchmarks.steps import print_lines
from hstu_rec.config import help_text, run_app
from hstu_rec.quality import QualitySettings, quality

SCHEMAS = {name: schema for name, (schema, _) in MEASURES.items()} | {"quality": QualitySettings}
HELP = {"help", "--help", "-h"}


def main(arguments: list[str]) -> None:
    measure, options = "".join(arguments[:1]), arguments[1:]
    if measure in HELP:
        print(__doc__)
    elif HELP & set(arguments) and measure in SCHEMAS:
        print(help_text(SCHEMAS[measure]))
    elif measure == "quality":
        sys.exit(0 if quality(options) else 1)
    elif measure in MEASURES:
        print_lines(*MEASURES[measure], options)
    else:
        raise ValueError(f"give what to measure, {', '.join(SCHEMAS)}; got {measure or 'nothing'}")


if __name__ == "__main__":
    run_app(main)

"""Trains a model and prints its test table.

    python apps/train.py [CONFIG.yaml ...] [key=value ...]

Without a configuration it trains configs/demo.yaml, on data that it makes itself. `help` lists the keys.
"""

from pathlib import Path

from hstu_rec.config import RunConfig, differences, help_text, load, run_app
from hstu_rec.data.demo import prepare_if_demo
from hstu_rec.trainer import train

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"


def main(arguments: list[str]) -> None:
    if {"help", "--help", "-h"} & set(arguments):
        demo = differences(load(RunConfig, [str(DEMO)]))
        print(f"{__doc__}\nconfigs/demo.yaml sets {demo}\n\nWith a CONFIG.yaml the defaults are:\n")
        print(help_text(RunConfig))
        return
    has_yaml = any("=" not in argument for argument in arguments)
    config = load(RunConfig, arguments if has_yaml else [str(DEMO), *arguments])
    prepare_if_demo(config.data.path)
    train(config)


if __name__ == "__main__":
    run_app(main)

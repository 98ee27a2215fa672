"""Times training on this machine.

    python apps/benchmark.py step [CONFIG.yaml ...] [key=value ...]     jagged histories, and the same padded
    python apps/benchmark.py epoch [CONFIG.yaml ...] [key=value ...]    whole epochs, without validation

torchrun and torchx launch it on several ranks, as they do apps/train.py.
"""

from datetime import date

from hstu_rec import distributed
from hstu_rec.benchmark import compare_steps, time_epochs
from hstu_rec.config import RunConfig, load, run_app
from hstu_rec.versions import versions

MEASURES = {"step": compare_steps, "epoch": time_epochs}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in MEASURES:
        given = f"'{arguments[0]}'" if arguments else "nothing"
        raise ValueError(
            f"give what to measure, step or epoch; got {given}: "
            "python apps/benchmark.py step [CONFIG.yaml ...] [key=value ...]"
        )
    config = load(RunConfig, arguments[1:])
    with distributed.process_group(config.train.device) as device:
        if distributed.is_main():
            print(f"{date.today()}  {distributed.world_size()} processes on {device}  {versions()}")
        for line in MEASURES[arguments[0]](config, device):
            if distributed.is_main():
                print(line, flush=True)


if __name__ == "__main__":
    run_app(main)

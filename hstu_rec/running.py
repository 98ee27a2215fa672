"""A run of any kind of model, from its start to its figures.

start -> epochs of steps, validations, checkpoints -> the best checkpoint -> what the run makes of it
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hstu_rec import distributed, hosts, lock
from hstu_rec.checkpoint import Saver
from hstu_rec.config import leaves, save
from hstu_rec.data.stream import Sequences
from hstu_rec.run_config import AnyRunConfig
from hstu_rec.run_folder import of_this_job
from hstu_rec.signals import StopRequest
from hstu_rec.starts import Start, load_best
from hstu_rec.trackers import check_installed
from hstu_rec.tracking import Tracker
from hstu_rec.training import Run, Training

Config = TypeVar("Config", bound=AnyRunConfig)
Data = TypeVar("Data", bound=Sequences)


def settled(config: Config) -> Config:
    """The same, but where the launcher has started the job again and train.run_dir names no folder: to go on
    in the one that it began. Collective.

    Raises ValueError on all ranks for trackers that are not installed.
    """
    hosts.on_main(lambda: check_installed(config.tracking.to))
    begun = of_this_job(config.train)
    if begun is None:
        return config
    return replace(config, train=replace(config.train, run_dir=str(begun), resume="auto"))


def opened_alike(
    config: AnyRunConfig, made_with: dict[str, str | None], opened: Callable[[], Data]
) -> Data:
    """The dataset. Raises ValueError on all ranks when one has none, or other settings, code or data."""
    hosts.check_alike("the settings", leaves(config), "give every process the same")
    hosts.check_alike("the versions", made_with, "install and check out the same on every host")
    datasets: list[Data] = []
    hosts.together(lambda: datasets.append(opened()))
    (dataset,) = datasets
    hosts.check_alike(
        f"the data in data.path {config.data.path}",
        dataset.identity,
        "copy the folder of one host to the others, or share it",
    )
    return dataset


def run_through(
    config: AnyRunConfig, folder: Path, start: Start, run_of: Callable[[Tracker], Run]
) -> dict[str, Any]:
    """Trains what `run_of` makes, in `folder`, from `start`, which is checked; writes its report on process
    0. What result.json holds. Collective."""
    hosts.make_shared(folder, "train.run_dir")
    with (
        lock.only_run_in(folder),
        StopRequest() as stop,
        Tracker(folder, distributed.is_main(), config.tracking) as tracker,
        Saver(folder / "checkpoints", config.checkpoint) as saver,
    ):
        hosts.on_main(lambda: tracker.begin(folder.name, leaves(config)))
        run = run_of(tracker)
        tracker.say(run.opening())
        for sentence in start.told:
            tracker.say(sentence)
        progress = start.begin(run)
        # Now that a checkpoint fits: those of a folder are of its configuration.
        hosts.on_main(lambda: save(config, folder / "config.yaml"))
        run.begin()
        training = Training(run, progress, saver, stop)
        training.train()
        load_best(run)
        result = run.result(progress, training.stop_if_asked)
        figures = run.test_figures(result)
        tracker.log("test", progress.step, figures)
        named = {f"test/{name}": value for name, value in figures.items()}
        tracker.summarise(named | {"train_s": progress.train_s})
    if distributed.is_main():
        run.write_report(result)
    distributed.barrier()
    return result

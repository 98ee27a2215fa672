"""train_ranker(config): a ranking model from a prepared dataset with features to its report.

steps over windows -> validation by AUC after every epoch, the best is kept -> test with the best -> report
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hstu_rec import distributed, hosts, lock
from hstu_rec.checkpoint import Saver
from hstu_rec.config import leaves, save, to_yaml
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import Split
from hstu_rec.drawing import draw_curves
from hstu_rec.durable import write_file
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.learner import RankLearner
from hstu_rec.ranker.loading import write_features
from hstu_rec.resuming import Progress
from hstu_rec.run_folder import of_this_job, run_folder
from hstu_rec.signals import StopRequest
from hstu_rec.starts import load_best, start_of
from hstu_rec.trackers import check_installed
from hstu_rec.tracking import Tracker, read_metrics
from hstu_rec.training import Run, Training, Validation
from hstu_rec.versions import versions

FIGURES = ("auc", "ne", "gauc")
# What chooses the model, of validation.
SELECTED = "mean AUC"


@dataclass(frozen=True)
class RankRun(Run):
    """A run of a ranking model."""

    config: RankRunConfig
    learner: RankLearner

    def validate(self, after_batch: Callable[[], None]) -> Validation:
        """Figures of every task; the mean AUC chooses."""
        figures = self.learner.evaluate("valid", after_batch)
        mean = sum(one["auc"] for one in figures.values()) / len(figures)
        return Validation(SELECTED, mean, {SELECTED: mean, **_flat(figures)})

    def speed(self, share: float, spent_s: float) -> dict[str, float]:
        """Events a second of that share of an epoch over all ranks."""
        return {"events_per_s": share * float(self.dataset.train_ends.sum()) / spent_s}


def train_ranker(config: RankRunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what result.json holds. Collective.

    The folder ends with report.md, curves.png, result.json, metrics.jsonl, config.yaml and the checkpoints.
    Raises ValueError on all ranks for what is wrong with the settings or the data, and FloatingPointError for
    a step that is not finite, which has changed nothing.
    """
    made_with = versions()
    with distributed.process_group(config.train.device) as device:
        if begun := of_this_job(config.train):
            train = replace(config.train, run_dir=str(begun), resume="auto")
            config = replace(config, train=train)
        hosts.on_main(lambda: check_installed(config.tracking.to))
        dataset = _opened(config, made_with)
        folder = run_folder(config.train, config.name)
        start = start_of(config.train.resume, folder / "checkpoints")
        start.check(config, dataset)
        learner = RankLearner(config, dataset, device)
        learner.check_labels()
        hosts.make_shared(folder, "train.run_dir")
        with (
            lock.only_run_in(folder),
            StopRequest() as stop,
            Tracker(folder, distributed.is_main(), config.tracking) as tracker,
            Saver(folder / "checkpoints", config.checkpoint) as saver,
        ):
            hosts.on_main(lambda: tracker.begin(folder.name, leaves(config)))
            tracker.say(_opening(config, learner, folder))
            for sentence in start.told:
                tracker.say(sentence)
            run = RankRun(config, folder, dataset, learner, tracker, made_with)
            progress = start.begin(run)
            hosts.on_main(lambda: save(config, folder / "config.yaml"))
            hosts.on_main(lambda: write_features(folder, learner.features, dataset.stats))
            training = Training(run, progress, saver, stop)
            training.train()
            load_best(run)
            result = _result(run, progress, training.stop_if_asked)
            tracker.log("test", progress.step, _flat(result["test"]))
            tracker.summarise(_flat(result["test"]))
        if distributed.is_main():
            _write(folder, result, config)
            print(f"\n{table_of(result)}\n\nrun folder: {folder}", flush=True)
        distributed.barrier()
        return result


def _opened(config: RankRunConfig, made_with: dict[str, str | None]) -> Dataset:
    """The dataset. Raises ValueError on all ranks when one has none, or other settings, code or data."""
    hosts.check_alike("the settings", leaves(config), "give every process the same")
    hosts.check_alike("the versions", made_with, "install and check out the same on every host")
    datasets: list[Dataset] = []
    hosts.together(lambda: datasets.append(Dataset(config.data.path)))
    (dataset,) = datasets
    hosts.check_alike("the data", dataset.identity, "copy the folder to all hosts, or share it")
    return dataset


def _result(run: RankRun, progress: Progress, after_batch: Callable[[], None]) -> dict[str, Any]:
    """The final figures of the model that the learner holds. Collective."""
    timing = {
        "train_s": round(progress.train_s, 1),
        "best_epoch": progress.best_epoch,
        "num_epochs": progress.epoch,
        "num_steps": progress.step,
    }
    names: tuple[Split, ...] = ("valid", "test")
    return {
        "protocol": {
            "split": run.dataset.stats["split"],
            "tasks": run.config.ranker.tasks,
            "selection_metric": SELECTED,
        },
        **{split: run.learner.evaluate(split, after_batch) for split in names},
        "timing": timing,
        "versions": run.made_with,
    }


def _flat(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Those that are there, by task/name."""
    named = {f"{task}/{name}": one[name] for task, one in figures.items() for name in FIGURES}
    return {name: one for name, one in named.items() if one is not None}


def _opening(config: RankRunConfig, learner: RankLearner, folder: Path) -> str:
    """What a run says before it starts."""
    data, ranker = learner.dataset, config.ranker
    num_dense = sum(one.numel() for one in learner.dense)
    return "\n".join(
        [
            f"run         {folder}",
            f"data        {data.path}: {data.num_users:,} users, {data.num_items:,} items, "
            f"{data.num_events:,} events",
            f"model       {ranker.history} history of {learner.windows.length} events, {num_dense:,} dense "
            "parameters",
            f"tasks       {', '.join(ranker.tasks)}; outcomes {', '.join(ranker.outcome_columns())}; "
            f"context {', '.join(ranker.context) or 'none'}",
            f"device      {learner.device}, {distributed.world_size()} processes",
        ]
    )


def table_of(result: dict[str, Any]) -> str:
    """The figures of both splits as aligned text."""
    rows = [["task", "split", *FIGURES, "events", "users", "positive"]]
    for split in ("valid", "test"):
        for task, one in result[split].items():
            figures = ["none" if one[name] is None else f"{one[name]:.4f}" for name in FIGURES]
            counts = [f"{one['num_events']:,}", f"{one['num_users']:,}"]
            rows.append([task, split, *figures, *counts, f"{one['share_positive']:.3f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _write(folder: Path, result: dict[str, Any], config: RankRunConfig) -> None:
    text = json.dumps(result, indent=2, allow_nan=False)
    write_file(folder / "result.json", (text + "\n").encode())
    write_file(folder / "curves.png", draw_curves(read_metrics(folder), SELECTED))
    report = (
        f"# {folder.name}\n\n```text\n{table_of(result)}\n```\n\nauc: ties half. ne: cross entropy over that "
        "of the mean label; below 1 is better. gauc: mean of users' own AUCs, by their events.\n\n"
        f"Best epoch {result['timing']['best_epoch']} of {result['timing']['num_epochs']}, "
        f"{result['timing']['train_s']} s of training.\n\n"
        f"![Training loss by step; validation {SELECTED} by epoch](curves.png)\n\n"
        f"```yaml\n{to_yaml(config)}```\n"
    )
    write_file(folder / "report.md", report.encode())

"""train_ranker(config): a ranking model from a prepared dataset with features to its report.

steps over windows -> validations by AUC, the best is kept -> test with the best -> report
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hstu_rec import distributed, hosts
from hstu_rec.config import to_yaml
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import Split
from hstu_rec.drawing import draw_curves
from hstu_rec.durable import write_file
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.learner import RankLearner
from hstu_rec.ranker.loading import write_features
from hstu_rec.resuming import Progress
from hstu_rec.run_folder import run_folder
from hstu_rec.running import opened_alike, run_through, settled
from hstu_rec.starts import start_of
from hstu_rec.tracking import read_metrics
from hstu_rec.training import Run, Validation
from hstu_rec.versions import versions

FIGURES = ("auc", "ne", "gauc")
# What chooses the model, of validation.
SELECTED = "mean AUC"


@dataclass(frozen=True)
class RankRun(Run):
    """A run of a ranking model."""

    config: RankRunConfig
    learner: RankLearner

    def opening(self) -> str:
        """The data, the model, and its tasks."""
        data, ranker, learner = self.dataset, self.config.ranker, self.learner
        num_dense = sum(one.numel() for one in learner.dense)
        return "\n".join(
            [
                f"run         {self.folder}",
                f"data        {data.path}: {data.num_users:,} users, {data.num_items:,} items, "
                f"{data.num_events:,} events",
                f"model       {ranker.history} history of {learner.windows.length} events, {num_dense:,} "
                "dense parameters",
                f"tasks       {', '.join(ranker.tasks)}; outcomes {', '.join(ranker.outcome_columns())}; "
                f"context {', '.join(ranker.context) or 'none'}",
                f"device      {learner.device}, {distributed.world_size()} processes",
            ]
        )

    def begin(self) -> None:
        """Keeps what the numbers of the features mean."""
        features, stats = self.learner.features, self.dataset.stats
        hosts.on_main(lambda: write_features(self.folder, features, stats))

    def validate(self, after_batch: Callable[[], None]) -> Validation:
        """Figures of every task; the mean AUC chooses."""
        figures = self.learner.evaluate("valid", after_batch)
        mean = sum(one["auc"] for one in figures.values()) / len(figures)
        return Validation(SELECTED, mean, {SELECTED: mean, **_flat(figures)})

    def speed(self, share: float, spent_s: float) -> dict[str, float]:
        """Events a second of that share of an epoch over all ranks."""
        return {"events_per_s": share * float(self.dataset.train_ends.sum()) / spent_s}

    def result(self, progress: Progress, after_batch: Callable[[], None]) -> dict[str, Any]:
        """Figures of every task on both splits."""
        names: tuple[Split, ...] = ("valid", "test")
        return {
            "protocol": {
                "split": self.dataset.stats["split"],
                "tasks": self.config.ranker.tasks,
                "selection_metric": SELECTED,
            },
            **{split: self.learner.evaluate(split, after_batch) for split in names},
            "timing": {
                "train_s": round(progress.train_s, 1),
                "best_epoch": progress.best_epoch,
                "num_epochs": progress.epoch,
                "num_steps": progress.step,
            },
            "versions": self.made_with,
        }

    def test_figures(self, result: dict[str, Any]) -> dict[str, float]:
        """rating>=4/auc, ..."""
        return _flat(result["test"])

    def write_report(self, result: dict[str, Any]) -> None:
        """report.md, curves.png and result.json; prints the figures."""
        text = json.dumps(result, indent=2, allow_nan=False)
        write_file(self.folder / "result.json", (text + "\n").encode())
        write_file(self.folder / "curves.png", draw_curves(read_metrics(self.folder), SELECTED))
        timing = result["timing"]
        report = (
            f"# {self.folder.name}\n\n```text\n{table_of(result)}\n```\n\nauc: ties half. ne: cross entropy "
            "over that of the mean label; below 1 is better. gauc: mean of users' own AUCs, by their events; "
            "none where no user has both labels."
            f"\n\nBest epoch {timing['best_epoch']} of {timing['num_epochs']}, {timing['train_s']} s of "
            f"training.\n\n![Training loss by step; validation {SELECTED} by epoch](curves.png)\n\n"
            f"```yaml\n{to_yaml(self.config)}```\n"
        )
        write_file(self.folder / "report.md", report.encode())
        print(f"\n{table_of(result)}\n\nrun folder: {self.folder}", flush=True)


def train_ranker(config: RankRunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what result.json holds. Collective.

    The folder ends with report.md, curves.png, result.json, metrics.jsonl, config.yaml and the checkpoints.
    Raises ValueError on all ranks for what is wrong with the settings or the data, and FloatingPointError for
    a step that is not finite, which has changed nothing.
    """
    made_with = versions()
    with distributed.process_group(config.train.device) as device:
        config = settled(config)
        dataset = opened_alike(config, made_with, lambda: Dataset(config.data.path))
        folder = run_folder(config.train, config.name)
        start = start_of(config.train.resume, folder / "checkpoints")
        start.check(config, dataset)
        learner = RankLearner(config, dataset, device)
        learner.check_labels()
        return run_through(
            config,
            folder,
            start,
            lambda tracker: RankRun(config, folder, dataset, learner, tracker, made_with),
        )


def _flat(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Those that are there, by task/name."""
    named = {f"{task}/{name}": one[name] for task, one in figures.items() for name in FIGURES}
    return {name: one for name, one in named.items() if one is not None}


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

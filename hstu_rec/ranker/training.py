"""train_ranker(config): a ranking model from a prepared dataset with features to its report.

steps over windows -> validation by AUC after every epoch, the best is kept -> test with the best -> report
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hstu_rec import checkpoint, distributed, hosts, lock
from hstu_rec.checkpoint import CheckpointConfig, Saver
from hstu_rec.config import leaves, save, to_yaml
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.item_map import keep_item_map
from hstu_rec.data.stream import Split
from hstu_rec.durable import write_file
from hstu_rec.guards import StepGuard
from hstu_rec.item_table import ItemTable, live_state, shard_model
from hstu_rec.learner import rate_factor, set_table_rate
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.features import features_of
from hstu_rec.ranker.loading import write_features
from hstu_rec.ranker.model import ranking_model
from hstu_rec.ranker.scoring import binary_metrics
from hstu_rec.ranker.windows import Scored, Windows
from hstu_rec.trackers import check_installed
from hstu_rec.tracking import Tracker
from hstu_rec.versions import versions

FIGURES = ("auc", "ne", "gauc")


def train_ranker(config: RankRunConfig) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what result.json holds. Collective.

    The folder ends with report.md, result.json, metrics.jsonl, config.yaml and the checkpoints. Raises
    ValueError on all ranks for what is wrong with the settings or the data, and FloatingPointError for a step
    that is not finite, which has changed nothing.
    """
    made_with = versions()
    with distributed.process_group(config.train.device) as device:
        hosts.check_alike("the settings", leaves(config), "give every process the same")
        hosts.on_main(lambda: check_installed(config.tracking.to))
        datasets: list[Dataset] = []
        hosts.together(lambda: datasets.append(Dataset(config.data.path)))
        (dataset,) = datasets
        hosts.check_alike("the data", dataset.identity, "copy the folder to all hosts, or share it")
        learner = RankLearner(config, dataset, device)
        learner.check_labels()
        folder = hosts.on_main(lambda: _new_folder(config))
        hosts.make_shared(folder, "train.run_dir")
        with (
            lock.only_run_in(folder),
            Tracker(folder, distributed.is_main(), config.tracking) as tracker,
            Saver(folder / "checkpoints", CheckpointConfig(keep=1)) as saver,
        ):
            hosts.on_main(lambda: save(config, folder / "config.yaml"))
            hosts.on_main(lambda: keep_item_map(dataset.path, folder))
            hosts.on_main(lambda: write_features(folder, learner.features, dataset.stats))
            hosts.on_main(lambda: tracker.begin(folder.name, leaves(config)))
            tracker.say(_opening(config, learner, folder))
            began = time.monotonic()
            epochs = _train(learner, saver, folder, tracker)
            train_s = time.monotonic() - began
            best = checkpoint.resolve(folder / "checkpoints", "best")
            checkpoint.load(best, learner.state())
            result = {
                "protocol": {
                    "split": dataset.stats["split"],
                    "tasks": config.ranker.tasks,
                    "selection_metric": "validation AUC, mean over tasks",
                },
                **{split: learner.evaluate(split) for split in ("valid", "test")},
                "timing": {"train_s": round(train_s, 1)} | epochs,
                "versions": made_with,
            }
            tracker.summarise(_flat(result["test"]))
        if distributed.is_main():
            _write(folder, result, config)
            print(f"\n{table_of(result)}\n\nrun folder: {folder}", flush=True)
        distributed.barrier()
        return result


class RankLearner:
    """The model, its optimizers, one training step and the figures of a split."""

    def __init__(self, config: RankRunConfig, dataset: Dataset, device: torch.device) -> None:
        torch.manual_seed(config.train.seed)
        ranker, encoder = config.ranker, config.encoder
        self.config, self.device, self.dataset = config, device, dataset
        facts = dataset.stats.get("features", {})
        columns = [*ranker.context, *ranker.outcome_columns()]
        self.features = features_of(columns, ranker.categories, facts)
        length = encoder.max_history_len // 2
        self.windows = Windows(
            dataset, ranker, length, config.data.batch_windows, config.train.seed
        )
        self.table = ItemTable(config.table, dataset.num_items, encoder.dim, device)
        model = ranking_model(self.table, ranker, encoder, self.features)
        for part in (model.history, model.context, model.outcomes, model.head):
            part.to(device)
        self.dense = [one for name, one in model.named_parameters() if "table." not in name]
        self.model = shard_model(model, config.table, device, config.train.seed)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.dense,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.guard = StepGuard(config.guard, self.dense, waits=config.table.optimizer == "adam")
        self.num_steps_planned = config.train.max_epochs * self.windows.num_steps(0)

    def step(self, epoch: int, index: int, step: int) -> float:
        """One training step; the mean loss of the targets and tasks. Collective."""
        self._set_rates(step)
        distributed.seed_torch(self.device, self.config.train.seed, step, distributed.rank())
        scored = self.windows.batch(epoch, index)
        batch = scored.batch.to(self.device)
        sent = self.table.send(torch.unique(batch.item_ids))
        sent.fetch(self.guard)
        logits = self.model(batch, sent)
        loss = self._loss(logits, scored)
        self.guard.begin((epoch, index, step), loss)
        # DDP and TorchRec average gradients over ranks; the loss is a global mean already.
        (loss * distributed.world_size()).backward()
        if self.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.dense, self.config.optim.clip_norm)
        optimizer: Any = self.optimizer
        optimizer.found_inf = torch.where(self.guard.is_finite(), 0.0, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.guard.end(is_last=index + 1 == self.windows.num_steps(epoch)).loss

    def _loss(self, logits: Tensor, scored: Scored) -> Tensor:
        """This rank's part of the mean cross entropy over targets and tasks."""
        labels, is_target = scored.labels.to(self.device), scored.is_target.to(self.device)
        total = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        count = scored.num_targets_global * labels.shape[1]
        return torch.where(is_target[:, None], total, 0.0).sum() / count

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[str, dict[str, Any]]:
        """Figures of each task over the events of a split, each by what was known before it. Collective."""
        self.model.eval()
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for scored in self.windows.evaluation(split):
            probabilities = self.model(scored.batch.to(self.device)).sigmoid().cpu()
            keep = scored.is_target
            found.append((probabilities[keep], scored.labels[keep], scored.users[keep]))
        probabilities, labels, users = (torch.cat(one) for one in zip(*found, strict=True))
        return {
            task: binary_metrics(probabilities[:, place], labels[:, place], users)
            for place, task in enumerate(self.config.ranker.tasks)
        }

    def check_labels(self) -> None:
        """Raises ValueError on all ranks where a split has no events, or a task one label in validation."""
        names: tuple[Split, ...] = ("valid", "test")
        for split in names:
            total = torch.zeros(1 + len(self.config.ranker.tasks), dtype=torch.float64)
            for scored in self.windows.evaluation(split):
                labels = scored.labels[scored.is_target].double()
                total += torch.cat([torch.tensor([len(labels)]), labels.sum(0)])
            count, *positive = distributed.all_reduce_sum(total).tolist()
            same = [n in (0, count) for n in positive]
            if split == "valid" and any(same):
                task = self.config.ranker.tasks[same.index(True)]
                raise ValueError(
                    f"task '{task}': all labels of the {count:,.0f} validation events are the same, so that "
                    "no model can be chosen by it; give another task"
                )

    def _set_rates(self, step: int) -> None:
        factor = rate_factor(self.config.optim, step, self.num_steps_planned)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr * factor
        set_table_rate(self.model, self.config.table.lr * factor)

    def state(self) -> dict[str, Any]:
        """Every tensor of the model; loading fills them in place."""
        return {"model": live_state(self.model)}


def _train(learner: RankLearner, saver: Saver, folder: Path, tracker: Tracker) -> dict[str, int]:
    """Epochs until patience or max_epochs ends them; which was the best. Collective."""
    settings = learner.config.train
    best, best_epoch, step, epoch, loss = -1.0, 0, 0, 0, math.nan
    with tracker.bar(settings.max_epochs, "training", "epoch") as bar:
        for epoch in range(1, settings.max_epochs + 1):
            learner.model.train()
            for index in range(learner.windows.num_steps(epoch - 1)):
                loss = learner.step(epoch - 1, index, step)
                if step % settings.log_every_steps == 0:
                    tracker.log("train", step, {"loss": loss})
                step += 1
            figures = learner.evaluate("valid")
            value = _mean_auc(figures)
            named = {
                f"{task}/{name}": one[name] for task, one in figures.items() for name in FIGURES
            }
            tracker.log(
                "valid", step, {name: one for name, one in named.items() if one is not None}
            )
            bar.update(1)
            bar.set_postfix_str(f"loss {loss:.4f}  valid AUC {value:.4f}")
            if value > best:
                best, best_epoch = value, epoch
                meta = {"epoch": epoch, "valid": figures}
                saver.save(step, learner.state(), meta)
                path = saver.wait()
                assert path is not None
                checkpoint.point(folder / "checkpoints", "best", path)
            if epoch - best_epoch >= settings.patience:
                break
    return {"best_epoch": best_epoch, "num_epochs": epoch, "num_steps": step}


def _flat(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Those that are there, by task/name."""
    named = {f"{task}/{name}": one[name] for task, one in figures.items() for name in FIGURES}
    return {name: one for name, one in named.items() if one is not None}


def _mean_auc(figures: dict[str, dict[str, Any]]) -> float:
    """Of validation, where every task has both labels."""
    return sum(one["auc"] for one in figures.values()) / len(figures)


def _new_folder(config: RankRunConfig) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.train.run_dir or f"runs/{stamp}-{config.name}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"train.run_dir {folder} is there and not empty; give another folder")
    return folder


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
    report = (
        f"# {folder.name}\n\n```text\n{table_of(result)}\n```\n\nauc: ties half. ne: cross entropy over that "
        "of the mean label; below 1 is better. gauc: mean of users' own AUCs, by their events.\n\n"
        f"Best epoch {result['timing']['best_epoch']} of {result['timing']['num_epochs']}, "
        f"{result['timing']['train_s']} s.\n\n```yaml\n{to_yaml(config)}```\n"
    )
    write_file(folder / "report.md", report.encode())

"""RankLearner: a ranking model, its optimizers, one training step, and the figures of a split."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.any_learner import AnyLearner
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import Split
from hstu_rec.item_table import ItemTable, shard_model
from hstu_rec.pipeline import Place
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.features import Task, features_of
from hstu_rec.ranker.model import ranking_model
from hstu_rec.ranker.scoring import binary_metrics
from hstu_rec.ranker.windows import Scored, Windows


class RankLearner(AnyLearner):
    """The model, its optimizers, one training step and the figures of a split."""

    def __init__(self, config: RankRunConfig, dataset: Dataset, device: torch.device) -> None:
        torch.manual_seed(config.train.seed)
        ranker, encoder, seed = config.ranker, config.encoder, config.train.seed
        self.config, self.dataset = config, dataset
        facts = dataset.stats.get("features", {})
        columns = [*ranker.context, *ranker.outcome_columns()]
        self.features = features_of(columns, ranker.categories, facts)
        length = encoder.max_history_len // 2
        self.windows = Windows(dataset, ranker, length, config.data.batch_windows, seed)
        self.table = ItemTable(config.table, dataset.num_items, encoder.dim, device)
        model = ranking_model(self.table, ranker, encoder, self.features)
        for part in (model.history, model.context, model.outcomes, model.head):
            part.to(device)
        dense = [one for name, one in model.named_parameters() if "table." not in name]
        super().__init__(
            config,
            shard_model(model, config.table, device, seed),
            [{"params": dense, "weight_decay": config.optim.weight_decay, "rate": 1.0}],
            sum(map(self.windows.num_steps, range(config.train.max_epochs))),
            device,
        )

    def begin(self) -> None:
        """Nothing: weights and rows are those of the seed."""

    def num_steps(self, epoch: int) -> int:
        """Steps of that epoch."""
        return self.windows.num_steps(epoch)

    def forward(self, place: Place) -> Tensor:
        """This rank's part of the mean loss of the targets and tasks."""
        scored = self.windows.batch(place.epoch, place.batch)
        batch = scored.batch.to(self.device)
        sent = self.table.send(torch.unique(batch.item_ids))
        sent.fetch(self.guard)
        return self._loss(self.model(batch, sent), scored)

    def _loss(self, logits: Tensor, scored: Scored) -> Tensor:
        """This rank's part of the mean cross entropy over targets and tasks; a target without a label of a
        task counts with 0 there, whatever is predicted."""
        labels, is_target = scored.labels.to(self.device), scored.is_target.to(self.device)
        counts = is_target[:, None] & ~labels.isnan()
        total = nn.functional.binary_cross_entropy_with_logits(
            logits, labels.nan_to_num(), reduction="none"
        )
        count = scored.num_targets_global * labels.shape[1]
        return torch.where(counts, total, 0.0).sum() / count

    @torch.no_grad()
    def evaluate(
        self, split: Split, after_batch: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, Any]]:
        """Figures of each task over the events of a split, each by what was known before it. Collective.

        after_batch: called by all ranks alike.
        """
        was_training = self.model.training
        self.model.eval()
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for scored in self.windows.evaluation(split):
            probabilities = self.model(scored.batch.to(self.device)).sigmoid().cpu()
            keep = scored.is_target
            found.append((probabilities[keep], scored.labels[keep], scored.users[keep]))
            after_batch()
        self.model.train(was_training)
        probabilities, labels, users = (torch.cat(one) for one in zip(*found, strict=True))
        found_by_task = {}
        for place, task in enumerate(self.config.ranker.tasks):
            is_known = ~labels[:, place].isnan()
            found_by_task[task] = binary_metrics(
                probabilities[is_known, place], labels[is_known, place], users[is_known]
            )
        return found_by_task

    def check_labels(self) -> None:
        """Raises ValueError on all ranks where a split has no event with a label of a task, or validation one
        label alone."""
        tasks = self.config.ranker.tasks
        names: tuple[Split, ...] = ("valid", "test")
        for split in names:
            total = torch.zeros(2, len(tasks), dtype=torch.float64)
            for scored in self.windows.evaluation(split):
                labels = scored.labels[scored.is_target].double()
                total += torch.stack([(~labels.isnan()).sum(0), labels.nansum(0)])
            counts = distributed.all_reduce_sum(total).T.tolist()
            for task, (count, positive) in zip(tasks, counts, strict=True):
                told = f"all labels of the {count:,.0f} validation events are the same, so that"
                if not count:
                    told = f"no event of the {split} split has '{Task.of(task).column}', and"
                if not count or (split == "valid" and positive in (0, count)):
                    raise ValueError(
                        f"task '{task}': {told} no model can be chosen by it; give another task"
                    )

"""Recall, NDCG and MRR of the sharded model over the users of a split, a batch of queries at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hstu_rec import distributed, tracking
from hstu_rec.data.stream import EvalBatch, Sequences, Split, eval_batches, eval_users
from hstu_rec.item_table import local_shards
from hstu_rec.metrics import both_metrics, cut_off_problems, group_metrics
from hstu_rec.model import NextItemModel
from hstu_rec.portions import Portion, agreed
from hstu_rec.ranking import LEAST_CHUNK_ITEMS, Queries, rank_targets
from hstu_rec.scores import ItemShard
from hstu_rec.settings import at_least, without_effect
from hstu_rec.tracking import BAR_AFTER_S


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured, and in what portions."""

    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50])
    """Cut-offs of Recall and NDCG."""
    batch_users: int = 1024
    """Queries of a rank that are encoded and scored together; halved on all ranks while they do not fit."""
    chunk_items: int = 131072
    """Items of a rank that are scored together: bounds the memory, with batch_users; a copy of so many rows
    is made. Halved, on a rank alone, while it does not fit."""
    with_baselines: bool = True
    """Adds popularity and co-occurrence rows to the result."""
    min_train_count: int = 0
    """Adds figures over the targets that occur at least so often in training; 0 for none."""
    with_groups: bool = True
    """Adds figures of the test by length of the history and by how often the target occurs in training."""
    num_listed_users: int = 10000
    """Test users, evenly spaced, whose ten best items are found for coverage, novelty and examples; 0 for
    none. The time grows with users times items."""
    num_examples: int = 3
    """Test users whose history, target and list the report shows, with own ids, and titles if there are."""
    compare_with: list[str] = field(default_factory=list)
    """Rows beside the model's in the table: run folders of the same data, and YAML files of published figures
    such as configs/published.yaml."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "batch_users", "chunk_items")
        found += at_least(self, 0, "min_train_count", "num_listed_users", "num_examples")
        if not self.num_listed_users:
            found += without_effect(self, "without num_listed_users", "num_examples")
        return found + cut_off_problems(self.ks)


@torch.no_grad()
def evaluate(
    sharded: Any,
    dataset: Sequences,
    split: Split,
    config: EvalConfig,
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Metrics of a sharded NextItemModel: {"num_users", "num_repeated_targets", "seen_allowed": {...},
    "seen_masked": {...}}; with config.min_train_count also "frequent", of the same but for the repeated; of
    the test, with config.with_groups, "groups" (`group_metrics`).

    Collective; ranks may have no user at all. `after_batch` is called after every batch of queries, as often
    on every rank: it may be collective, and what it raises ends the evaluation. The model is left in the mode
    it was in. Raises ValueError when no target is as frequent as that, and MemoryError on all ranks when one
    query, or 1024 items, are too many for the memory of one of them. Where ranks exchange queries or rows,
    a shortage on one of several is not halved: that rank ends.
    """
    was_training = sharded.training
    sharded.eval()
    try:
        ranked = _ranked(sharded, dataset, split, config, device, after_batch)
    finally:
        sharded.train(was_training)
    result = both_metrics(ranked.ranks, config.ks)
    result["num_repeated_targets"] = int(distributed.all_reduce_sum(ranked.is_repeated.sum()))
    if least := config.min_train_count:
        is_frequent = train_counts_of(dataset, ranked.targets) >= least
        result["frequent"] = both_metrics(ranked.ranks[:, is_frequent.to(device)], config.ks)
    if config.with_groups and split == "test":
        counts = train_counts_of(dataset, ranked.targets)
        result["groups"] = group_metrics(ranked.ranks, ranked.history_lengths, counts)
    return result


def train_counts_of(dataset: Sequences, items: Tensor) -> Tensor:
    """int64 [n]: how often items [n] occur in training."""
    return torch.from_numpy(dataset.train_counts[items.numpy()])


class _Ranked(NamedTuple):
    """This rank's queries."""

    ranks: Tensor  # int64 [2, Q] with seen items allowed and masked
    targets: Tensor  # int64 [Q]
    is_repeated: Tensor  # bool [Q]
    history_lengths: Tensor  # int64 [Q]: all events before the target


def _ranked(
    sharded: Any,
    dataset: Sequences,
    split: Split,
    config: EvalConfig,
    device: torch.device,
    after_batch: Callable[[], None],
) -> _Ranked:
    model: NextItemModel = sharded.module
    shard = shard_of(sharded, model, dataset.num_items, device)
    seen_score = model.loss.seen_score()
    chunk = Portion("eval.chunk_items", config.chunk_items, LEAST_CHUNK_ITEMS)
    users = Portion("eval.batch_users", config.batch_users, is_shared=True)

    def ranks_of(batch: EvalBatch) -> Tensor:
        queries = encoded(model, batch, shard, device)
        return torch.stack(rank_targets(queries, shard, chunk, seen_score))

    ranks, targets, is_repeated, lengths = [], [], [], []
    num_users = len(eval_users(dataset, split)[0])
    with tracking.bar(
        num_users,
        f"ranking, {split}",
        "user",
        is_shown=distributed.is_main(),
        after_s=BAR_AFTER_S,
    ) as bar:
        for batch in eval_batches(
            dataset, split, model.encoder.config.max_history_len, config.batch_users
        ):
            # As many parts on every rank, of which the last may be empty.
            parts = users.over(
                config.batch_users, lambda part, batch=batch: ranks_of(batch.part(part))
            )
            ranks += parts
            targets.append(batch.history.target_ids)
            is_repeated.append(_is_repeated(batch))
            lengths.append(batch.seen_offsets.diff())
            bar.update(min(config.batch_users * distributed.world_size(), num_users - bar.n))
            after_batch()
    return _Ranked(torch.cat(ranks, 1), *map(torch.cat, (targets, is_repeated, lengths)))


def encoded(
    model: NextItemModel, batch: EvalBatch, shard: ItemShard, device: torch.device
) -> Queries:
    """This rank's queries, encoded. Collective; raises SharedShortage on all ranks when one cannot."""
    history = batch.history.to(device)
    rows, target_rows = model.look_up(history)
    return Queries(
        agreed(lambda: model.queries(rows, history).float()),
        shard.score(target_rows),
        history.target_ids,
        batch.seen_ids.to(device),
        batch.seen_offsets.to(device),
        history.offsets.diff(),
    )


def _is_repeated(batch: EvalBatch) -> Tensor:
    """bool [B]: whether a user's target is among the items seen before it."""
    targets = batch.history.target_ids
    owner = torch.repeat_interleave(torch.arange(len(targets)), batch.seen_offsets.diff())
    return torch.bincount(owner[batch.seen_ids == targets[owner]], minlength=len(targets)) > 0


def shard_of(
    sharded: nn.Module, model: NextItemModel, num_items: int, device: torch.device
) -> ItemShard:
    """This rank's live rows, which the loss scores."""
    shards = local_shards(sharded)
    assert len(shards) <= 1, "a table has one shard a rank"
    if not shards:
        dim = model.encoder.config.dim
        shards = [(torch.zeros(0, dim, device=device), 0)]
    rows, first = shards[0]
    return ItemShard(rows, first, num_items, model.loss.item_vectors)

"""Exact ranking of every target among all items of the sharded table.

    queries of all ranks  --all-gather-->  every rank counts, in its own rows, the items that score at
    least as high as the target  --all-reduce-->  integer ranks  -->  Recall, NDCG, MRR

A rank is the number of items, other than the target, whose score is at least the target's: a hit at k is
rank < k, so ties are never hits. The score of a pair is the float64 sum of the products of its float32
entries; a float32 product decides wherever it is certain, the rest is computed exactly, so that ranks
depend neither on chunks nor on the number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import Split, eval_batches
from hstu_rec.item_table import local_shards
from hstu_rec.model import NextItemModel

# Bounds the memory of one block of scores and of one slice of exact recomputation.
MAX_BLOCK_SCORES = 2**24
MAX_EXACT_PAIRS = 2**18


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured, and in what portions."""

    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50])
    """Cut-offs of Recall and NDCG."""
    batch_users: int = 1024
    """Queries of a rank that are scored together."""
    chunk_items: int = 16384
    """Items scored at a time."""
    with_baselines: bool = True
    """Adds popularity and co-occurrence rows to the result."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = [
            f"{name} must be at least 1; got {getattr(self, name)}"
            for name in ("batch_users", "chunk_items")
            if getattr(self, name) < 1
        ]
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) != len(self.ks):
            found.append(f"ks must be distinct numbers of at least 1; got {list(self.ks)}")
        return found


@dataclass(frozen=True)
class ItemShard:
    """A rank's rows of the catalogue, as they are scored; it may own none."""

    vectors: Tensor  # float32 [n, D]
    first_id: int
    num_items: int  # of the whole catalogue


@dataclass(frozen=True)
class Queries:
    """A rank's queries; Q may be 0 and differ between ranks."""

    vectors: Tensor  # float32 [Q, D]
    target_vectors: Tensor  # float32 [Q, D]
    target_ids: Tensor  # int64 [Q]
    seen_ids: Tensor  # int64 [S]
    seen_offsets: Tensor  # int64 [Q + 1]


def rank_targets(queries: Queries, shard: ItemShard, chunk_items: int) -> tuple[Tensor, Tensor]:
    """int64 [Q] ranks of this rank's targets, with seen items allowed and with them masked.

    Collective. The target itself is never masked. Raises, on all ranks together, FloatingPointError for
    values that are not finite and ValueError for ids outside the catalogue.
    """
    _check(queries, shard)
    num_mine = torch.zeros(distributed.world_size(), dtype=torch.int64)
    num_mine[distributed.rank()] = len(queries.target_ids)
    before = int(distributed.all_reduce_sum(num_mine)[: distributed.rank()].sum())
    everyone = Queries(
        distributed.all_gather_rows(queries.vectors),
        distributed.all_gather_rows(queries.target_vectors),
        distributed.all_gather_rows(queries.target_ids),
        distributed.all_gather_rows(queries.seen_ids),
        nn.functional.pad(
            distributed.all_gather_rows(queries.seen_offsets.diff()).cumsum(0), (1, 0)
        ),
    )
    target_scores = _exact_scores(everyone.vectors, everyone.target_vectors)
    counts = torch.stack(
        [
            _count_at_least(everyone, target_scores, shard, chunk_items),
            _count_seen_at_least(everyone, target_scores, shard),
        ]
    )
    counts = distributed.all_reduce_sum(counts)[:, before : before + len(queries.target_ids)]
    return counts[0], counts[0] - counts[1]


def _check(queries: Queries, shard: ItemShard) -> None:
    """All ranks raise together when one of them holds what cannot be ranked."""
    floats = (queries.vectors, queries.target_vectors, shard.vectors)
    ids = torch.cat([queries.target_ids, queries.seen_ids])
    is_outside = (ids < 0) | (ids >= shard.num_items)
    bad = torch.stack(
        [
            torch.stack([(~torch.isfinite(values)).any() for values in floats]).any().long(),
            is_outside.sum(),
        ]
    )
    num_not_finite, num_outside = distributed.all_reduce_sum(bad).tolist()
    if num_not_finite:
        raise FloatingPointError(
            f"scores are not finite on {num_not_finite} of {distributed.world_size()} ranks: the model "
            "holds NaN or infinity; lower the learning rates or load an earlier checkpoint"
        )
    if num_outside:
        raise ValueError(
            f"{num_outside} target or seen ids are outside the catalogue 0..{shard.num_items - 1}, on "
            f"this rank for example {ids[is_outside][:5].tolist()}; prepare the dataset again"
        )


def _exact_scores(left: Tensor, right: Tensor) -> Tensor:
    """float64 [n] dot products of float32 [n, D] pairs, summed in one order whatever n."""
    products = left.double() * right.double()
    while products.shape[-1] > 1:
        half = (products.shape[-1] + 1) // 2
        rest = products[:, half:]
        products = products[:, :half] + nn.functional.pad(rest, (0, half - rest.shape[-1]))
    return products.sum(-1)


def _blocks(num_rows: int, width: int) -> Iterator[slice]:
    """Row slices whose blocks of `width` columns stay within MAX_BLOCK_SCORES."""
    size = max(1, MAX_BLOCK_SCORES // max(width, 1))
    yield from (slice(begin, begin + size) for begin in range(0, num_rows, size))


def _count_at_least(
    queries: Queries, target_scores: Tensor, shard: ItemShard, chunk_items: int
) -> Tensor:
    """int64 [Q]: items of the shard, other than the target, that score at least the target's score."""
    counts = torch.zeros_like(queries.target_ids)
    for begin in range(0, len(shard.vectors), chunk_items):
        items = shard.vectors[begin : begin + chunk_items]
        # No float32 sum of D products is further than this from the exact one.
        largest = torch.maximum(items.norm(dim=1).max(), queries.target_vectors.norm(dim=1).max())
        unit = (items.shape[1] + 8) * torch.finfo(torch.float32).eps * largest
        for rows in _blocks(len(counts), len(items)):
            query, exact = queries.vectors[rows], target_scores[rows]
            margin = query.norm(dim=1) * unit
            scores = query @ items.T
            column = queries.target_ids[rows] - shard.first_id - begin
            own = ((column >= 0) & (column < len(items))).nonzero()[:, 0]
            scores[own, column[own]] = -torch.inf
            bound = exact.float()
            is_above = scores > (bound + margin)[:, None]
            is_near = scores >= (bound - margin)[:, None]
            counts[rows] += is_above.sum(1)
            near = (is_near & ~is_above).nonzero()
            for pairs in near.split(MAX_EXACT_PAIRS):
                row, item = pairs[:, 0], pairs[:, 1]
                is_hit = _exact_scores(query[row], items[item]) >= exact[row]
                counts[rows].index_add_(0, row, is_hit.long())
    return counts


def _count_seen_at_least(queries: Queries, target_scores: Tensor, shard: ItemShard) -> Tensor:
    """int64 [Q]: distinct seen items of the shard, other than the target, at or above the target."""
    counts = torch.zeros_like(queries.target_ids)
    num_seen = queries.seen_offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), num_seen)
    distinct = torch.unique(owner * shard.num_items + queries.seen_ids)
    row, item = distinct // shard.num_items, distinct % shard.num_items
    local = item - shard.first_id
    is_mine = (local >= 0) & (local < len(shard.vectors)) & (item != queries.target_ids[row])
    row, local = row[is_mine], local[is_mine]
    for part in torch.arange(len(row), device=row.device).split(MAX_EXACT_PAIRS):
        scores = _exact_scores(queries.vectors[row[part]], shard.vectors[local[part]])
        counts.index_add_(0, row[part], (scores >= target_scores[row[part]]).long())
    return counts


def rank_metrics(ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Recall@k, NDCG@k and MRR of all ranks' int64 `ranks` (0 is best), one target a query. Collective.

    The same to the last bit for any division of the queries over processes.
    """
    # In order, so that the float64 sums do not depend on which process held what.
    everyone = distributed.all_gather_rows(ranks).sort().values.double()
    gain = 1 / torch.log2(everyone + 2)
    result = {}
    for k in sorted(ks):
        is_hit = everyone < k
        result[f"recall@{k}"] = float(is_hit.double().mean())
        result[f"ndcg@{k}"] = float((gain * is_hit).mean())
    result["mrr"] = float((1 / (everyone + 1)).mean())
    return result


@torch.no_grad()
def evaluate(
    sharded: Any, dataset: Dataset, split: Split, config: EvalConfig, device: torch.device
) -> dict[str, Any]:
    """Metrics of a sharded NextItemModel: {"num_users", "seen_allowed": {...}, "seen_masked": {...}}.

    Collective; ranks may have no user at all. Leaves the model in evaluation mode's place as it was.
    """
    model: NextItemModel = sharded.module
    was_training = sharded.training
    sharded.eval()
    shard = _shard(sharded, model, dataset.num_items, device)
    max_history_len = model.encoder.config.max_history_len
    allowed, masked = [], []
    for batch in eval_batches(dataset, split, max_history_len, config.batch_users):
        history = batch.history.to(device)
        vectors, target_vectors = sharded(history)
        queries = Queries(
            vectors.float(),
            target_vectors.float(),
            history.target_ids,
            batch.seen_ids.to(device),
            batch.seen_offsets.to(device),
        )
        for collected, ranks in zip(
            (allowed, masked), rank_targets(queries, shard, config.chunk_items), strict=True
        ):
            collected.append(ranks)
    sharded.train(was_training)
    seen_allowed, seen_masked = torch.cat(allowed), torch.cat(masked)
    num_users = distributed.all_reduce_sum(torch.tensor(len(seen_allowed)))
    return {
        "num_users": int(num_users),
        "seen_masked": rank_metrics(seen_masked, config.ks),
        "seen_allowed": rank_metrics(seen_allowed, config.ks),
    }


def _shard(
    sharded: nn.Module, model: NextItemModel, num_items: int, device: torch.device
) -> ItemShard:
    """This rank's rows as the loss scores them."""
    shards = local_shards(sharded)
    assert len(shards) <= 1, "a table has one shard a rank"
    if not shards:
        dim = model.encoder.config.dim
        return ItemShard(torch.zeros(0, dim, device=device), 0, num_items)
    rows, first = shards[0]
    return ItemShard(model.loss.item_vectors(rows.float()), first, num_items)

"""Time of exact ranks over a catalogue of made vectors, with seen items masked and allowed in one pass."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.benchmarks.timing import median_s, peak_gib
from hstu_rec.evaluator import EvalConfig
from hstu_rec.portions import Portion
from hstu_rec.ranking import LEAST_CHUNK_ITEMS, Queries, rank_targets
from hstu_rec.scores import ItemShard
from hstu_rec.settings import at_least

# (items, width) that are ranked unless told.
SIZES = {"cuda": (10_000_000, 128), "cpu": (1_000_000, 64)}
BLOCK_ITEMS = 2**16


@dataclass(frozen=True, kw_only=True)
class RankingTimes:
    """What is timed."""

    num_queries: int = 10_000
    """Queries of all processes, each with a target."""
    num_items: int = 0
    """Items of the catalogue; 0 for 10 million on CUDA, a million on CPU."""
    dim: int = 0
    """Width of the vectors; 0 for 128 on CUDA, 64 on CPU."""
    num_seen: int = 200
    """Seen items of a query."""
    chunk_items: int = EvalConfig().chunk_items
    """As eval.chunk_items."""
    num_checked: int = 16
    """Queries of each process whose ranks are held against float64, item by item."""
    repeats: int = 3
    """Times that it is run, after three to warm up; the median is shown."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "num_queries", "num_seen", "chunk_items", "repeats")
        return found + at_least(self, 0, "num_items", "dim", "num_checked")


def ranking_times(config: RankingTimes, device: torch.device) -> Iterator[str]:
    """One line: seconds, memory beyond the vectors, and how many ranks were checked. Collective.

    Raises ArithmeticError when one of them is wrong.
    """
    items, dim = SIZES[device.type]
    items, dim = config.num_items or items, config.dim or dim
    shard, queries = _made(config, items, dim, device)
    chunk = Portion("chunk_items", config.chunk_items, LEAST_CHUNK_ITEMS)

    def work() -> None:
        rank_targets(queries, shard, chunk)

    gib = peak_gib(work, device)
    seconds = median_s(work, config.repeats, device)
    num_wrong = _num_wrong(config, shard, queries, chunk)
    if num_wrong:
        raise ArithmeticError(f"{num_wrong} ranks differ from those counted in float64")
    checked = distributed.all_reduce_sum(
        torch.tensor(min(config.num_checked, len(queries.vectors)))
    )
    memory = "" if math.isnan(gib) else f", {gib:.2f} GiB beyond the vectors"
    yield (
        f"{config.num_queries} queries, {items} items x {dim}, {config.num_seen} seen a query: "
        f"{seconds:.2f} s{memory}; {int(checked)} queries equal float64"
    )


def _made(
    config: RankingTimes, num_items: int, dim: int, device: torch.device
) -> tuple[ItemShard, Queries]:
    """This rank's rows, and its queries, unit vectors whose targets are near them."""
    ranks, rank = distributed.world_size(), distributed.rank()
    size = -(-num_items // ranks)
    first = size * rank
    generator = torch.Generator(device).manual_seed(rank)
    shape = max(min(size, num_items - first), 0), dim
    rows = nn.functional.normalize(torch.randn(shape, generator=generator, device=device), dim=1)
    count = (config.num_queries + rank) // ranks
    # Every rank's targets are its own rows: they need not travel.
    own = torch.randint(len(rows), (count,), generator=generator, device=device)
    noise = torch.randn((count, dim), generator=generator, device=device) / dim**0.5
    vectors = nn.functional.normalize(rows[own] * 0.5 + noise, dim=1)
    seen_shape = (count * config.num_seen,)
    seen = torch.randint(num_items, seen_shape, generator=generator, device=device)
    offsets = torch.arange(count + 1, device=device) * config.num_seen
    recent = torch.zeros(count, dtype=torch.int64, device=device)
    return ItemShard(rows, first, num_items), Queries(
        vectors, rows[own], own + first, seen, offsets, recent
    )


def _num_wrong(config: RankingTimes, shard: ItemShard, queries: Queries, chunk: Portion) -> int:
    """How many checked ranks of all processes, allowed or masked, are not those of float64."""
    count = config.num_checked
    found = [ranks[:count] for ranks in rank_targets(queries, shard, chunk)]
    all_vectors, mine = distributed.all_gather_placed(queries.vectors[:count].double())
    targets = distributed.all_gather_rows(queries.target_vectors[:count].double())
    exact = (all_vectors * targets).sum(1)
    ids = distributed.all_gather_rows(queries.target_ids[:count])
    seen = distributed.all_gather_rows(queries.seen_ids.view(-1, config.num_seen)[:count])
    above = torch.stack(
        [
            _above(one, shard, *rest)
            for one, *rest in zip(all_vectors, exact, ids, seen, strict=True)
        ]
    )
    above = distributed.all_reduce_sum(above)[mine]
    wrong = sum(
        (ranks != column).sum() for ranks, column in zip(found, above.unbind(1), strict=True)
    )
    return int(distributed.all_reduce_sum(torch.as_tensor(wrong)))


def _above(vector: Tensor, shard: ItemShard, exact: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    """int64 [2]: items of the shard that score at least `exact`, without the target; of these not seen."""
    ids = torch.arange(len(shard.rows), device=seen.device) + shard.first_id
    hits = torch.cat([part.double() @ vector >= exact for part in shard.rows.split(BLOCK_ITEMS)])
    hits &= ids != target
    return torch.stack([hits.sum(), (hits & ~torch.isin(ids, seen)).sum()])

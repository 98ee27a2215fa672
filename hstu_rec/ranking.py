"""Exact ranking of every target among all items of the sharded table.

    queries of all ranks  --all-gather-->  every rank counts, in its own rows, the items that score at
    least as high as the target  --all-reduce-->  integer ranks  -->  Recall, NDCG, MRR

A rank is the number of items, other than the target, whose score is at least the target's: a hit at k is
rank < k, so ties are never hits. The score of a pair is the float64 sum of the products of its float32
entries; a float32 product, or on Hopper one of halves (`hstu_rec.ops.triton_counts`), decides wherever it is
certain, the rest is computed exactly, so that ranks depend neither on chunks nor on the number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from hstu_rec import distributed
from hstu_rec.portions import Portion, agreed
from hstu_rec.scores import ItemShard, certain_bounds, exact_scores, row_norms, true_float32

# (queries, items) scored at a time: on CPU what stays in the cache, 2.6 times as fast as 1024 x 16384.
TILE = {"cpu": (512, 512), "cuda": (1024, 2**14)}
# Numbers of one slice of exact recomputation: on CPU it stays in the cache, which a table of equal rows
# (every pair is near) shows, being ranked five times faster than with slices of 2**24.
MAX_EXACT_NUMBERS = {"cpu": 2**20, "cuda": 2**24}
# Widest vectors that the kernel takes.
MAX_FUSED_WIDTH = 256
# Items that are scored together however short memory is: with fewer it is the queries that do not fit.
LEAST_CHUNK_ITEMS = 1024


@dataclass(frozen=True)
class Queries:
    """A rank's queries; Q may be 0 and differ between ranks."""

    vectors: Tensor  # float32 [Q, D]
    target_vectors: Tensor  # float32 [Q, D]
    target_ids: Tensor  # int64 [Q]
    seen_ids: Tensor  # int64 [S]
    seen_offsets: Tensor  # int64 [Q + 1]
    num_recent: (
        Tensor  # int64 [Q]: how many of a query's seen ids, the last, seen_score is added to
    )


def rank_targets(
    queries: Queries, shard: ItemShard, chunk: Portion, seen_score: float = 0.0
) -> tuple[Tensor, Tensor]:
    """int64 [Q] ranks of this rank's targets, with seen items allowed and with them masked.

    `seen_score`, the same on all ranks, is added in float64 to the scores of the last `num_recent` seen
    items; `chunk` says how many of this rank's items are scored at a time, and halves by itself.
    Collective. The target itself is never masked. Raises, on all ranks together, FloatingPointError for
    values that are not finite, ValueError for ids outside the catalogue and SharedShortage (a MemoryError)
    when the queries are too many for the memory of a rank.
    """
    _check(queries, shard, chunk.size, seen_score)
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
        distributed.all_gather_rows(queries.num_recent),
    )
    # Nothing in it waits for another rank.
    counts = agreed(lambda: _counts(everyone, shard, chunk, seen_score))
    counts = distributed.all_reduce_sum(counts)
    allowed, masked = counts[:, before : before + len(queries.target_ids)]
    return allowed, masked


def _counts(queries: Queries, shard: ItemShard, chunk: Portion, seen_score: float) -> Tensor:
    """int64 [2, Q]: items of the shard that score at least as high as the targets, with seen items allowed
    and with them masked."""
    seen = _distinct_seen(queries, shard)
    target_scores = exact_scores(queries.vectors, queries.target_vectors)
    target_scores[seen.owners[seen.is_target]] += (
        seen_score * seen.is_recent[seen.is_target].double()
    )
    with true_float32(queries.vectors.device):
        at_least = _count_at_least(queries, target_scores, shard, chunk)
    seen_at_least = _count_seen_at_least(queries, target_scores, shard, seen, seen_score)
    masked = at_least - seen_at_least[0]
    return torch.stack([masked + seen_at_least[1], masked])


def _check(queries: Queries, shard: ItemShard, chunk_items: int, seen_score: float) -> None:
    """All ranks raise together when one of them holds what cannot be ranked."""
    bias = queries.vectors.new_tensor(seen_score)
    floats = chain((bias, queries.vectors, queries.target_vectors), shard.rows.split(chunk_items))
    ids = torch.cat([queries.target_ids, queries.seen_ids])
    is_outside = (ids < 0) | (ids >= shard.num_items)
    # The least and the largest in one pass, NaN if there is one.
    ends = torch.stack(
        [end.float() for values in floats if values.numel() for end in values.aminmax()]
    )
    bad = torch.stack([(~ends.isfinite()).any().long(), is_outside.sum()])
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


def _slices(num_rows: int, width: int, max_numbers: int) -> Iterator[slice]:
    """Row slices of at most `max_numbers` numbers, `width` of them a row."""
    size = max(1, max_numbers // max(width, 1))
    yield from (slice(begin, begin + size) for begin in range(0, num_rows, size))


def _count_at_least(
    queries: Queries, target_scores: Tensor, shard: ItemShard, chunk: Portion
) -> Tensor:
    """int64 [Q]: items of the shard, other than the target, that score at least the target's score."""
    counts = torch.zeros_like(queries.target_ids)
    for found in chunk.over(
        len(shard.rows), lambda part: _count_in_chunk(queries, target_scores, shard, part)
    ):
        counts += found
    return counts


def _count_in_chunk(
    queries: Queries, target_scores: Tensor, shard: ItemShard, part: slice
) -> Tensor:
    """int64 [Q]: those among some of the shard's rows."""
    counts = torch.zeros_like(queries.target_ids)
    items = shard.vectors(part)
    own = queries.target_ids - shard.first_id - part.start
    rest = torch.arange(len(counts), device=counts.device)
    if _fuses(queries.vectors):
        rest = _count_by_kernel(counts, queries.vectors, target_scores, items, own)
    if len(rest):
        vectors, exact = queries.vectors[rest], target_scores[rest]
        counts.index_add_(0, rest, _count_in_tiles(vectors, exact, items, own[rest]))
    return counts


def _fuses(vectors: Tensor) -> bool:
    """Whether the kernel counts for such queries."""
    return distributed.is_hopper(vectors.device) and vectors.shape[1] <= MAX_FUSED_WIDTH


def _count_by_kernel(
    counts: Tensor, vectors: Tensor, exact: Tensor, items: Tensor, own: Tensor
) -> Tensor:
    """Adds to `counts` [Q] the items that score at least `exact`, but for item `own`; int64: the queries that
    are left to count, because too much is near, or their numbers are too large or small for halves."""
    from hstu_rec.ops import triton_counts as kernel

    norms = torch.stack([row_norms(vectors), row_norms(items).amax().expand(len(vectors))])
    is_sound = ((norms > kernel.LEAST_NORM) & (norms < kernel.LARGEST_NORM)).all(0)
    of_queries, of_items = kernel.scale_of(norms)
    low, high = certain_bounds(exact, norms.prod(0), kernel.rounding(items.shape[1]))
    scale = of_queries * of_items
    found = kernel.count_scores(
        kernel.halves(vectors, of_queries[:, None]),
        kernel.halves(items, of_items[:1]),
        (low * scale).float(),
        (high * scale).float(),
        own.clamp(-1, len(items)).int(),
    )
    is_sound &= found.num_near <= found.near.shape[1]
    counts += found.num_above * is_sound
    place = torch.arange(found.near.shape[1], device=counts.device)
    query, place = (is_sound[:, None] & (place < found.num_near[:, None])).nonzero().unbind(1)
    _add_near(counts, vectors, exact, items, query, found.near[query, place].long())
    return (~is_sound).nonzero()[:, 0]


def _add_near(
    counts: Tensor, vectors: Tensor, exact: Tensor, items: Tensor, query: Tensor, item: Tensor
) -> None:
    """Adds 1 to the count of each pair's query, int64 [n], whose item, int64 [n], scores at least `exact`."""
    for part in _slices(len(query), vectors.shape[1], MAX_EXACT_NUMBERS[vectors.device.type]):
        of_query = query[part]
        is_hit = exact_scores(vectors[of_query], items[item[part]]) >= exact[of_query]
        counts.index_add_(0, of_query, is_hit.long())


def _count_in_tiles(vectors: Tensor, exact: Tensor, items: Tensor, own: Tensor) -> Tensor:
    """int64 [Q]: items that score at least `exact`, but for item `own`, a tile of scores at a time."""
    counts = torch.zeros_like(own)
    num_dims, (num_rows, num_columns) = items.shape[1], TILE[items.device.type]
    # No float32 sum of D products is further from the exact one, in whatever order.
    rounding = (num_dims + 8) * torch.finfo(torch.float32).eps
    reach = row_norms(vectors) * row_norms(items).amax()
    low, high = (bound.float() for bound in certain_bounds(exact, reach, rounding))
    for rows in _slices(len(counts), 1, num_rows):
        query, of_rows = vectors[rows], counts[rows]
        for begin in range(0, len(items), num_columns):
            tile = items[begin : begin + num_columns]
            scores = query @ tile.T
            is_above = scores > high[rows, None]
            # Not "at least low": a score that overflowed to NaN is not certain either.
            is_near = (scores < low[rows, None]).logical_not_()
            column = own[rows] - begin
            mine = ((column >= 0) & (column < len(tile))).nonzero()[:, 0]
            is_above[mine, column[mine]] = is_near[mine, column[mine]] = False
            of_rows += is_above.sum(1, dtype=torch.int32)
            near = _places(is_near.logical_xor_(is_above))
            _add_near(of_rows, query, exact[rows], tile, *near)
    return counts


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column), int64 [n], of the true values of a contiguous bool [R, C]."""
    if mask.shape[1] % 8:
        row, column = mask.nonzero().unbind(1)
        return row, column
    # By words of eight first: torch looks as long at a byte as at a word.
    row, word = mask.view(torch.int64).nonzero().unbind(1)
    at, byte = mask.view(len(mask), -1, 8)[row, word].nonzero().unbind(1)
    return row[at], word[at] * 8 + byte


@dataclass(frozen=True)
class _Seen:
    """Every distinct seen item of every query."""

    owners: Tensor  # int64 [S] query
    items: Tensor  # int64 [S]
    is_target: Tensor  # bool [S]
    is_recent: Tensor  # bool [S]: seen_score is added


def _distinct_seen(queries: Queries, shard: ItemShard) -> _Seen:
    num_seen = queries.seen_offsets.diff()
    places = torch.arange(len(num_seen), device=num_seen.device)
    owner = torch.repeat_interleave(places, num_seen)
    distinct, inverse = torch.unique(
        owner * shard.num_items + queries.seen_ids, return_inverse=True
    )
    last = torch.arange(len(owner), device=owner.device)
    is_recent = last >= (queries.seen_offsets[1:] - queries.num_recent)[owner]
    owners, items = distinct // shard.num_items, distinct % shard.num_items
    times_recent = torch.zeros_like(distinct).index_add_(0, inverse, is_recent.long())
    return _Seen(owners, items, items == queries.target_ids[owners], times_recent > 0)


def _count_seen_at_least(
    queries: Queries, target_scores: Tensor, shard: ItemShard, seen: _Seen, seen_score: float
) -> Tensor:
    """int64 [2, Q]: seen items of the shard, other than the target, that score at least the target's score
    without `seen_score`, and with it."""
    counts = target_scores.new_zeros((2, len(target_scores)), dtype=torch.int64)
    local = seen.items - shard.first_id
    is_mine = (local >= 0) & (local < len(shard.rows)) & ~seen.is_target
    row, local, added = (
        seen.owners[is_mine],
        local[is_mine],
        seen_score * seen.is_recent[is_mine].double(),
    )
    limit = MAX_EXACT_NUMBERS[local.device.type]
    for part in _slices(len(row), shard.rows.shape[1], limit):
        scores = exact_scores(queries.vectors[row[part]], shard.vectors(local[part]))
        for count, score in zip(counts, (scores, scores + added[part]), strict=True):
            count.index_add_(0, row[part], (score >= target_scores[row[part]]).long())
    return counts

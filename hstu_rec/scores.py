"""Scores of queries and items, the same in evaluation and in serving.

The score of a pair is the float64 sum of the products of its float32 entries, in one order whatever is beside
it; a product in float32 is near it, and how near is known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hstu_rec.quantised import ItemRows

# torch's sums on CUDA may add in another order where rows are fewer than this.
LEAST_ROWS = 64
# Items that are searched together for the best: so few that their scores stay in pieces of memory
# that are used again, which is twice as fast as in larger ones.
CHUNK_ITEMS = (2**12, 2**16)
# On CUDA larger ones, of which there are fewer: the host waits for each.
CHUNK_SCORES = {"cpu": 2**22, "cuda": 2**26}
# How many more than asked are scored exactly.
NUM_SPARE = 16
# Norms below this have finite products.
MAX_NORM = 1e18


@dataclass(frozen=True)
class ItemShard:
    """A rank's rows of the catalogue; it may own none."""

    rows: ItemRows  # [n, D]
    first_id: int
    num_items: int  # of the whole catalogue
    scored: Callable[[Tensor], Tensor] = torch.clone
    """Of float32 rows what is scored; of each alone."""

    def vectors(self, part: slice | Tensor) -> Tensor:
        """float32 [k, D] of some rows, as they are scored."""
        return self.score(self.rows[part])

    def score(self, rows: Tensor) -> Tensor:
        """float32 [k, D]: what is scored of rows of the table, of one row the same among any others."""
        rows = rows.float()
        missing = max(LEAST_ROWS - len(rows), 0)
        return self.scored(nn.functional.pad(rows, (0, 0, 0, missing)))[: len(rows)]


def exact_scores(left: Tensor, right: Tensor) -> Tensor:
    """float64 [..., n] dot products of float32 [..., n, D] pairs, summed in one order whatever n."""
    products = left.double() * right.double()
    while products.shape[-1] > 1:
        half = (products.shape[-1] + 1) // 2
        rest = products[..., half:]
        products = products[..., :half] + nn.functional.pad(rest, (0, half - rest.shape[-1]))
    return products.sum(-1)


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices in float32: TF32, bfloat16 or autocast would break the bound."""
    mkldnn: Any = torch.backends.mkldnn  # `matmul` is missing from its annotations
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def certain_bounds(exact: Tensor, reach: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """float64 [Q] low and high: a score below low, or above high, is so exactly too.

    No score is further than `rounding` times reach [Q], the product of the query's norm and the largest of
    the items, from the exact one, plus what underflows; where products may overflow nothing is certain.
    """
    limits = torch.finfo(torch.float32)
    # Also of the bounds as float32.
    margin = rounding * (reach + limits.tiny / limits.eps) + limits.eps * exact.abs()
    margin[reach > limits.max / 2] = torch.inf
    return exact - margin, exact + margin


def row_norms(vectors: Tensor) -> Tensor:
    """float64 [n] of float32 [n, D]."""
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)


@dataclass(frozen=True)
class Catalogue:
    """All items, to find the best of; what is scored of a row is a multiple of it."""

    shard: ItemShard
    scales: Tensor
    """float32 [N]: the multiple, about."""
    longest: float
    """The largest norm of what is scored."""

    @classmethod
    def of(cls, shard: ItemShard) -> "Catalogue":
        """Raises FloatingPointError for rows that are not finite, or so large that products may not be."""
        scales, longest = torch.zeros(len(shard.rows), device=shard.rows.device), 0.0
        for part in _parts(len(shard.rows), CHUNK_ITEMS[1]):
            norms, scored = (row_norms(rows) for rows in (shard.rows[part], shard.vectors(part)))
            if not (norms < MAX_NORM).all():
                raise FloatingPointError("rows of items hold NaN, infinity or numbers near it")
            scales[part] = torch.where(norms > 0, scored / norms, 0).float()
            longest = max(longest, float(scored.max()))
        return cls(shard, scales, longest)


@dataclass(frozen=True)
class Seen:
    """Items that are scored apart."""

    owners: Tensor  # int64 [S], the query
    items: Tensor  # int64 [S]; an item may be given several times
    added: float
    """What is added to their scores, in float64; -inf where they are no candidates."""

    def within(self, part: slice) -> tuple[Tensor, Tensor]:
        """(query, place), int64 [n], of those among a part of the catalogue."""
        is_here = (self.items >= part.start) & (self.items < part.stop)
        return self.owners[is_here], self.items[is_here] - part.start


@torch.no_grad()
def best_items(
    queries: Tensor, catalogue: Catalogue, num_best: int, seen: Seen
) -> tuple[Tensor, Tensor]:
    """float64 [Q, k] scores, falling, and int64 [Q, k] items of the best; of equal scores the lower item
    first; k is num_best or all. What is no candidate has the score -inf.

    queries: float32 [Q, D]. Products in float32 choose, a chunk of items at a time, what is scored exactly:
    num_best and some more, and the whole chunk where these are too near to others. Raises FloatingPointError
    for queries that are not finite.
    """
    norms, limits = row_norms(queries), torch.finfo(torch.float32)
    if not (norms < MAX_NORM).all():
        raise FloatingPointError("queries are not finite: the model holds NaN or infinity")
    num_best = min(num_best, len(catalogue.scales))
    best = norms.new_full((len(queries), num_best), -torch.inf)
    items = torch.zeros_like(best, dtype=torch.int64)
    # The second part is what underflows before it is scaled.
    reach = norms * catalogue.longest + catalogue.scales.amax() * limits.tiny / limits.eps
    few, many = CHUNK_ITEMS
    num_scores = CHUNK_SCORES[queries.device.type]
    size = min(max(num_scores // max(len(queries), 1), few), many)
    with true_float32(queries.device):
        for part in _parts(len(catalogue.scales), size):
            _add_chunk((best, items), queries, catalogue, part, seen, reach)
    return best, items


def _parts(num_items: int, size: int) -> Iterator[slice]:
    for begin in range(0, num_items, size):
        yield slice(begin, min(begin + size, num_items))


def _add_chunk(
    found: tuple[Tensor, Tensor],
    queries: Tensor,
    catalogue: Catalogue,
    part: slice,
    seen: Seen,
    reach: Tensor,
) -> None:
    """Makes the best `found` those of the former items and of a chunk that comes after them."""
    best, num_best = found[0], found[0].shape[1]
    near, is_seen = _near(queries, catalogue, part, seen)
    # No product of two sums, of the scores and of the norms, is further away.
    rounding = 2 * (queries.shape[1] + 8) * torch.finfo(torch.float32).eps
    _, high = certain_bounds(near.amax(1).double(), reach, rounding)
    rest = (high > best[:, -1]).nonzero()[:, 0]
    least, places = near[rest].topk(min(num_best + NUM_SPARE, near.shape[1]), sorted=False)
    least, places = least.amin(1).double(), places.sort(1).values
    former = found[0][rest], found[1][rest]
    vectors = catalogue.shard.vectors(part.start + places.flatten()).unflatten(0, places.shape)
    scores = exact_scores(queries[rest, None], vectors)
    scores[is_seen[rest[:, None], places]] += seen.added
    merged = _merged(former, scores, part.start + places)
    for whole, values in zip(found, merged, strict=True):
        whole[rest] = values
    if places.shape[1] == near.shape[1]:
        return
    _, high = certain_bounds(least, reach[rest], rounding)
    is_certain = (merged[0][:, -1] > high) | least.isneginf()
    for place in (~is_certain).nonzero()[:, 0]:
        query = rest[place]
        scores = exact_scores(queries[query], catalogue.shard.vectors(part))[None]
        scores[:, is_seen[query]] += seen.added
        every = torch.arange(part.start, part.stop, device=queries.device)[None]
        merged = _merged((former[0][place, None], former[1][place, None]), scores, every)
        found[0][query], found[1][query] = merged[0][0], merged[1][0]


def _near(queries: Tensor, catalogue: Catalogue, part: slice, seen: Seen) -> tuple[Tensor, Tensor]:
    """float32 [Q, C] scores of a part of the items, about, and bool [Q, C] which are seen."""
    rows, scales = catalogue.shard.rows[part].float(), catalogue.scales[part]
    if len(queries) < rows.shape[1]:
        near = (queries @ rows.T).mul_(scales)
    else:
        near = queries @ (rows * scales[:, None]).T
    is_seen, here = torch.zeros_like(near, dtype=torch.bool), seen.within(part)
    is_seen[here] = True
    near[here] = near[here] + seen.added  # once where an item is given twice
    return near, is_seen


def _merged(former: tuple[Tensor, Tensor], scores: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """The best of former ones, in order, and of `items` [Q, m], which rise and come after them."""
    num_best = former[0].shape[1]
    scores, order = torch.cat([former[0], scores], 1).sort(dim=1, descending=True, stable=True)
    items = torch.cat([former[1], items], 1).gather(1, order[:, :num_best])
    return scores[:, :num_best].contiguous(), items

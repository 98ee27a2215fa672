"""SoftmaxLoss: softmax losses over many candidates, and their gradients in the same pass.

Logits are made a chunk of queries at a time, and a tile of candidates at a time while it is in cache, so
that neither they nor their gradients are ever held whole (the idea of Liger-Kernel's and Apple's fused
linear cross entropy); on CUDA they are never written at all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.transfer import on_device

LOG2_E = math.log2(math.e)
# Logits of one chunk of queries, all of which are held until the sums over the candidates are known. When
# the catalogue is divided, each chunk waits for the other ranks.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
# Logits of a tile, the part of a chunk that is worked on while it is in cache.
TILE_LOGITS = {"cpu": 2**19, "cuda": 2**27}
MIN_TILE_WIDTH = 64
# Widest vectors that the fused kernels take.
MAX_FUSED_VECTOR = 256


@dataclass(frozen=True)
class Negatives:
    """The candidates of a step: the same on every rank, or divided over the ranks."""

    ids: Tensor
    """int64 [R], distinct, sorted; when divided, this rank's part."""
    log_weights: Tensor | None = None
    """float32 [R]: log of the times drawn, less logQ; None for zeros."""
    target_log_q: Tensor | None = None
    """float32 [P]: logQ of this rank's targets; None for zeros."""
    largest_part: int = 0
    """The largest R of all ranks when divided, else 0."""
    is_whole: bool = False
    """True when `ids` are those of all items, 0 .. R - 1."""
    seen: Tensor | None = None
    """int64 [3, F] (first, end, place), by place: the histories of positions first .. end - 1, of all ranks
    when divided, hold candidate `place`; None without seen bias."""
    num_seen: int | None = None
    """Pairs of positions and candidates that `seen` stands for, if counted ahead."""
    is_scored: Tensor | None = None
    """bool [P]: positions that count; None for all. Of one process."""
    is_target_seen: Tensor | None = None
    """bool [P]: whether a target is in its own history; None without seen bias."""

    @property
    def is_divided(self) -> bool:
        """True when the ranks' parts are disjoint and together all candidates."""
        return self.largest_part > 0

    def to(self, device: torch.device) -> "Negatives":
        """The candidates on `device`."""
        return on_device(self, device)


class SoftmaxLoss(torch.autograd.Function):
    """sum_p log(exp(t_p) + sum_{r: id_r != target_p} exp(q_p . c_r + w_r + b s_pr)) - t_p, a scalar.

    queries q [P, D], target_logits t [P], candidates c [R, D], target_ids int64 [P], negatives (their log
    weights w and seen pairs s), seen_bias b, a scalar or None, is_bounded: no exponential of a logit can
    overflow, dtype: of the products in the fused kernels. All gradients, of the sum of all ranks' losses, are
    made in forward; none of w.

    On Hopper, without a seen bias, fused kernels do it (`hstu_rec.ops.triton_softmax`); elsewhere products
    are of float32.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        queries, target_logits, candidates, target_ids, negatives, seen_bias, is_bounded, dtype = (
            inputs
        )
        mine = slice(0, len(queries))
        if negatives.is_divided:
            queries, target_logits, target_ids, mine = _gather(queries, target_logits, target_ids)
        # Logits of base 2 from here on: torch's CPU exp2 takes 0.6 of the time of exp.
        whole = _Scored.of(queries, candidates, target_ids, negatives, seen_bias)
        is_hopper = distributed.is_hopper(queries.device)
        if fuses(is_hopper, queries.dtype, queries.shape[1], whole.seen is not None):
            found = _fused(whole, target_logits * LOG2_E, negatives, is_bounded, dtype)
        else:
            targets = target_logits * LOG2_E
            found = _in_chunks(whole, queries, targets, negatives, is_bounded)
        if negatives.is_divided:
            distributed.all_reduce_sum(found.queries)
        ctx.save_for_backward(
            found.queries[mine], found.targets[mine], found.candidates, found.seen_bias
        )
        return found.losses[mine].sum() / LOG2_E

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        of_queries, of_targets, of_candidates, of_bias = (s * grad for s in ctx.saved_tensors)
        of_bias = of_bias if ctx.needs_input_grad[5] else None
        return of_queries, of_targets, of_candidates, None, None, of_bias, None, None


class _Found(NamedTuple):
    """Losses of base 2 of all queries, and the gradients of their sum."""

    losses: Tensor  # [P]
    queries: Tensor  # [P, D]; those of this rank's candidates
    targets: Tensor  # [P]
    candidates: Tensor  # [R, D]
    seen_bias: Tensor  # a scalar


def fuses(is_hopper: bool, dtype: torch.dtype, width: int, has_seen: bool) -> bool:
    """Whether the fused kernels make the loss of such vectors, on such a GPU or not."""
    return is_hopper and dtype == torch.float32 and width <= MAX_FUSED_VECTOR and not has_seen


def _fused(
    whole: "_Scored", targets: Tensor, negatives: Negatives, is_bounded: bool, dtype: torch.dtype
) -> _Found:
    """By kernels that write no logits. `targets`: their logits, of base 2."""
    from hstu_rec.ops.triton_softmax import Scored, softmax_grads, softmax_sums

    queries, candidates = (t.to(dtype).contiguous() for t in (whole.queries, whole.candidates))
    x = Scored(queries, candidates, whole.weights, whole.hits)
    sums = softmax_sums(x, is_bounded)
    top = sums.top
    if not is_bounded:
        top = torch.maximum(top, targets)
        if negatives.is_divided:
            distributed.all_reduce_max(top)
    scale = (sums.top - top).exp2_()
    total = sums.total * scale
    if negatives.is_divided:
        distributed.all_reduce_sum(total)
    target_weight = (targets - top).exp2_()
    total += target_weight
    log_total = total.log2() + top
    losses, of_targets, scale = log_total - targets, target_weight / total - 1, scale / total
    if (counted := negatives.is_scored) is not None:
        losses, of_targets, scale = (
            values.masked_fill(~counted, 0) for values in (losses, of_targets, scale)
        )
        log_total = log_total.masked_fill(~counted, torch.inf)
    of_candidates = softmax_grads(x, log_total) / LOG2_E
    of_queries = sums.mixed * scale[:, None]
    return _Found(losses, of_queries, of_targets, of_candidates, targets.new_zeros(()))


def _in_chunks(
    whole: "_Scored", queries: Tensor, targets: Tensor, negatives: Negatives, is_bounded: bool
) -> _Found:
    """By products of a chunk of `queries` at a time. `targets`: their logits, of base 2."""
    candidates = whole.candidates
    losses, grad_targets = torch.empty_like(targets), torch.empty_like(targets)
    grad_queries, grad_candidates = torch.zeros_like(queries), torch.zeros_like(candidates)
    grad_bias = queries.new_zeros(())
    # As many chunks on every rank, because each ends with a collective when divided.
    width = max(len(candidates), negatives.largest_part, 1)
    num_chunks = math.ceil(len(queries) * width / CHUNK_LOGITS[queries.device.type])
    size = math.ceil(len(queries) / max(num_chunks, 1)) or 1
    block = queries.new_empty(min(size, len(queries)) * len(candidates))
    for begin in range(0, len(queries), size):
        part = slice(begin, begin + size)
        target, top, query = targets[part], torch.zeros_like(targets[part]), queries[part]
        tiles = whole.chunk(begin, begin + size).tiles(block)
        if not is_bounded:
            tiles = list(tiles)
            top = torch.stack([target, *(tile.logits.amax(1) for tile in tiles)]).amax(0)
            if negatives.is_divided:
                distributed.all_reduce_max(top)
            for tile in tiles:
                tile.logits.sub_(top[:, None])
        # When bounded, each tile is exponentiated as soon as it is made, while it is in cache.
        exponentials = [(tile, tile.logits.exp2_().sum(1)) for tile in tiles]
        total = sum((s for _, s in exponentials), torch.zeros_like(top))
        if negatives.is_divided:
            distributed.all_reduce_sum(total)
        target_weight = (target - top).exp2_()
        total += target_weight
        losses[part] = total.log2() + (top - target)
        grad_targets[part] = target_weight.div_(total).sub_(1)
        if negatives.is_scored is not None:
            not_counted = ~negatives.is_scored[part]
            losses[part].masked_fill_(not_counted, 0)
            grad_targets[part].masked_fill_(not_counted, 0)
            total = total.masked_fill(not_counted, torch.inf)
        query = query / total[:, None]
        for (at, tile, seen), _ in exponentials:
            grad_queries[part].addmm_(tile, candidates[at])
            grad_candidates[at].addmm_(tile.T, query)
            if seen is not None:
                grad_bias += (tile[seen] / total[seen[0]]).sum()
        grad_queries[part] /= total[:, None]
    return _Found(losses, grad_queries, grad_targets, grad_candidates, grad_bias)


class _Tile(NamedTuple):
    """Logits of base 2 of a chunk of queries and some candidates."""

    candidates: slice
    logits: Tensor  # [n, t]
    seen: tuple[Tensor, Tensor] | None  # int64 [s], int64 [s]: where the seen bias was added


@dataclass(frozen=True)
class _Scored:
    """Queries and what they are scored against."""

    queries: Tensor  # [n, D], times log2(e)
    candidates: Tensor  # [R, D]
    weights: Tensor | None  # [R], times log2(e)
    hits: Tensor  # int64 [n]: the place of each target among the candidates, or -1
    seen: Tensor | None  # int64 [3, F]: see Negatives
    num_seen: int | None  # pairs that `seen` stands for, if known
    seen_bias: Tensor | None  # times log2(e)

    @classmethod
    def of(
        cls,
        queries: Tensor,
        candidates: Tensor,
        target_ids: Tensor,
        negatives: Negatives,
        seen_bias: Tensor | None,
    ) -> "_Scored":
        """All queries."""
        weights = negatives.log_weights
        return cls(
            queries * LOG2_E,
            candidates,
            None if weights is None else weights * LOG2_E,
            places(target_ids, negatives.ids),
            negatives.seen,
            negatives.num_seen,
            None if seen_bias is None else seen_bias * LOG2_E,
        )

    def chunk(self, begin: int, end: int) -> "_Scored":
        """Queries begin .. end - 1."""
        if begin == 0 and end >= len(self.queries):
            return self
        part, seen = slice(begin, end), self.seen
        if seen is not None:
            first, last, place = seen
            seen = torch.stack([(first - begin).clamp(min=0), last.clamp(max=end) - begin, place])
        queries, hits = self.queries[part], self.hits[part]
        return replace(self, queries=queries, hits=hits, seen=seen, num_seen=None)

    def tiles(self, block: Tensor) -> Iterator[_Tile]:
        """The logits q . c + w + b, in views of `block`.

        Where a query's target itself was drawn (its hit >= 0) they are -inf, so that it is no negative of
        its own.
        """
        num_queries, num_candidates = len(self.queries), len(self.candidates)
        limit = TILE_LOGITS[self.queries.device.type]
        # As wide as each other, and not so narrow that the products become slow.
        num_tiles = math.ceil(num_queries * num_candidates / limit)
        num_tiles = max(min(num_tiles, num_candidates // MIN_TILE_WIDTH), 1)
        width = math.ceil(num_candidates / num_tiles) or 1
        bounds = [*range(0, num_candidates, width), num_candidates]
        is_whole = num_tiles == 1
        # Where all is one tile nothing is cut, and no count waits for the device.
        seen_slices = (
            [slice(None)] * (len(bounds) - 1)
            if is_whole or self.seen is None
            else _slices(self.seen[2], bounds)
        )
        for (begin, end), part in zip(pairwise(bounds), seen_slices, strict=True):
            tile = block[begin * num_queries : end * num_queries].view(num_queries, -1)
            torch.mm(self.queries, self.candidates[begin:end].T, out=tile)
            if self.weights is not None:
                tile += self.weights[begin:end]
            seen = None
            if self.seen is not None and self.seen_bias is not None:
                seen = _entries(self.seen[:, part], begin, self.num_seen if is_whole else None)
                tile[seen] += self.seen_bias
            _hide(tile, self.hits - begin)
            yield _Tile(slice(begin, end), tile, seen)


def _slices(places: Tensor, bounds: list[int]) -> list[slice]:
    """Which of the sorted `places` are in each tile, bounds[i] .. bounds[i + 1]."""
    edges = torch.searchsorted(places, torch.tensor(bounds, device=places.device)).tolist()
    return [slice(*pair) for pair in pairwise(edges)]


def _hide(tile: Tensor, hits: Tensor) -> None:
    """Sets the logits [n, t] at the columns `hits` int64 [n] to -inf, where there is such a column."""
    column = hits.clamp(0, max(tile.shape[1] - 1, 0))[:, None]
    if tile.shape[1]:
        own = tile.gather(1, column)
        tile.scatter_(1, column, own.masked_fill_(column == hits[:, None], -torch.inf))


def _entries(seen: Tensor, begin: int, count: int | None) -> tuple[Tensor, Tensor]:
    """(rows, columns), int64 [s], of a tile whose first candidate is `begin`, from (first, end, place); s is
    `count`, or counted."""
    first, end, place = seen
    counts = (end - first).clamp_(min=0)
    # One after another, what each row is ahead of the first one of its range by.
    starts = (counts.cumsum(0) - counts - first).repeat_interleave(counts, output_size=count)
    rows = torch.arange(len(starts), device=starts.device) - starts
    return rows, (place - begin).repeat_interleave(counts, output_size=count)


def places(wanted: Tensor, ids: Tensor) -> Tensor:
    """int64 [P]: the place of each of `wanted` among the distinct sorted `ids`, or -1."""
    if not len(ids):
        return torch.full_like(wanted, -1)
    place = torch.searchsorted(ids, wanted).clamp_(max=len(ids) - 1)
    return torch.where(ids[place] == wanted, place, -1)


def _gather(
    queries: Tensor, target_logits: Tensor, target_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, slice]:
    """The positions of all ranks, and which of them are this rank's."""
    columns = (queries, target_logits[:, None], target_ids[:, None].view(queries.dtype))
    packed, mine = distributed.all_gather_placed(torch.cat(columns, dim=1))
    queries, target_logits, target_ids = packed.split([part.shape[1] for part in columns], dim=1)
    return (
        queries.contiguous(),
        target_logits[:, 0].contiguous(),
        target_ids.contiguous().view(torch.int64)[:, 0],
        mine,
    )

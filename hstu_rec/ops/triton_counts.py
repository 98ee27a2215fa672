"""How many candidates score above each query's bound, in Triton: no score is ever written.

A program owns a block of queries and walks over a part of the candidates. Scores are sums of three products
of halves: x = high + low, float16 both, and q . x is taken as low . high + high . low + high . high. What is
too near to the bound for such a sum to decide is listed, to be computed exactly.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that fill a large GPU, about.
NUM_PROGRAMS = 1024
# (queries that a program owns, candidates that it meets at a time, warps, stages)
FORM, WIDE_FORM = (128, 64, 8, 3), (64, 32, 4, 2)
# Near candidates that are listed of a query at a time.
MAX_NEAR = 512
# Vectors are brought to a norm of this, at most, by a power of two: float16 holds their parts then.
SCALED_NORM = 2.0**8
# Norms that can be.
LEAST_NORM, LARGEST_NORM = 2.0**-90, 2.0**90


class Counts(NamedTuple):
    """Of each query, among some candidates."""

    num_above: Tensor  # int32 [Q]: that score above `high`
    num_near: Tensor  # int32 [Q]: that score neither above `high` nor below `low`
    near: Tensor  # int32 [Q, MAX_NEAR]: places of those, in no order, as many as there is room for


def rounding(width: int) -> float:
    """No score is further than this times |q||x| from the exact one, |x| being the largest norm.

    Two halves leave 2**-22 of a number out, or 2**-32 of the norm, and the product of the low ones is left
    out: 4 * 2**-22. Tensor cores align what they add, 16 products and the sum so far, and cut it off (Fasi et
    al. 2021, "Numerical behavior of NVIDIA tensor cores", section 5): 17/16 * 2**-23 a product, and the low
    ones, which come first, add 2**-11 of that twice.
    """
    return 4 * 2.0**-22 + (1.07 * width + 17) * 2.0**-23


@triton.jit
def _load(tensor, rows, count, width, W: tl.constexpr):
    """[N, W]: rows below `count`, 0 elsewhere."""
    column = tl.arange(0, W)
    at = rows.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(tensor + at, mask=(rows < count)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def count_of_queries(
    q_high: "Any", q_low: "Any", x_high: "Any", x_low: "Any", low_of: "Any", high_of: "Any", own: "Any",
    above_of: "Any", num_near: "Any", near: "Any", num_queries: "Any", num_items: "Any", width: "Any",
    part: "Any",
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, ROOM: tl.constexpr,
) -> None:  # fmt: skip
    """Adds to above_of and num_near [Q], and lists in near [Q, ROOM], what M queries find in `part` items."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    is_query = rows < num_queries
    of_high = _load(q_high, rows, num_queries, width, W)
    of_low = _load(q_low, rows, num_queries, width, W)
    # Beyond the last query everything is below.
    low = tl.load(low_of + rows, mask=is_query, other=float("inf"))[:, None]
    high = tl.load(high_of + rows, mask=is_query, other=float("inf"))[:, None]
    target = tl.load(own + rows, mask=is_query, other=-1)[:, None]
    lists = near + rows.to(tl.int64)[:, None] * ROOM
    above = tl.zeros([M, N], dtype=tl.int32)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, num_items), N):
        columns = start + tl.arange(0, N)
        of_items = tl.trans(_load(x_high, columns, num_items, width, W))
        scores = tl.dot(of_low, of_items)
        scores = tl.dot(of_high, tl.trans(_load(x_low, columns, num_items, width, W)), acc=scores)
        scores = tl.dot(of_high, of_items, acc=scores)
        is_counted = (
            (columns < num_items)[None, :] & (columns[None, :] != target) & is_query[:, None]
        )
        is_above = scores > high
        # Not "at least low": a score that overflowed to NaN is not certain either.
        is_near = is_counted & ((scores < low) == 0) & (is_above == 0)
        above += (is_above & is_counted).to(tl.int32)
        at = rows[:, None] + tl.zeros([M, N], dtype=tl.int32)
        slot = tl.atomic_add(num_near + at, 1, mask=is_near, sem="relaxed")
        tl.store(lists + slot, columns[None, :] + at * 0, mask=is_near & (slot < ROOM))
    tl.atomic_add(above_of + rows, tl.sum(above, 1), mask=is_query, sem="relaxed")


def scale_of(norm: Tensor) -> Tensor:
    """float64: the power of two that brings a norm, float64, to SCALED_NORM at most."""
    return 2.0 ** (SCALED_NORM / norm).log2().floor()


def halves(vectors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """float16 (high, low) of float32 [n, D] times a scale, whose sum it is but for 2**-22 of each number."""
    scaled = vectors * scale.float()
    high = scaled.half()
    return high, (scaled - high).half()


def count_scores(
    queries: tuple[Tensor, Tensor],
    items: tuple[Tensor, Tensor],
    low: Tensor,
    high: Tensor,
    own: Tensor,
) -> Counts:
    """Counts of the `halves` of queries [Q, D] among those of items [C, D].

    low, high: float32 [Q], of scaled scores. own: int32 [Q], the place of an item that is not counted, or
    one outside.
    """
    (num_queries, width), num_items = queries[0].shape, len(items[0])
    above, num_near = low.new_zeros(2, num_queries, dtype=torch.int32)
    near = above.new_empty(num_queries, MAX_NEAR)
    block, step, warps, stages = FORM if width <= 128 else WIDE_FORM
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    blocks, steps = math.ceil(num_queries / block), math.ceil(num_items / step)
    part = math.ceil(steps / max(NUM_PROGRAMS // max(blocks, 1), 1)) * step
    if num_queries and num_items:
        count_of_queries[(blocks, math.ceil(num_items / part))](
            *queries, *items, low, high, own, above, num_near, near, num_queries, num_items, width, part,
            M=block, N=step, W=max(16, triton.next_power_of_2(width)), ROOM=MAX_NEAR, **options,
        )  # fmt: skip
    return Counts(above, num_near, near)

"""The sums of a softmax over many candidates in Triton, and their gradients: no logit is ever written.

    sums of queries      a program owns a block of queries and walks over a part of the candidates, as flash
                         attention does whose keys and values are the candidates (arXiv 2205.14135)
    grads of candidates  a program owns a block of candidates and walks over a part of the queries, making the
                         logits again

Logits are of base 2: s_pr = q_p . c_r + w_r, and -inf at a query's hit, the candidate that is its target.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# Programs that fill a large GPU, about; fewer blocks than that are shared out over more of them.
NUM_PROGRAMS = 512
# Steps that a program walks at least.
MIN_STEPS = 4
# (rows that a program owns, rows that it meets at a time, warps, stages), the quickest on an H100 of 128 wide
# vectors, 4096 queries and a million candidates; wide vectors and exact float32 take more shared memory.
SUMS = {"half": (128, 32, 8, 3), "tf32": (256, 64, 8, 2), "large": (64, 32, 4, 2)}
GRADS = {"half": (128, 64, 4, 2), "tf32": (256, 64, 8, 2), "large": (64, 32, 4, 2)}


class Scored(NamedTuple):
    """Queries and candidates; in a kernel, pointers."""

    queries: Any  # [P, D], float32 or bfloat16, contiguous
    candidates: Any  # [R, D], of the same dtype, contiguous
    weights: Any  # float32 [R]; None for zeros
    hits: Any  # int64 [P]: the place of each target among the candidates, or -1


class Sums(NamedTuple):
    """Over the candidates of each query."""

    top: Tensor  # float32 [P]: the largest logit, or 0 for logits that need none
    total: Tensor  # float32 [P]: sum of 2**(s - top)
    mixed: Tensor  # float32 [P, D]: sum of 2**(s - top) c


@triton.jit
def _load_rows(tensor, rows, count, width, W: tl.constexpr):
    """[N, W]: rows below `count`, 0 elsewhere."""
    column = tl.arange(0, W)
    at = rows.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(tensor + at, mask=(rows < count)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _logits(x, queries, candidates, hits, columns, num_candidates, PRECISION: tl.constexpr):
    """float32 [M, N], -inf where nothing is scored."""
    logits = tl.dot(queries, tl.trans(candidates), input_precision=PRECISION)
    is_candidate = columns < num_candidates
    if x.weights is not None:
        logits += tl.load(x.weights + columns, mask=is_candidate, other=0.0)[None, :]
    is_scored = is_candidate[None, :] & (hits[:, None] != columns[None, :])
    return tl.where(is_scored, logits, -float("inf"))


@triton.jit
def sums_of_queries(
    x: "Any", top_of: "Any", total_of: "Any", mixed_of: "Any", num_queries: "Any", num_candidates: "Any",
    width: "Any", part: "Any",
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, IS_BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """`Sums` of M queries over `part` candidates, to row program_id(1) of [parts, P], [parts, P, D]."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    queries = _load_rows(x.queries, rows, num_queries, width, W)
    hits = tl.load(x.hits + rows, mask=rows < num_queries, other=-1).to(tl.int32)
    mixed = tl.zeros([M, W], dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    top = tl.full([M], 0.0 if IS_BOUNDED else -1e30, dtype=tl.float32)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, num_candidates), N):
        columns = start + tl.arange(0, N)
        candidates = _load_rows(x.candidates, columns, num_candidates, width, W)
        logits = _logits(x, queries, candidates, hits, columns, num_candidates, PRECISION)
        if not IS_BOUNDED:
            higher = tl.maximum(top, tl.max(logits, 1))
            rest = tl.exp2(top - higher)
            total *= rest
            mixed *= rest[:, None]
            top = higher
            logits -= top[:, None]
        weights = tl.exp2(logits)
        total += tl.sum(weights, 1)
        mixed = tl.dot(
            weights.to(candidates.dtype), candidates, acc=mixed, input_precision=PRECISION
        )
    at = tl.program_id(1).to(tl.int64) * num_queries + rows
    is_query = rows < num_queries
    tl.store(top_of + at, top, mask=is_query)
    tl.store(total_of + at, total, mask=is_query)
    column = tl.arange(0, W)
    is_entry = is_query[:, None] & (column < width)[None, :]
    tl.store(mixed_of + at[:, None] * width + column[None, :], mixed, mask=is_entry)


@triton.jit
def grads_of_candidates(
    x: "Any", log_total: "Any", grads_of: "Any", num_queries: "Any", num_candidates: "Any", width: "Any",
    part: "Any",
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """sum_p 2**(s_pr - log_total_p) q_p of N candidates over `part` queries, to row program_id(1) of
    [parts, R, D]."""
    columns = tl.program_id(0) * N + tl.arange(0, N)
    candidates = _load_rows(x.candidates, columns, num_candidates, width, W)
    grads = tl.zeros([N, W], dtype=tl.float32)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, num_queries), M):
        rows = start + tl.arange(0, M)
        is_query = rows < num_queries
        queries = _load_rows(x.queries, rows, num_queries, width, W)
        hits = tl.load(x.hits + rows, mask=is_query, other=-1).to(tl.int32)
        logits = tl.dot(candidates, tl.trans(queries), input_precision=PRECISION)
        if x.weights is not None:
            weights = tl.load(x.weights + columns, mask=columns < num_candidates, other=0.0)
            logits += weights[:, None]
        logits -= tl.load(log_total + rows, mask=is_query, other=0.0)[None, :]
        # Queries after the last are zeros, and so is what they add.
        shares = tl.where(hits[None, :] != columns[:, None], tl.exp2(logits), 0.0)
        grads = tl.dot(shares.to(queries.dtype), queries, acc=grads, input_precision=PRECISION)
    at = tl.program_id(1).to(tl.int64) * num_candidates + columns
    column = tl.arange(0, W)
    is_entry = (columns < num_candidates)[:, None] & (column < width)[None, :]
    tl.store(grads_of + at[:, None] * width + column[None, :], grads, mask=is_entry)


def softmax_sums(x: Scored, is_bounded: bool) -> Sums:
    """The sums of all queries. `is_bounded`: no 2**s can overflow."""
    num_queries, width = x.queries.shape
    block, step, options = _form(x, SUMS)
    parts, part = _parts(num_queries, block, len(x.candidates), step)
    top, total = x.hits.new_empty(2, parts, num_queries, dtype=torch.float32)
    mixed = total.new_empty(parts, num_queries, width)
    if num_queries:
        grid = math.ceil(num_queries / block), parts
        sums_of_queries[grid](
            x, top, total, mixed, num_queries, len(x.candidates), width, part,
            IS_BOUNDED=is_bounded, M=block, N=step, **options,
        )  # fmt: skip
    if parts == 1:
        return Sums(top[0], total[0], mixed[0])
    if is_bounded:
        return Sums(top[0], total.sum(0), mixed.sum(0))
    highest = top.amax(0)
    scale = (top - highest).exp2_()
    return Sums(highest, (total * scale).sum(0), (mixed * scale[:, :, None]).sum(0))


def softmax_grads(x: Scored, log_total: Tensor) -> Tensor:
    """float32 [R, D]: sum_p 2**(s_pr - log_total_p) q_p, with float32 `log_total` [P]."""
    num_candidates, width = x.candidates.shape
    block, step, options = _form(x, GRADS)
    parts, part = _parts(num_candidates, block, len(x.queries), step)
    grads = log_total.new_empty(parts, num_candidates, width)
    if num_candidates:
        grid = math.ceil(num_candidates / block), parts
        grads_of_candidates[grid](
            x, log_total, grads, len(x.queries), num_candidates, width, part,
            M=step, N=block, **options,
        )  # fmt: skip
    return grads[0] if parts == 1 else grads.sum(0)


def _parts(num_owned: int, block: int, num_met: int, step: int) -> tuple[int, int]:
    """(parts that what is met is cut into, how many each holds)."""
    blocks = max(math.ceil(num_owned / block), 1)
    steps = max(math.ceil(num_met / step), 1)
    wanted = min(math.ceil(NUM_PROGRAMS / blocks), max(steps // MIN_STEPS, 1))
    of_each = math.ceil(steps / wanted)
    return math.ceil(steps / of_each), of_each * step


def _form(
    x: Scored, forms: dict[str, tuple[int, int, int, int]]
) -> tuple[int, int, dict[str, Any]]:
    """(rows that a program owns, rows that it meets at a time, options to compile it with)."""
    width = max(16, triton.next_power_of_2(x.queries.shape[1]))
    is_half = x.queries.dtype != torch.float32
    # Products of float32 as torch's own are.
    is_exact = torch.backends.cuda.matmul.fp32_precision != "tf32" or knobs.runtime.interpret
    is_large = width > 128 or (is_exact and not is_half)
    block, step, warps, stages = forms["large" if is_large else "half" if is_half else "tf32"]
    return (
        block,
        step,
        {
            "W": width,
            "PRECISION": "tf32x3" if is_exact and not is_half else "tf32",
            "num_warps": warps,
            "num_stages": stages,
        },
    )

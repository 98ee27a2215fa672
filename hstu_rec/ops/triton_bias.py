"""The learned bias within a kernel of `hstu_rec.ops.triton`: its values for a tile of pairs, and gradients.

Values by distance are looked up one by one. Times are in order, so that most tiles far from the diagonal hold
three time buckets at most: there a pair's bucket is found by two comparisons, and gradients are summed before
anything is added to memory. Elsewhere a pair's bucket is computed.

What is added to memory is spread over LANES rows, which the host adds up: additions to one address wait for
each other.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import math
import struct
from typing import Any

import triton
import triton.language as tl

from hstu_rec.ops.reference import TIME_BUCKET_WIDTH

# Entries of a table by distance that come before distance 0; the largest block.
NUM_BEFORE = tl.constexpr(128)
# Buckets of a table by time, the last of them repeated: more than any two int64 times are apart.
NUM_BUCKETS = tl.constexpr(160)
HISTOGRAM = tl.constexpr(256)
# Rows that a program's gradients of its tables are spread over.
POSITION_LANES = tl.constexpr(8)
TIME_LANES = tl.constexpr(32)
# Pairs of a thread that are added up while they are of one bucket.
RUN = tl.constexpr(16)
BUCKETS_PER_OCTAVE = tl.constexpr(math.log(2) / TIME_BUCKET_WIDTH)
# Buckets are counted from the bits of 1.5 * 2**23: a float32 added to it leaves its integer in the lowest
# bits, which saves the conversion, on a GPU as slow as a logarithm.
BUCKET_0 = tl.constexpr(0x4B400000)
BUCKET_OF = tl.constexpr(
    "{ .reg .f32 x; abs.f32 x, $1; max.f32 x, x, 0f3F800000; lg2.approx.ftz.f32 x, x; fma.rz.f32 x, x, "
    f"0f{struct.pack('>f', BUCKETS_PER_OCTAVE.value).hex()}, 0f4B400000; mov.b32 $0, x; }}"
)
ADD = "red.relaxed.gpu.global.add"


def _run_asm(count: int) -> str:
    """Adds `count` values to entries of a table, those one after another for the same entry at once."""
    tables, entries, values = ([f"${count * k + n}" for n in range(count)] for k in (1, 2, 3))
    lines = ["{ .reg .pred p; .reg .f32 sum; .reg .b64 a;", f"mov.f32 sum, {values[0]};"]
    for n in range(1, count):
        lines += [
            f"setp.ne.s32 p, {entries[n]}, {entries[n - 1]};",
            f"mad.wide.s32 a, {entries[n - 1]}, 4, {tables[n]};",
            f"@p {ADD}.f32 [a], sum;",
            "selp.f32 sum, 0f00000000, sum, p;",
            f"add.f32 sum, sum, {values[n]};",
        ]
    lines += [f"mad.wide.s32 a, {entries[-1]}, 4, {tables[0]};", f"{ADD}.f32 [a], sum;"]
    return " ".join([*lines, *(f"mov.b32 ${n}, 0;" for n in range(count)), "}"])


def _operands(count: int) -> str:
    """Of PAIR_ASM and `_run_asm`: what they return, tables, entries and values of `count` pairs."""
    return ",".join(kind for kind in ("=r", "l", "r", "f") for _ in range(count))


ADD_ASM = tl.constexpr(f"{ADD}.f32 [$1], $2; mov.b32 $0, 0;")
PAIR_OPERANDS = tl.constexpr(_operands(2))
PAIR_ASM = tl.constexpr(
    "{ .reg .b64 a; mad.wide.s32 a, $4, 4, $2; "
    f"{ADD}.v2.f32 [a], {{$6, $7}}; mov.b32 $0, 0; mov.b32 $1, 0; }}"
)
RUN_ASM, RUN_OPERANDS = tl.constexpr(_run_asm(RUN.value)), tl.constexpr(_operands(RUN.value))


@triton.jit
def look_up(table: "Any", index: "Any", NATIVE: tl.constexpr) -> "Any":
    """float32 entries of `table`. As an elementwise instruction it is done where `index` is: tl.load would
    bring tiles of any form to one of its own through shared memory, and back."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [(table + index).to(tl.int64)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.load(table + index)


@triton.jit
def position_bias(
    x: "Any", head: "Any", distance: "Any", IS_LOOKED_UP: tl.constexpr, NATIVE: tl.constexpr
) -> "Any":
    """float32 bias of distances, so low that it hides what is not seen; 0 unless IS_LOOKED_UP."""
    bias = tl.zeros(distance.shape, dtype=tl.float32)
    if IS_LOOKED_UP:
        row = x.by_distance + head * x.table_strides[0] + NUM_BEFORE
        bias = look_up(row, distance, NATIVE)
    return bias


@triton.jit
def add_position_grads(
    x: "Any",
    row: "Any",
    grads: "Any",
    distance: "Any",
    lanes: "Any",
    stride: "Any",
    ONCE: tl.constexpr,
) -> None:
    """Adds a tile's gradients to POSITION_LANES rows, `stride` apart; `lanes` are the keys', int32 [N, 1].

    ONCE: no pair is held by two threads, each of which would add it. The stride is 1 more than a multiple of
    8, so that the eight keys of a tensor core's result meet whole sectors of memory, and its queries, which
    a thread holds by twos, even entries: they are added by twos where no candidate stands apart.
    """
    entries = distance + NUM_BEFORE + lanes % POSITION_LANES * stride
    if ONCE and x.num_seen is None:
        tl.inline_asm_elementwise(
            PAIR_ASM, PAIR_OPERANDS,
            [row.to(tl.int64) + tl.zeros(grads.shape, tl.int64), entries, grads],
            dtype=tl.int32, is_pure=False, pack=2,
        )  # fmt: skip
    elif ONCE:
        tl.inline_asm_elementwise(
            ADD_ASM, "=r,l,f", [(row + entries).to(tl.int64), grads], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.atomic_add(row + entries, grads, sem="relaxed")


@triton.jit
def load_times(times: "Any", place: "Any", events: "Any") -> "Any":
    """[N] s since the user's first event; beyond its length those of others, or 0."""
    return tl.load(times + place[1] + events)


@triton.jit
def time_buckets(seconds: "Any", NATIVE: tl.constexpr) -> "Any":
    """int32 time buckets of float32 differences: BUCKET_0 + floor(log(max(1, |dt|)) / width)."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            BUCKET_OF, "=r,f", [seconds], dtype=tl.int32, is_pure=True, pack=1
        )
    octaves = tl.log2(tl.maximum(tl.abs(seconds), 1.0))
    return (octaves * BUCKETS_PER_OCTAVE).to(tl.int32) + BUCKET_0


@triton.jit
def time_ends(times: "Any", place: "Any", begin: "Any", N: tl.constexpr) -> "Any":
    """(first, last) of the times of a user's N events from `begin` on."""
    _head, first, length = place
    last = tl.minimum(begin + N, length) - 1
    return tl.load(times + first + tl.minimum(begin, length - 1)), tl.load(times + first + last)


@triton.jit
def no_buckets(x: "Any") -> "Any":
    """`three_buckets` that hold no difference."""
    nothing, bias = tl.load(x.edges), tl.load(x.by_bucket)
    return nothing.to(tl.int32), nothing + 1, nothing, nothing, nothing, bias, bias, bias


@triton.jit
def three_buckets(x: "Any", head: "Any", least: "Any", NATIVE: tl.constexpr) -> "Any":
    """(bucket of `least` > 0, its least difference and those of the three that follow, bias of the three)."""
    low = time_buckets(least.to(tl.float32), NATIVE) - BUCKET_0
    # The edges are exact, the bucket to float32's rounding.
    low -= (least < tl.load(x.edges + low)).to(tl.int32)
    low += (least >= tl.load(x.edges + low + 1)).to(tl.int32)
    edges, table = x.edges + low, x.by_bucket + head * x.table_strides[1] + low
    return (
        low, tl.load(edges), tl.load(edges + 1), tl.load(edges + 2), tl.load(edges + 3),
        tl.load(table), tl.load(table + 1), tl.load(table + 2),
    )  # fmt: skip


@triton.jit
def tile_buckets(
    x: "Any", head: "Any", buckets: "Any", now: "Any", then: "Any", NATIVE: tl.constexpr
) -> "Any":
    """(whether three buckets hold a tile, its largest difference, `three_buckets` from then on), from the
    `time_ends` of its queries and keys; `buckets` are those of the tile before, most often the same."""
    least, most = now[0] - then[1], now[1] - then[0]
    # Three buckets are e**0.903 wide together.
    is_far = (most.to(tl.float32) < 2.47 * least.to(tl.float32)) & (least > 0) & (x.is_sorted != 0)
    if is_far & ((least < buckets[1]) | (least >= buckets[2])):
        buckets = three_buckets(x, head, least, NATIVE)
    return is_far & (most < buckets[4]), most, buckets


@triton.jit
def add_time_bias(
    x: "Any", head: "Any", bias: "Any", now: "Any", then: "Any", is_far: "Any", buckets: "Any",
    CAN_BE_FAR: tl.constexpr, NATIVE: tl.constexpr,
) -> "Any":  # fmt: skip
    """`bias` and that of time; `now` and `then` are of the tile's form but for a dimension of 1."""
    if CAN_BE_FAR:
        if is_far:
            first = tl.where(now - buckets[2] >= then, buckets[6], buckets[5])
            bias += tl.where(now - buckets[3] >= then, buckets[7], first)
        else:
            bias += _near_bias(x, head, now, then, NATIVE)
    else:
        bias += _near_bias(x, head, now, then, NATIVE)
    return bias


@triton.jit
def bucket_bias(x: "Any", head: "Any", buckets: "Any", NATIVE: tl.constexpr) -> "Any":
    """float32 bias of `time_buckets`."""
    return look_up(x.by_bucket + head * x.table_strides[1] - BUCKET_0, buckets, NATIVE)


@triton.jit
def _near_bias(x, head, now, then, NATIVE: tl.constexpr):
    return bucket_bias(x, head, time_buckets((now - then).to(tl.float32), NATIVE), NATIVE)


@triton.jit
def _thread_sums(tile, N: tl.constexpr, M: tl.constexpr):
    """[N, 4] sums of a tile [N, M] over what a thread holds of a row of a product's result."""
    tile = tl.reshape(tile, [N, M // 8, 4, 2])
    return tl.sum(tl.sum(tile, 3), 1)


@triton.jit
def no_sums(N: tl.constexpr) -> "Any":
    """The gradients of `three_buckets`, [N, 4] each, before any tile."""
    none = tl.zeros([N, 4], dtype=tl.float32)
    return none, none, none


@triton.jit
def add_time_grads(
    row: "Any", sums: "Any", grads: "Any", now: "Any", then: "Any", is_far: "Any", most: "Any",
    buckets: "Any", N: tl.constexpr, M: tl.constexpr,
    CAN_BE_FAR: tl.constexpr, ONCE: tl.constexpr, NATIVE: tl.constexpr,
) -> "Any":  # fmt: skip
    """`sums` and a far tile's gradients [N, M], keys by queries, whose largest difference is `most`; a near
    tile's are added to TIME_LANES rows of HISTOGRAM entries."""
    first, second, third = sums
    if CAN_BE_FAR:
        if is_far:
            first += _thread_sums(grads, N, M)
            if most >= buckets[2]:
                later = _thread_sums(tl.where(now - buckets[2] >= then, grads, 0.0), N, M)
                first -= later
                second += later
            if most >= buckets[3]:
                last = _thread_sums(tl.where(now - buckets[3] >= then, grads, 0.0), N, M)
                second -= last
                third += last
        else:
            _add_near_grads(row, grads, now, then, N, M, ONCE, NATIVE)
    else:
        _add_near_grads(row, grads, now, then, N, M, ONCE, NATIVE)
    return first, second, third


@triton.jit
def add_sums(
    row: "Any", sums: "Any", buckets: "Any", N: tl.constexpr, IS_NONE: tl.constexpr
) -> None:
    """Adds the gradients of `three_buckets` to TIME_LANES rows of HISTOGRAM entries, unless IS_NONE."""
    if IS_NONE:
        return
    at = row + tl.arange(0, N // 16) % TIME_LANES * HISTOGRAM + buckets[0]
    for place in tl.static_range(3):
        total = tl.sum(tl.reshape(tl.sum(sums[place], 1), [N // 16, 16]), 1)
        tl.atomic_add(at + place, total, sem="relaxed")


@triton.jit
def _add_near_grads(
    row, grads, now, then, N: tl.constexpr, M: tl.constexpr, ONCE: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    buckets = time_buckets((now - then).to(tl.float32), NATIVE) - BUCKET_0
    # A tensor core's result has the keys of a tile mod 8 and its queries / 2 mod 4 in the threads of a warp.
    lanes = (tl.arange(0, N) % 8 * 4)[:, None] + (tl.arange(0, M) // 2 % 4)[None, :]
    entries = lanes * HISTOGRAM + buckets
    if ONCE:
        tl.inline_asm_elementwise(
            RUN_ASM, RUN_OPERANDS,
            [row.to(tl.int64) + tl.zeros(grads.shape, tl.int64), entries, grads],
            dtype=tl.int32, is_pure=False, pack=RUN,
        )  # fmt: skip
    else:
        tl.atomic_add(row + entries, grads, sem="relaxed")

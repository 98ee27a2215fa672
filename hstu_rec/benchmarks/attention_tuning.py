"""Times the fused kernel's compile options by shape, to choose those that `hstu_rec.ops.triton` ships."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hstu_rec.benchmarks.attention import AttentionTimes
from hstu_rec.benchmarks.attention_forms import Shape
from hstu_rec.benchmarks.timing import median_s
from hstu_rec.ops import NUM_TIME_BUCKETS
from hstu_rec.ops.triton_layout import block_layout

# (events owned, events met at a time, warps, stages) of each kernel; others spill registers, or do the same
# work twice (eight warps on a block of 64), as the compiler shows without a GPU.
FORWARD = [
    *(
        (128, step, 8, stages)
        for step, stages in ((32, 3), (32, 4), (64, 2), (64, 3), (64, 4), (128, 2))
    ),
    *((64, step, 4, stages) for step, stages in ((32, 3), (64, 2), (64, 3))),
]
BACKWARD = [
    *((128, step, 8, stages) for step in (32, 64) for stages in (2, 3, 4)),
    *((64, step, 4, stages) for step in (32, 64) for stages in (2, 3)),
]
NUM_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class OptionTimes:
    """What is timed."""

    shapes: list[str] = field(
        default_factory=lambda: ["4x128-uniform-256", "4x128-uniform-1024", "8x64-uniform-1024"]
    )
    """Shapes as those of attention."""
    num_events: int = 131_072
    """Events of a batch, about."""
    repeats: int = 20
    """Times that each is run, after three to warm up; the median is shown."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        known = AttentionTimes(shapes=self.shapes, num_events=self.num_events, repeats=self.repeats)
        return known.problems()


def option_times(config: OptionTimes, device: torch.device) -> Iterator[str]:
    """Lines, one for a shape, kernel and bias: ms of the quickest options. Raises ValueError without CUDA."""
    if device.type != "cuda":
        raise ValueError("compile options are timed on CUDA, and torch sees no CUDA device here")
    from hstu_rec.ops import triton_options as options_of  # where no GPU is, triton need not be

    for text, has_bias in itertools.product(config.shapes, (False, True)):
        shape = Shape.of(text)
        lengths = torch.from_numpy(shape.lengths(config.num_events))
        is_wide = shape.width > options_of.MAX_WHOLE_WIDTH
        for name in ("forward", *(("keys", "values", "queries") if is_wide else ("all",))):
            found = []
            for block, step, warps, stages in FORWARD if name == "forward" else BACKWARD:
                run, usual = _kernel(shape, lengths, block, name, has_bias, device)
                if name != "forward" and stages != 2 and not usual["TMA"]:
                    continue  # they read out of range: see backward_options
                own: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
                if name in ("forward", "queries"):
                    own |= {"M": block, "N": step}
                else:
                    is_once = options_of.adds_once(torch.bfloat16, block, step, warps)
                    own |= {"M": step, "N": block, "ONCE": is_once}
                seconds = _seconds(lambda run=run, o={**usual, **own}: run(o), config.repeats)
                found.append((seconds, (block, step, warps, stages)))
            best = sorted(found)[:NUM_SHOWN]
            shown = "  ".join(f"{s * 1e3:.3f} {o}" for s, o in best)
            yield f"{text:20s} {'bias' if has_bias else 'none'} {name:8s} {shown}"


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds, infinite for options that the device cannot hold."""
    try:
        return median_s(work, repeats, torch.device("cuda"))
    except Exception as error:  # Triton has a class of its own for each resource
        if "out of resource" not in str(error):
            raise
        return float("inf")


def _kernel(
    shape: Shape, lengths: Tensor, block: int, name: str, has_bias: bool, device: torch.device
) -> tuple[Callable[[dict[str, Any]], object], dict[str, Any]]:
    """(starts the kernel with options, the options that are shipped)."""
    from hstu_rec.ops import triton as fused
    from hstu_rec.ops import triton_options as options_of

    torch.manual_seed(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    times = torch.cat([torch.randint(0, 10**8, (n,)).sort().values for n in lengths.tolist()])
    layout = block_layout(offsets, times, None, torch.bfloat16, block).to(device)
    size = (total, shape.num_heads, shape.width)
    q, k, v, grad = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(4))
    tables = [torch.randn(1, n, device=device) for n in (shape.longest, NUM_TIME_BUCKETS)]
    by_distance = fused.distance_table(tables[0] if has_bias else None, layout, 1.0)
    by_bucket = fused.bucket_table(tables[1], 1.0) if has_bias else None
    has_queries = name in ("forward", "queries")
    x = fused.inputs(
        q,
        k,
        v,
        by_distance,
        by_bucket,
        layout.now,
        layout.then,
        logsumexp=None,
        delta=None,
        offsets=layout.offsets,
        num_seen=None,
        window=0,
        is_sorted=int(layout.is_sorted),
        users=layout.query_users if has_queries else layout.key_users,
        begins=layout.query_begins if has_queries else layout.key_begins,
        scale=1 / shape.longest,
    )
    grid, known = (len(layout.query_users) * shape.num_heads,), (block, has_bias)
    rows, out = [q, k, v, grad], torch.empty_like(q)
    if has_queries:
        is_forward = name == "forward"
        rows = rows[:3] if is_forward else rows
        kernel = fused.forward if is_forward else fused.query_grads
        usual_of = options_of.forward_options if is_forward else options_of.query_options

        def run_by_queries(options: dict[str, Any]) -> None:
            arguments: Any = (*options_of.forward_rows(rows, options), out)
            kernel[grid](x, *arguments, **options)

        return run_by_queries, usual_of(x, rows, *known)
    sums, num_rows = fused.table_sums(x, has_bias)
    grad_q = torch.zeros(size, device=device)
    ends: Any = (torch.empty_like(k), out, *sums, sums[0].shape[-1], num_rows)

    def run_by_keys(options: dict[str, Any]) -> None:
        fused.backward[grid](x, *options_of.backward_rows(rows, grad_q, options), *ends, **options)

    return run_by_keys, options_of.backward_options(x, rows, *known, part=name)

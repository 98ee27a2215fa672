"""Times of jagged attention alone, by shape: fused without and with the learned bias, and plain torch.

FLOPs are those of the pairs that are seen: forward 2 d H sum(L^2), backward 2.5 times that.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hstu_rec.ops import NUM_TIME_BUCKETS, AttentionKernel, jagged_attention, jagged_layout

# The longest history for which plain torch is timed: its scores fill the memory beyond.
MAX_PLAIN_LENGTH = 1024
BACKWARD_FLOPS = 2.5
# Some milliseconds of the device, which outlast the launches of what is timed.
SLEEP_CYCLES = 4_000_000


@dataclass(frozen=True, kw_only=True)
class AttentionTimes:
    """What is timed."""

    shapes: list[str] = field(
        default_factory=lambda: [
            "4x128-uniform-256",
            "4x128-uniform-1024",
            "4x128-uniform-4096",
            "4x128-uniform-8192",
            "4x128-power-1024",
            "4x128-power-8192",
            "8x64-uniform-1024",
            "8x64-uniform-4096",
            "4x64-full-1024",
            "2x32-full-200",
        ]
    )
    """Heads x width - lengths - longest: lengths from N/2 to N (uniform), with a Pareto tail (power), or all
    N (full)."""
    num_events: int = 0
    """Events of a batch, about; 0 takes 131072 on CUDA and 4096 on CPU."""
    repeats: int = 20
    """Times that each is run, after three to warm up; the median is shown."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = [
            f"{name} must be at least {least}; got {getattr(self, name)}"
            for name, least in (("num_events", 0), ("repeats", 1))
            if getattr(self, name) < least
        ]
        for shape in self.shapes:
            try:
                Shape.of(shape)
            except ValueError:
                found.append(f"shapes must be like 4x128-uniform-1024; got '{shape}'")
        return found


@dataclass(frozen=True)
class Shape:
    """One line of the table."""

    num_heads: int
    width: int
    kind: str
    longest: int

    @classmethod
    def of(cls, text: str) -> "Shape":
        """Raises ValueError for a text of another form."""
        heads_and_width, kind, longest = text.split("-")
        num_heads, width = heads_and_width.split("x")
        shape = cls(int(num_heads), int(width), kind, int(longest))
        if kind not in ("uniform", "power", "full") or min(shape.num_heads, shape.width) < 1:
            raise ValueError(text)
        return shape

    def lengths(self, num_events: int) -> np.ndarray:
        """int64: lengths of users with `num_events` together, about, one user at least."""
        random = np.random.default_rng(0)
        drawn = {
            "uniform": lambda: random.integers(self.longest // 2, self.longest + 1, num_events),
            "power": lambda: (self.longest / 32 * (1 + random.pareto(1, num_events))).astype(int),
            "full": lambda: np.full(num_events, self.longest),
        }[self.kind]()
        lengths = np.clip(drawn, 1, self.longest)
        return lengths[: max(1, int(np.searchsorted(lengths.cumsum(), num_events)))]


class Form(NamedTuple):
    """How attention is computed."""

    kernel: AttentionKernel
    has_bias: bool
    dtype: torch.dtype
    device: torch.device


def attention_times(config: AttentionTimes, device: torch.device) -> Iterator[str]:
    """Lines of a table, bfloat16, forward / forward and backward in ms."""
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    yield f"{dtype}; ms forward / forward + backward (TFLOP/s)"
    for text in config.shapes:
        shape = Shape.of(text)
        lengths = shape.lengths(config.num_events or (131_072 if is_cuda else 4096))
        forms = [Form("triton", bias, dtype, device) for bias in (False, True) if is_cuda]
        if shape.longest <= MAX_PLAIN_LENGTH or not is_cuda:
            forms.append(Form("grouped", True, dtype, device))
        cells = [_cell(shape, lengths, form, config.repeats) for form in forms]
        yield f"{text:20s} {len(lengths):5d} users {lengths.sum():7d} events  {'  '.join(cells)}"


def _cell(shape: Shape, lengths: np.ndarray, form: Form, repeats: int) -> str:
    """Figures of one form of attention on one shape."""
    forward, inputs = _attention(shape, lengths, form)
    grad = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), inputs, grad)

    flops = 2 * shape.width * shape.num_heads * float((lengths.astype(float) ** 2).sum())
    times = [_median_s(work, repeats, form.device) for work in (forward, both)]
    rates = [flops / times[0] / 1e12, flops * (1 + BACKWARD_FLOPS) / times[1] / 1e12]
    what = f"{form.kernel} {'with' if form.has_bias else 'no'} bias"
    return f"{what} {times[0] * 1e3:.2f} / {times[1] * 1e3:.2f} ({rates[0]:.3g} / {rates[1]:.3g})"


def _attention(
    shape: Shape, lengths: np.ndarray, form: Form
) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
    """(the attention of a random batch, the tensors it has gradients of)."""
    kernel, has_bias, dtype, device = form
    torch.manual_seed(0)
    offsets = torch.from_numpy(np.append(0, lengths.cumsum()))
    total = int(offsets[-1])
    times = torch.randint(0, 10**8, (total,)).sort().values if has_bias else None
    layout = jagged_layout(offsets, shape.num_heads, times, None, kernel, dtype).to(device)
    size = (total, shape.num_heads, shape.width)
    rows = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    widths = (shape.longest, NUM_TIME_BUCKETS) if has_bias else ()
    # Plain torch adds the bias in the dtype of the scores.
    of_tables = dtype if kernel == "grouped" else torch.float32
    tables = [torch.randn(1, n, device=device, dtype=of_tables, requires_grad=True) for n in widths]
    names = dict(zip(("position_bias", "time_bias"), tables, strict=False))
    offsets = offsets.to(device)

    def attend() -> Tensor:
        scale = 1 / shape.longest
        return jagged_attention(
            rows[0], rows[1], rows[2], offsets, scale=scale, layout=layout, **names
        )

    return attend, [*rows, *tables]


def _median_s(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median seconds of `work` on the device."""
    times = []
    for turn in range(3 + repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host is ahead by the time that the device begins: its own time is no part of the figure.
            torch.cuda._sleep(SLEEP_CYCLES)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            spent = begin.elapsed_time(end) / 1e3
        else:
            began_at = time.perf_counter()
            work()
            spent = time.perf_counter() - began_at
        if turn >= 3:
            times.append(spent)
    return statistics.median(times)

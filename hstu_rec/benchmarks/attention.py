"""Times of attention alone, by shape and form: jagged without and with the learned bias, padded, and others'.

FLOPs are those of the pairs that are seen: forward 2 d H sum(L^2), backward 2.5 times that.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from hstu_rec.benchmarks.attention_forms import FORMS, Attention, Batch, Shape, Unavailable
from hstu_rec.benchmarks.timing import median_s, peak_gib
from hstu_rec.settings import at_least

BACKWARD_FLOPS = 2.5


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
    forms: list[str] = field(default_factory=lambda: list(FORMS))
    """Forms of attention; the first is what the others are compared with."""
    num_events: int = 0
    """Events of a batch, about; 0 takes 131072 on CUDA and 4096 on CPU."""
    repeats: int = 20
    """Times that each is run, after three to warm up; the median is shown."""
    peer: str = ""
    """Folder of a checkout of Meta's generative-recommenders, for the form 'peer'."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 0, "num_events") + at_least(self, 1, "repeats")
        if others := [name for name in self.forms if name not in FORMS]:
            found.append(f"forms must be of {', '.join(FORMS)}; got {others}")
        for name in ("shapes", "forms"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                found.append(f"{name} must be distinct, one at least; got {list(values)}")
        if self.peer and "peer" not in self.forms:
            found.append("peer has no effect without the form 'peer'; add it to forms")
        for shape in self.shapes:
            try:
                Shape.of(shape)
            except ValueError:
                found.append(
                    f"shapes must be like 4x128-uniform-1024 (or -power-, -full-); got '{shape}'"
                )
        return found


class Cost(NamedTuple):
    """What a form of attention takes."""

    forward_s: float
    both_s: float  # forward and backward
    gib: float  # of the device, beyond the inputs

    def shown(self, batch: Batch) -> str:
        """ms, TFLOP/s and GiB."""
        pairs = float((batch.lengths.double() ** 2).sum())
        flops = 2 * batch.shape.width * batch.shape.num_heads * pairs
        rates = flops / self.forward_s / 1e12, flops * (1 + BACKWARD_FLOPS) / self.both_s / 1e12
        times = f"{self.forward_s * 1e3:8.2f} / {self.both_s * 1e3:8.2f} ms"
        memory = "" if math.isnan(self.gib) else f"  {self.gib:6.2f} GiB"
        return f"{times}  {rates[0]:6.4g} / {rates[1]:6.4g} TFLOP/s{memory}"


def attention_times(config: AttentionTimes, device: torch.device) -> Iterator[str]:
    """Lines of a table, the forms of a shape one after another: forward / forward and backward."""
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    yield f"{dtype}; forward / forward + backward; memory beyond the inputs; times the first form"
    for text in config.shapes:
        shape = Shape.of(text)
        lengths = torch.from_numpy(
            shape.lengths(config.num_events or (131_072 if is_cuda else 4096))
        )
        batch = Batch(shape, lengths, dtype, device, config.peer)
        yield f"{text}: {len(lengths)} users, {int(lengths.sum())} events"
        first = math.nan
        for name in config.forms:
            try:
                cost = _cost(partial(FORMS[name], batch), config.repeats, device)
            except (torch.OutOfMemoryError, Unavailable) as error:
                reason = str(error) if isinstance(error, Unavailable) else "out of memory"
                yield f"  {name:15s} none: {reason}"
                continue
            first = cost.both_s if math.isnan(first) else first
            yield f"  {name:15s} {cost.shown(batch)}  x {cost.both_s / first:.2f}"


def _cost(make: Callable[[], Attention], repeats: int, device: torch.device) -> Cost:
    """What the attention that `make` gives takes."""
    torch.manual_seed(0)
    forward, inputs = make()
    grad = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), inputs, grad)

    gib = peak_gib(both, device)
    return Cost(median_s(forward, repeats, device), median_s(both, repeats, device), gib)

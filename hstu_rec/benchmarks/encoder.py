"""Times of the encoder's training step without item table and loss: this package's attention beside the
same layers on padded histories with the bias held, as published code has it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hstu_rec import distributed
from hstu_rec.benchmarks.attention_forms import PaddedLayout, Shape
from hstu_rec.benchmarks.timing import median_s, peak_gib
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.flops import encoder_flops, peak_flops
from hstu_rec.settings import at_least, within

FORMS = ("jagged", "jagged+bias", "padded+bias")


@dataclass(frozen=True, kw_only=True)
class EncoderTimes:
    """What is timed."""

    shapes: list[str] = field(default_factory=lambda: ["2x32-full-200", "4x256-uniform-4096"])
    """Heads x width - lengths - longest, as those of attention; the model is as wide as all its heads."""
    num_layers: list[int] = field(default_factory=lambda: [2, 8])
    """Layers of the model of each shape."""
    forms: list[str] = field(default_factory=lambda: list(FORMS))
    """Forms of the encoder; the first is what the others are compared with."""
    num_events: list[int] = field(default_factory=lambda: [25600, 65536])
    """Events of a batch of each shape, about."""
    precision: Literal["float32", "tf32", "bfloat16"] = "bfloat16"
    """Of products, as train.precision."""
    dropout: float = 0.2
    """Dropout of the layers."""
    compile: bool = False
    """Compiles the layers, as train.compile."""
    recompute: bool = False
    """Keeps the layers' inputs alone, as train.recompute."""
    repeats: int = 20
    """Times that each is run, after three to warm up; the median is shown."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "repeats") + within(self, "[0, 1)", "dropout")
        for name in ("num_layers", "num_events"):
            values = getattr(self, name)
            if len(values) != len(self.shapes) or min(values, default=1) < 1:
                found.append(f"{name} must be above 0, one for each of shapes; got {list(values)}")
        if not self.forms or not set(self.forms) <= set(FORMS):
            found.append(f"forms must be of {', '.join(FORMS)}; got {list(self.forms)}")
        for shape in self.shapes:
            try:
                Shape.of(shape)
            except ValueError:
                found.append(f"shapes must be like 4x128-uniform-1024; got '{shape}'")
        return found


def encoder_times(config: EncoderTimes, device: torch.device) -> Iterator[str]:
    """Lines of a table, the forms of a shape one after another: forward and backward of the encoder."""
    distributed.use_precision(config.precision)
    dtype = distributed.product_dtype(config.precision)
    peak = peak_flops(device, dtype) if device.type == "cuda" else math.nan
    reached = "" if math.isnan(peak) else f"; a product of 8192 squares: {peak / 1e12:.0f} TFLOP/s"
    yield (
        f"{config.precision}{', compiled' * config.compile}; forward + backward with parameters' gradients; "
        f"FLOPs without padding, of the pairs that are seen{reached}"
    )
    each = zip(config.shapes, config.num_layers, config.num_events, strict=True)
    for text, num_layers, num_events in each:
        lengths, first = torch.from_numpy(Shape.of(text).lengths(num_events)), math.nan
        yield f"{text}, {num_layers} layers: {len(lengths)} users, {int(lengths.sum())} events"
        for name in config.forms:
            encoder = encoder_of(Shape.of(text), num_layers, name, config.dropout)
            flops = float(encoder_flops(encoder, lengths.numpy()).sum())
            try:
                modes = config.compile, config.recompute
                work = training_work(encoder, lengths, name, dtype, device, *modes)
                gib, seconds = peak_gib(work, device), median_s(work, config.repeats, device)
            except torch.OutOfMemoryError:
                yield f"  {name:12s} out of memory"
                continue
            first = seconds if math.isnan(first) else first
            memory = "" if math.isnan(gib) else f"  {gib:6.2f} GiB"
            share = "" if math.isnan(peak) else f" ({flops / seconds / peak:.1%})"
            speed = f"{flops / seconds / 1e12:7.4g} TFLOP/s{share}"
            yield f"  {name:12s} {seconds * 1e3:9.2f} ms  {speed}{memory}  x {seconds / first:.2f}"


def encoder_of(shape: Shape, num_layers: int, form: str, dropout: float) -> EncoderConfig:
    """As wide as its heads together."""
    has_bias = form != "jagged"
    return EncoderConfig(
        dim=shape.num_heads * shape.width,
        num_heads=shape.num_heads,
        num_layers=num_layers,
        max_history_len=shape.longest,
        dropout=dropout,
        use_position_bias=has_bias,
        use_time_bias=has_bias,
    )


def training_work(
    config: EncoderConfig,
    lengths: Tensor,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    is_compiled: bool = False,
    recomputes: bool = False,
) -> Callable[[], Tensor]:
    """Forward and backward of a batch of random histories; returns what the encoder gave."""
    torch.manual_seed(0)
    longest = config.max_history_len
    if form == "padded+bias":
        lengths = torch.full_like(lengths, longest)
    times = torch.cat([torch.randint(0, 10**8, (n,)).sort().values for n in lengths.tolist()])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    encoder = HSTUEncoder(config).to(device)
    encoder.recomputes = recomputes
    if is_compiled:
        encoder.compile_layers()
    layout: Any = PaddedLayout(longest, times.view(-1, longest) if form == "padded+bias" else times)
    if form != "padded+bias":
        layout = encoder.layout(offsets, times, dtype=dtype)
    layout, offsets = layout.to(device), offsets.to(device)
    x = torch.randn(len(times), config.dim, device=device, requires_grad=True)
    grad = torch.randn_like(x)

    def work() -> Tensor:
        encoder.zero_grad()
        x.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = encoder(x, offsets, layout=layout)
        out.float().backward(grad)
        return out

    return work

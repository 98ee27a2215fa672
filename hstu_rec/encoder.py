"""HSTUEncoder: layers over jagged histories [T, D]; plain nn.Module, no TorchRec, no distributed.

With `attention="softmax"`, `use_gate=False` and an FFN the same encoder is SASRec.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hstu_rec.distributed import is_hopper
from hstu_rec.encoder_config import EncoderConfig, NormKind, chosen_kernel
from hstu_rec.ops import (
    NUM_TIME_BUCKETS,
    AttentionKernel,
    AttentionKind,
    JaggedLayout,
    jagged_attention,
    jagged_layout,
)

# Seconds of a calendar bucket; a month is a twelfth of 365.25 days.
CALENDAR_S = {"day": 86_400, "week": 604_800, "month": 2_629_800}


def make_norm(kind: NormKind, dim: int) -> nn.Module:
    """The norm of that name over the last dimension."""
    if kind == "none":
        return nn.Identity()
    return nn.LayerNorm(dim) if kind == "layer" else nn.RMSNorm(dim, eps=1e-6)


class Dropout(nn.Dropout):
    """nn.Dropout; on CPU with four draws of 16 bits from each 64 of the generator.

    torch's own CPU mask takes one draw an element: a tenth of a small model's step.
    The probability is exact to 2**-16.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.int16)[: input.numel()].view(input.shape)
        threshold = round(self.p * 2**16) - 2**15
        return input * (keep >= threshold).to(input.dtype).mul_(1 / (1 - self.p))


class Calendar(nn.Module):
    """A learned embedding of the bucket of a time: what is bought changes with years and seasons.

    Raises ValueError without a range of times.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.begin, self.bucket_s = config.calendar_begin, CALENDAR_S[config.calendar]
        num_seconds = config.calendar_end - config.calendar_begin
        if config.calendar_begin == config.calendar_end == 0:
            raise ValueError(
                f"calendar '{config.calendar}' needs calendar_begin and calendar_end, the times (s since "
                f"1970) of the first and last training event; got {config.calendar_begin} and "
                f"{config.calendar_end}"
            )
        num_buckets = num_seconds // self.bucket_s + 1
        self.embedding = nn.Parameter(torch.randn(num_buckets, config.dim) * 0.02)

    def forward(self, timestamps: Tensor) -> Tensor:
        """[T, D] of int64 timestamps [T] in s. A time outside the range counts as the nearest inside."""
        bucket = torch.div(timestamps - self.begin, self.bucket_s, rounding_mode="floor")
        return self.embedding.index_select(0, bucket.clamp(0, len(self.embedding) - 1))


class HSTULayer(nn.Module):
    """One layer, jagged in and out (arXiv 2402.17152, section 3.2, equations 1 to 3):

    U, V, Q, K = silu(norm(x) W);  A = silu(Q Kᵀ + bias) / n
    x + W_o dropout(norm(A V) * U)
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        heads = config.num_heads
        self.num_heads = heads
        self.attention_dim = config.attention_dim or config.dim // heads
        self.value_dim = config.value_dim or config.dim // heads
        self.kind: AttentionKind = config.attention
        self.use_gate = config.use_gate
        is_silu = config.attention == "silu"
        self.scale = 1 / config.max_history_len if is_silu else 1 / math.sqrt(self.attention_dim)
        self.widths = [
            heads * self.value_dim,
            heads * self.attention_dim,
            heads * self.attention_dim,
        ]
        if self.use_gate:
            self.widths.append(heads * self.value_dim)
        self.input_norm = make_norm(config.norm, config.dim)
        self.project = nn.Linear(config.dim, sum(self.widths), bias=False)
        # Over all heads together, as published.
        self.attention_norm = make_norm(config.norm if self.use_gate else "none", self.widths[0])
        self.output = nn.Linear(self.widths[0], config.dim)
        self.dropout = Dropout(config.dropout)
        bias_rows = heads if config.is_bias_per_head else 1
        self.position_bias = (
            nn.Parameter(torch.empty(bias_rows, config.max_history_len))
            if config.use_position_bias
            else None
        )
        self.time_bias = (
            nn.Parameter(torch.empty(bias_rows, NUM_TIME_BUCKETS)) if config.use_time_bias else None
        )
        self.ffn = (
            nn.Sequential(
                make_norm(config.norm, config.dim),
                nn.Linear(config.dim, config.ffn_dim),
                nn.GELU(),
                Dropout(config.dropout),
                nn.Linear(config.ffn_dim, config.dim),
                Dropout(config.dropout),
            )
            if config.ffn_dim
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Published initialisation: projections and biases N(0, 0.02), output Xavier uniform."""
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        for table in (self.position_bias, self.time_bias):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def forward(self, x: Tensor, offsets: Tensor, layout: JaggedLayout) -> Tensor:
        """x [T, D] to [T, D]; see `HSTUEncoder.forward`."""
        v, q, k, *gate = self.before(x).split(self.widths, dim=-1)
        attended = jagged_attention(
            q.unflatten(-1, (self.num_heads, self.attention_dim)),
            k.unflatten(-1, (self.num_heads, self.attention_dim)),
            v.unflatten(-1, (self.num_heads, self.value_dim)),
            offsets,
            kind=self.kind,
            scale=self.scale,
            position_bias=self.position_bias,
            time_bias=self.time_bias,
            layout=layout,
        ).flatten(1)
        return self.after(x, attended, *gate)

    def before(self, x: Tensor) -> Tensor:
        """x [T, D] to v, q, k and u side by side [T, sum(widths)]."""
        projected = self.project(self.input_norm(x))
        return nn.functional.silu(projected) if self.use_gate else projected

    def after(self, x: Tensor, attended: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [T, D], and what attention [T, H V] and u [T, H V] add to it."""
        if gate is not None:
            x = x + self.output(self.dropout(self.attention_norm(attended) * gate))
        else:
            x = x + self.dropout(self.output(attended))
        return x if self.ffn is None else x + self.ffn(x)


def _check_events(offsets: Tensor, *times: Tensor | None) -> None:
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"offsets must be int64 [B + 1]; got {offsets.dtype} {[*offsets.shape]}")
    bounds = offsets.cpu()
    if bounds[0] != 0 or (bounds.diff() < 0).any():
        raise ValueError(
            "offsets must start at 0 and never fall, user b's rows being offsets[b] .. offsets[b + 1]; got "
            f"{bounds[:5].tolist()}..., perhaps lengths: give their sums, 0 first"
        )
    for name, given in zip(("timestamps", "next_timestamps"), times, strict=True):
        if given is not None and (given.dtype, given.shape) != (torch.int64, (int(bounds[-1]),)):
            raise ValueError(
                f"{name} must be int64 [{int(bounds[-1])}] in s, one an event; got {given.dtype} "
                f"{[*given.shape]}"
            )


class HSTUEncoder(nn.Module):
    """Layers over jagged histories. Raises ValueError with every problem of `config`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("EncoderConfig: " + "; ".join(problems))
        self.config = config
        # Whether a layer keeps its input alone and makes the rest again in backward.
        self.recomputes = False
        self.dropout = Dropout(config.dropout)
        self.position_embedding = (
            nn.Parameter(torch.randn(config.max_history_len, config.dim) * 0.02)
            if config.use_position_embedding
            else None
        )
        has_calendar = config.calendar != "none"
        self.calendar = Calendar(config) if has_calendar else None
        is_next = has_calendar and config.query_time == "next"
        self.next_calendar = Calendar(config) if is_next else None
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))
        self.final_norm = make_norm(config.final_norm, config.dim)

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """What the layers do around attention is compiled by torch.compile when it first runs, for any number
        of events: norm, gate and dropout then pass through memory once. It takes a minute; wide models gain,
        small ones wait for the host as before. `backend`: one of torch.compile's."""
        for layer in self.layers:
            assert isinstance(layer, HSTULayer)
            layer.before = torch.compile(layer.before, dynamic=True, backend=backend)
            layer.after = torch.compile(layer.after, dynamic=True, backend=backend)

    def attention_kernel(self, dtype: torch.dtype = torch.float32) -> AttentionKernel:
        """What config.attention_kernel is on the encoder's device, with products in `dtype`."""
        device = next(self.parameters()).device
        return chosen_kernel(self.config, is_hopper(device), dtype)

    def layout(
        self,
        offsets: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        num_targets: Tensor | None = None,
    ) -> JaggedLayout:
        """How the layers cut a batch, from the arguments of `forward`: to make it ahead, on any device.

        `dtype`: of the layers' products, bfloat16 under autocast; the parameters' when None.

        Raises ValueError for a history longer than max_history_len, offsets and times that are no such
        tensors or are missing, and candidates as `jagged_layout` does.
        """
        _check_events(offsets, timestamps, next_timestamps)
        config, times = self.config, ()
        dtype = dtype or next(self.parameters()).dtype
        if config.use_time_bias:
            if timestamps is None:
                raise ValueError("use_time_bias needs timestamps (int64 [T], s)")
            if config.query_time == "next" and next_timestamps is None:
                raise ValueError("query_time='next' needs next_timestamps (int64 [T], s)")
            times = (timestamps, next_timestamps if config.query_time == "next" else None)
        layout = jagged_layout(
            offsets,
            config.num_heads,
            *times,
            kernel=self.attention_kernel(dtype),
            dtype=dtype,
            num_targets=num_targets,
            window=config.window,
        )
        self._check_lengths(offsets, num_targets)
        return layout

    def _check_lengths(self, offsets: Tensor, num_targets: Tensor | None) -> None:
        lengths = offsets.diff() if num_targets is None else offsets.diff() - num_targets
        longest = int(lengths.max()) if len(lengths) else 0
        if longest > self.config.max_history_len:
            raise ValueError(
                f"a history has {longest} events, more than max_history_len "
                f"{self.config.max_history_len}; keep the newest"
            )

    def _places(self, offsets: Tensor, size: int, num_targets: Tensor | None) -> Tensor:
        """int64 [size]: places of events in their histories, from the oldest on."""
        lengths = offsets.diff()
        first = torch.repeat_interleave(offsets[:-1], lengths, output_size=size)
        place = torch.arange(size, device=offsets.device) - first
        if num_targets is None:
            return place
        after = torch.repeat_interleave(lengths - num_targets, lengths, output_size=size)
        return torch.minimum(place, after).clamp(max=self.config.max_history_len - 1)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
        *,
        layout: JaggedLayout | None = None,
        num_targets: Tensor | None = None,
    ) -> Tensor:
        """One vector for every event, the query for the next one, and for every candidate: [T, D].

        A candidate's vector has seen the candidate itself: it is an input of a ranking model's heads, no
        query to score items by.

        Args:
            x: [T, D] item vectors, users one after another, oldest event first.
            offsets: int64 [B+1]; no history may be longer than `max_history_len`.
            timestamps: int64 [T] in s, needed with `use_time_bias` or a calendar; those of candidates are the
                time of the request.
            next_timestamps: int64 [T] in s, needed with `query_time="next"`: the time of the event to
                predict, which at serving is the time of the request, as it is for candidates.
            layout: `self.layout(...)` of the same arguments, num_targets among them, when it was made ahead.
            num_targets: int64 [B], how many of each user's newest rows are candidates: they see the history
                and themselves, not each other, and stand where the next event would (arXiv 2402.17152,
                section 3.4). They come beside max_history_len events; after so many, a position embedding
                gives them the last event's place. Grouped attention costs (events + candidates)^2 a user.

        Raises ValueError as `layout` does, and for num_targets beside a layout.
        """
        if layout is None:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            layout = self.layout(
                offsets, timestamps, next_timestamps, dtype=dtype, num_targets=num_targets
            )
            if x.shape != (int(offsets[-1]), self.config.dim):
                raise ValueError(
                    f"x must be [{int(offsets[-1])}, {self.config.dim}], the last of offsets by dim; got "
                    f"{[*x.shape]}"
                )
        elif num_targets is not None:
            raise ValueError("num_targets is part of a layout; give it to layout() alone")
        if self.position_embedding is not None:
            x = x + self.position_embedding[self._places(offsets, len(x), layout.num_targets)]
        for calendar, times, name in (
            (self.calendar, timestamps, "timestamps"),
            (self.next_calendar, next_timestamps, "next_timestamps"),
        ):
            if calendar is not None:
                if times is None:
                    raise ValueError(f"a calendar needs {name} (int64 [T], s)")
                x = x + calendar(times)
        x = self.dropout(x)
        for layer in self.layers:
            if self.recomputes and torch.is_grad_enabled():
                x = checkpoint(layer, x, offsets, layout, use_reentrant=False)
            else:
                x = layer(x, offsets, layout)
        return self.final_norm(x)

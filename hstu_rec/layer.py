"""What HSTUEncoder is made of: HSTULayer, dropout, norms and the calendar; jagged [T, D] in and out."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hstu_rec.encoder_config import EncoderConfig, NormKind
from hstu_rec.ops import (
    NUM_TIME_BUCKETS,
    AttentionKind,
    CandidateLayout,
    JaggedLayout,
    KeysAndValues,
    candidate_attention,
    jagged_attention,
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
        return self.of_history(x, offsets, layout)[0]

    def of_history(
        self, x: Tensor, offsets: Tensor, layout: JaggedLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward`, and the keys [T, H, A] and values [T, H, V] that candidates look at."""
        q, k, v, gate = self.heads(x)
        attended = jagged_attention(q, k, v, offsets, layout=layout, **self._attention())
        return self.after(x, attended.flatten(1), *gate), k, v

    def of_candidates(self, x: Tensor, past: KeysAndValues, layout: CandidateLayout) -> Tensor:
        """Candidates x [C, D] to [C, D], after histories whose keys and values are `past`."""
        q, k, v, gate = self.heads(x)
        attended = candidate_attention(q, k, v, past, layout, **self._attention())
        return self.after(x, attended.flatten(1), *gate)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """q, k [..., H, A], v [..., H, V] and, with a gate, [u [..., H V]] of x [..., D]."""
        v, q, k, *gate = self.before(x).split(self.widths, dim=-1)
        q, k = (one.unflatten(-1, (self.num_heads, self.attention_dim)) for one in (q, k))
        return q, k, v.unflatten(-1, (self.num_heads, self.value_dim)), gate

    def _attention(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "scale": self.scale,
            "position_bias": self.position_bias,
            "time_bias": self.time_bias,
        }

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

"""EncoderConfig: the encoder's shape and options, and which attention kernel they mean."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from hstu_rec.ops import AttentionKernel, AttentionKind
from hstu_rec.settings import at_least, within

NormKind = Literal["layer", "rms", "none"]
CalendarKind = Literal["none", "day", "week", "month"]

# The widest heads that the fused kernel is tested with on a GPU.
MAX_FUSED_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder's shape and options; the defaults are HSTU."""

    dim: int = 64
    """Width D of items, tokens and queries."""
    num_layers: int = 2
    """Number of layers."""
    num_heads: int = 2
    """Number of attention heads H."""
    attention_dim: int = 0
    """Width A of a head's queries and keys; 0 means dim / num_heads."""
    value_dim: int = 0
    """Width V of a head's values; 0 means dim / num_heads."""
    max_history_len: int = 50
    """Longest history in events (the newest are kept), and the n that silu attention is divided by."""
    attention: AttentionKind = "silu"
    """silu(q.k + bias) / n (HSTU) or softmax(q.k / sqrt(A) + bias) (SASRec)."""
    attention_kernel: Literal["auto", "grouped", "triton"] = "auto"
    """grouped: plain torch, users of like length together, on any device. triton: fused, on CUDA. auto:
    triton on Hopper (H100, H200; but for float64 and heads wider than 256), else grouped."""
    window: int = 0
    """Newest events that an event attends to, itself (or the candidate) among them; 0 for all."""
    use_gate: bool = True
    """Multiplies the normed attention output by U, and passes the projections through silu."""
    ffn_dim: int = 0
    """Width of a feed-forward block after attention; 0 for none."""
    norm: NormKind = "layer"
    """Norm before the projections and of the attention output."""
    final_norm: NormKind = "none"
    """Norm of the encoder's output."""
    dropout: float = 0.2
    """Dropout on the input tokens and on every residual branch."""
    use_position_bias: bool = True
    """Learned attention bias by distance in events."""
    use_time_bias: bool = True
    """Learned attention bias by log bucket of the time difference."""
    is_bias_per_head: bool = False
    """One bias table a head rather than one for all."""
    query_time: Literal["own", "next"] = "own"
    """Time differences run to the event's own time, or to the time of the event to predict ("now")."""
    calendar: CalendarKind = "none"
    """Adds a learned embedding of the day, week or month of each event to its token and, with query_time
    'next', one of the event to predict."""
    calendar_begin: int = 0
    """First second of the calendar; that of the training events when begin and end are 0."""
    calendar_end: int = 0
    """Last second of the calendar; times outside it count as its ends."""
    use_position_embedding: bool = False
    """Adds a learned embedding of the absolute position, counted from the oldest event."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = []
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                choices = ", ".join(get_args(hint))
                found.append(f"{name} must be one of {choices}; got {getattr(self, name)!r}")
        if self.attention_kernel == "triton" and find_spec("triton") is None:
            found.append(
                "attention_kernel 'triton' is for CUDA, whose torch brings triton; give auto or grouped"
            )
        found += at_least(self, 1, "dim", "num_layers", "num_heads", "max_history_len")
        found += at_least(self, 0, "attention_dim", "value_dim", "ffn_dim", "window")
        found += within(self, "[0, 1)", "dropout")
        if (
            self.num_heads > 0
            and self.dim % self.num_heads
            and not (self.attention_dim and self.value_dim)
        ):
            found.append(
                f"dim must be a multiple of num_heads unless attention_dim and value_dim are given; "
                f"got {self.dim} and {self.num_heads}"
            )
        if self.query_time == "next" and not (self.use_time_bias or self.calendar != "none"):
            found.append(
                "query_time 'next' has no effect without use_time_bias or a calendar; set one of them"
            )
        if self.calendar == "none" and (self.calendar_begin or self.calendar_end):
            found.append(
                "calendar_begin and calendar_end have no effect with calendar 'none'; set day, week or month"
            )
        if self.calendar_end < self.calendar_begin:
            found.append(
                "calendar_end must not be before calendar_begin; got "
                f"{self.calendar_end} and {self.calendar_begin}"
            )
        if 0 < self.max_history_len <= self.window:
            found.append(
                f"window {self.window} has no effect with max_history_len {self.max_history_len}; give 0"
            )
        if self.is_bias_per_head and not (self.use_time_bias or self.use_position_bias):
            found.append("is_bias_per_head has no effect without a bias")
        return found


def head_width(config: EncoderConfig) -> int:
    """Of a head's queries and keys or its values, whichever are wider."""
    default = config.dim // config.num_heads
    return max(config.attention_dim or default, config.value_dim or default)


def chosen_kernel(config: EncoderConfig, is_hopper: bool, dtype: torch.dtype) -> AttentionKernel:
    """What config.attention_kernel stands for, on such a GPU or not, with products in `dtype`."""
    if config.attention_kernel != "auto":
        return config.attention_kernel
    is_narrow = head_width(config) <= MAX_FUSED_WIDTH
    is_fused = is_hopper and dtype != torch.float64 and is_narrow
    return "triton" if is_fused else "grouped"

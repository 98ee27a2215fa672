"""Forms of attention that are timed beside each other: jagged, padded, and other packages' where they are."""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu_rec.ops import NUM_TIME_BUCKETS, jagged_attention, jagged_layout, time_bucket
from hstu_rec.transfer import on_device


class Unavailable(Exception):
    """A form that this machine does not have, and why."""


@dataclass(frozen=True)
class Shape:
    """Heads and histories of a batch."""

    num_heads: int
    width: int
    kind: str
    longest: int

    @classmethod
    def of(cls, text: str) -> "Shape":
        """Raises ValueError for a text of another form than 4x128-uniform-1024."""
        heads_and_width, kind, longest = text.split("-")
        num_heads, width = heads_and_width.split("x")
        shape = cls(int(num_heads), int(width), kind, int(longest))
        sizes = shape.num_heads, shape.width, shape.longest
        if kind not in ("uniform", "power", "full") or min(sizes) < 1:
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


@dataclass(frozen=True)
class Batch:
    """Random histories of one shape, and what each form takes of them."""

    shape: Shape
    lengths: Tensor  # int64 [B], on CPU
    dtype: torch.dtype
    device: torch.device
    peer: str = ""  # folder of a checkout of Meta's generative-recommenders

    @property
    def offsets(self) -> Tensor:
        """int64 [B+1], on CPU."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])

    def rows(self, *size: int) -> list[Tensor]:
        """q, k and v: [*size, H, D] with gradients."""
        size = (*size, self.shape.num_heads, self.shape.width)
        return [self._leaf(size, self.dtype) for _ in range(3)]

    def tables(self, dtype: torch.dtype) -> list[Tensor]:
        """Position and time bias that the heads share, [1, n] with gradients."""
        return [self._leaf((1, n), dtype) for n in (self.shape.longest, NUM_TIME_BUCKETS)]

    def times(self, *size: int) -> Tensor:
        """int64 [*size] in s, ascending along the last dimension."""
        return torch.randint(0, 10**8, size).sort(-1).values

    def _leaf(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(size, device=self.device, dtype=dtype, requires_grad=True)


# The attention of a batch, and the tensors that it has gradients of.
Attention = tuple[Callable[[], Tensor], Sequence[Tensor]]


def jagged(batch: Batch, has_bias: bool) -> Attention:
    """This package's: fused on CUDA, grouped on CPU."""
    kernel = "triton" if batch.device.type == "cuda" else "grouped"
    offsets, total = batch.offsets, int(batch.lengths.sum())
    times = batch.times(total) if has_bias else None
    shape = batch.shape
    layout = jagged_layout(offsets, shape.num_heads, times, None, kernel, batch.dtype)
    layout, (q, k, v) = layout.to(batch.device), batch.rows(total)
    # Tables are float32, as the encoder's parameters are under autocast.
    tables = batch.tables(torch.float32) if has_bias else []
    bias: dict[str, Any] = dict(zip(("position_bias", "time_bias"), tables, strict=False))
    offsets, scale = offsets.to(batch.device), 1 / batch.shape.longest
    attend = partial(jagged_attention, q, k, v, offsets, scale=scale, layout=layout, **bias)
    return attend, [q, k, v, *tables]


def padded(batch: Batch, has_bias: bool, is_compiled: bool) -> Attention:
    """All histories at the longest, scores [B, H, N, N] held; the bias [B, 1, N, N], as published code has it
    (arXiv 2402.17152), its time buckets made in every call."""
    num_users, longest = len(batch.lengths), batch.shape.longest
    rows = batch.rows(num_users, longest)
    tables = batch.tables(batch.dtype) if has_bias else []
    times = batch.times(num_users, longest).to(batch.device) if has_bias else None
    if is_compiled and batch.device.type != "cuda":
        raise Unavailable("compiled attention is timed on CUDA")
    attend = padded_attention
    if is_compiled:
        torch.compiler.reset()  # or this shape would be the second of a compiled function, and dynamic
        attend = torch.compile(attend, dynamic=False)
    return partial(attend, *rows, times, tables), [*rows, *tables]


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, times: Tensor | None, tables: Sequence[Tensor]
) -> Tensor:
    """Causal silu attention of [B, N, H, D]."""
    longest = q.shape[1]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    place = torch.arange(longest, device=q.device)
    distance = place[:, None] - place[None, :]
    if times is not None:
        position, time = tables
        buckets = time_bucket(times[:, :, None] - times[:, None, :])
        scores = scores + (position[0][distance.clamp(min=0)] + time[0][buckets])[:, None]
    weights = torch.nn.functional.silu(scores) / longest
    weights = weights * (distance >= 0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@dataclass(frozen=True)
class PaddedLayout:
    """Histories at the longest, whose scores and bias are held whole."""

    longest: int
    times: Tensor  # int64 [B, N] in s
    num_targets: Tensor | None = None

    def to(self, device: torch.device) -> "PaddedLayout":
        """The layout on `device`."""
        return on_device(self, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        """Attention of [B * N, H, D] with both tables of bias."""
        q, k, v = (x.unflatten(0, (-1, self.longest)) for x in (q, k, v))
        tables = [settings[name].to(q.dtype) for name in ("position_bias", "time_bias")]
        return padded_attention(q, k, v, self.times, tables).flatten(0, 1)


def varlen_softmax(batch: Batch) -> Attention:
    """torch's softmax attention of jagged histories: another function, of as many products."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no varlen attention") from error
    if batch.device.type != "cuda":
        raise Unavailable("varlen attention is for CUDA")
    rows, longest = batch.rows(int(batch.lengths.sum())), batch.shape.longest
    offsets = batch.offsets.int().to(batch.device)
    has_window = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if has_window else {"is_causal": True}
    attend: Any = partial(varlen_attn, *rows, offsets, offsets, longest, longest, **causal)
    return attend, rows


def peer_triton(batch: Batch) -> Attention:
    """Meta's Triton kernel, which has no bias, from a checkout of generative-recommenders."""
    if not batch.peer:
        raise Unavailable("give its folder, peer=DIR")
    sys.path.insert(0, batch.peer)
    try:
        module = import_module("generative_recommenders.ops.triton.triton_hstu_attention")
    except ImportError as error:
        raise Unavailable(f"{batch.peer}: {error}") from error
    finally:
        sys.path.remove(batch.peer)
    rows, longest = batch.rows(int(batch.lengths.sum())), batch.shape.longest
    scale = torch.tensor(1 / longest, device=batch.device)
    # Its arguments have changed their names over time.
    known: dict[str, Any] = {"N": longest, "max_seq_len": longest, "alpha": 1.0, "causal": True}
    known |= dict(zip("qkv", rows, strict=True)) | {"attn_scale": scale}
    known["seq_offsets"] = batch.offsets.to(batch.device)
    wanted = inspect.signature(module.triton_hstu_mha).parameters
    return partial(module.triton_hstu_mha, **{n: known[n] for n in wanted if n in known}), rows


FORMS: dict[str, Callable[[Batch], Attention]] = {
    "jagged": partial(jagged, has_bias=False),
    "jagged+bias": partial(jagged, has_bias=True),
    "padded": partial(padded, has_bias=False, is_compiled=False),
    "padded+bias": partial(padded, has_bias=True, is_compiled=False),
    "compiled": partial(padded, has_bias=False, is_compiled=True),
    "compiled+bias": partial(padded, has_bias=True, is_compiled=True),
    "varlen": varlen_softmax,
    "peer": peer_triton,
}

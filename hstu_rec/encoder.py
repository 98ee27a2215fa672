"""HSTUEncoder: layers over jagged histories [T, D]; plain nn.Module, no TorchRec, no distributed.

With `attention="softmax"`, `use_gate=False` and an FFN the same encoder is SASRec.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hstu_rec.distributed import is_hopper
from hstu_rec.encoder_config import EncoderConfig, chosen_kernel
from hstu_rec.layer import Calendar, Dropout, HSTULayer, make_norm
from hstu_rec.ops import (
    AttentionKernel,
    JaggedLayout,
    KeysAndValues,
    candidate_layout,
    jagged_layout,
)

# Candidates that go through all layers together: their tokens stay near the processor.
BATCH_CANDIDATES = 1024


@dataclass(frozen=True)
class EncodedHistory:
    """What candidates look at of the T events of B users; `HSTUEncoder.encode_history` makes it."""

    offsets: Tensor
    """int64 [B+1]."""
    timestamps: Tensor | None
    """int64 [T] in s; None without a time bias."""
    layers: list[KeysAndValues]
    """Of each layer, keys [H, T, A] and values [H, T, V]."""

    def to(self, device: torch.device) -> "EncodedHistory":
        """The same on `device`."""
        layers = [(keys.to(device), values.to(device)) for keys, values in self.layers]
        times = None if self.timestamps is None else self.timestamps.to(device)
        return EncodedHistory(self.offsets.to(device), times, layers)


def check_candidates(
    num_candidates: Tensor, at: Tensor | None, num_users: int, num_rows: int
) -> None:
    """Raises ValueError unless both are int64 [num_users], the first of `num_rows` candidates in all."""
    for name, given in (("num_candidates", num_candidates), ("at", at)):
        if given is not None and (given.dtype, given.shape) != (torch.int64, (num_users,)):
            raise ValueError(
                f"{name} must be int64 [{num_users}], one a user of the history; got {given.dtype} "
                f"{[*given.shape]}"
            )
    if num_users and num_candidates.min() < 0:
        raise ValueError(f"num_candidates must be at least 0; got {int(num_candidates.min())}")
    if int(num_candidates.sum()) != num_rows:
        raise ValueError(
            f"num_candidates tells of {int(num_candidates.sum())} candidates in all; got {num_rows}"
        )


def _check_after(offsets: Tensor, timestamps: Tensor, at: Tensor) -> None:
    has_events = offsets.diff() > 0
    newest = timestamps[offsets[1:][has_events] - 1]
    is_before = at[has_events] < newest
    if is_before.any():
        raise ValueError(
            f"at must not be before the newest event of a user; got {int(at[has_events][is_before][0])} s, "
            f"and an event at {int(newest[is_before][0])}"
        )


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

    def _places(self, offsets: Tensor, size: int, num_targets: Tensor | None) -> Tensor | None:
        """int64 [size]: places of events in their histories, from the oldest on; None where none counts."""
        if self.position_embedding is None:
            return None
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
            layout = self.layout(
                offsets, timestamps, next_timestamps, dtype=self._dtype(x), num_targets=num_targets
            )
            self._check_width(x, int(offsets[-1]), "the last of offsets")
        elif num_targets is not None:
            raise ValueError("num_targets is part of a layout; give it to layout() alone")
        places = self._places(offsets, len(x), layout.num_targets)
        x = self._tokens(x, places, timestamps, next_timestamps)
        for layer in self.layers:
            if self.recomputes and torch.is_grad_enabled():
                x = checkpoint(layer, x, offsets, layout, use_reentrant=False)
            else:
                x = layer(x, offsets, layout)
        return self.final_norm(x)

    def _tokens(
        self, x: Tensor, places: Tensor | None, timestamps: Tensor | None, next_times: Tensor | None
    ) -> Tensor:
        """What the first layer gets: x [n, D] with where and when they are."""
        if self.position_embedding is not None and places is not None:
            x = x + self.position_embedding[places]
        for calendar, times, name in (
            (self.calendar, timestamps, "timestamps"),
            (self.next_calendar, next_times, "next_timestamps"),
        ):
            if calendar is not None:
                if times is None:
                    raise ValueError(f"a calendar needs {name} (int64 [T], s)")
                x = x + calendar(times)
        return self.dropout(x)

    @torch.no_grad()
    def encode_history(
        self,
        x: Tensor,
        offsets: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> EncodedHistory:
        """Keys and values of all layers, to look at by any number of candidates: `encode_candidates`.

        Arguments as of `forward`. With `query_time="next"` the next_timestamps of a user's newest event is
        the time of the request, so that histories are encoded for each. Raises ValueError as `forward`, and
        in training mode, whose dropout would be another one each time.
        """
        self._check_mode("encode_history")
        layout = self.layout(offsets, timestamps, next_timestamps, dtype=self._dtype(x))
        self._check_width(x, int(offsets[-1]), "the last of offsets")
        x = self._tokens(x, self._places(offsets, len(x), None), timestamps, next_timestamps)
        past = []
        for layer in self.layers:
            assert isinstance(layer, HSTULayer)
            x, k, v = layer.of_history(x, offsets, layout)
            past.append((k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()))
        times = timestamps if self.config.use_time_bias else None
        return EncodedHistory(offsets, times, past)

    @torch.no_grad()
    def encode_candidates(
        self, x: Tensor, num_candidates: Tensor, history: EncodedHistory, at: Tensor | None = None
    ) -> Tensor:
        """One vector for every candidate: [C, D], as `forward` with num_targets gives at the same times.

        The cost grows with the candidates; BATCH_CANDIDATES of them go through the layers at a time
        (arXiv 2402.17152, section 3.4, M-FALCON).

        Args:
            x: [C, D] item vectors, those of user 0 first. num_candidates: int64 [B], may hold zeros.
            history: of the B users, by `encode_history` of these weights.
            at: int64 [B] in s, the times of the requests; needed with `use_time_bias` or a calendar.

        Raises ValueError for sizes that do not fit, times that are missing or before a user's newest event,
        and in training mode.
        """
        self._check_mode("encode_candidates")
        check_candidates(num_candidates, at, len(history.offsets) - 1, len(x))
        self._check_width(x, len(x), "the sum of num_candidates")
        if at is None and (self.config.use_time_bias or self.config.calendar != "none"):
            raise ValueError(
                "this encoder uses times: give at (int64 [B], s), those of the requests"
            )
        times = history.timestamps
        if times is not None and at is not None:
            _check_after(history.offsets, times, at)
        layout = candidate_layout(history.offsets, num_candidates, times, at, self.config.window)
        lengths = history.offsets.diff().clamp(max=self.config.max_history_len - 1)
        place, now = (
            None
            if one is None
            else torch.repeat_interleave(one, num_candidates, output_size=len(x))
            for one in (lengths, at)
        )
        found = []
        for begin in range(0, len(x), BATCH_CANDIDATES):
            rows = slice(begin, min(begin + BATCH_CANDIDATES, len(x)))
            of_part = layout.part(rows)
            part, when = x[rows], None if now is None else now[rows]
            part = self._tokens(part, None if place is None else place[rows], when, when)
            for layer, past in zip(self.layers, history.layers, strict=True):
                assert isinstance(layer, HSTULayer)
                part = layer.of_candidates(part, past, of_part)
            found.append(self.final_norm(part))
        return torch.cat(found) if found else x

    def _check_mode(self, name: str) -> None:
        if self.training:
            raise ValueError(
                f"{name} is for serving: call eval() first, or give num_targets to train on candidates"
            )

    def _check_width(self, x: Tensor, size: int, of: str) -> None:
        if x.shape != (size, self.config.dim):
            raise ValueError(
                f"x must be [{size}, {self.config.dim}], {of} by dim; got {[*x.shape]}"
            )

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Of the layers' products."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

"""How a jagged batch is cut into the blocks that programs of `hstu_rec.ops.triton` own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_rec.transfer import on_device


@dataclass(frozen=True)
class BlockLayout:
    """Where the blocks of a jagged batch are, those with the most work first; shared by all layers."""

    block: int
    longest: int  # events of the longest history
    window: int  # newest events that a query sees; 0 for all
    offsets: Tensor  # int64 [B+1]
    query_users: Tensor  # int32 [n]: owner of each block of queries
    query_begins: Tensor  # int32 [n]: its first event in the history
    key_users: Tensor  # int32 [n]
    key_begins: Tensor  # int32 [n]
    # For a time bias, int32 (int64 where a history is longer than 34 years) [T + block]: s since the user's
    # first event, that a query looks back from, and of the events themselves.
    now: Tensor | None
    then: Tensor | None
    num_seen: Tensor | None  # int32 [B]: events before a user's candidates; None without candidates
    is_sorted: bool = False  # whether no user's times, now or then, go back

    @property
    def num_targets(self) -> Tensor | None:
        """int64 [B]: candidates at the end of each history; None without."""
        return None if self.num_seen is None else self.offsets.diff() - self.num_seen

    def to(self, device: torch.device) -> "BlockLayout":
        """The layout on `device`; made on CPU and moved, it costs no wait for the device."""
        return on_device(self, device)


def block_size(dtype: torch.dtype, longest: int) -> int:
    """Events that a program owns: what the registers hold, and no more than short histories fill."""
    if dtype == torch.float32:
        return 32
    return 64 if longest <= 64 else 128


def block_layout(
    offsets: Tensor,
    timestamps: Tensor | None = None,
    query_times: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    block: int = 0,
    num_targets: Tensor | None = None,
    window: int = 0,
) -> BlockLayout:
    """The layout of a batch with int64 `offsets` [B+1]; arguments as in `hstu_rec.ops.jagged_layout`.

    `dtype`: of queries, keys and values, whose blocks `block_size` chooses for block 0.
    """
    device, starts = offsets.device, offsets.cpu()
    lengths = starts.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    block = block or block_size(dtype, longest)
    counts = (lengths + block - 1) // block
    users = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    begins = (torch.arange(len(users)) - (counts.cumsum(0) - counts)[users]) * block
    of_queries = _heaviest_first(users, begins, begins, device)
    of_keys = _heaviest_first(users, begins, lengths[users] - begins, device)
    now = then = None
    is_sorted = False
    if timestamps is not None:
        first = timestamps[torch.repeat_interleave(starts[:-1], lengths).to(timestamps.device)]
        times = timestamps, timestamps if query_times is None else query_times
        then, now = _since([t - first for t in times], block)
        is_sorted = all(_is_sorted(t.cpu(), starts) for t in times)
    num_seen = None if num_targets is None else (lengths - num_targets.cpu()).int().to(device)
    blocks = *of_queries, *of_keys
    return BlockLayout(block, longest, window, offsets, *blocks, now, then, num_seen, is_sorted)


def _heaviest_first(
    users: Tensor, begins: Tensor, work: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Owners and first events of blocks as int32 on `device`: short programs then fill the gaps."""
    order = torch.argsort(work, descending=True, stable=True)
    return users[order].int().to(device), begins[order].int().to(device)


def _is_sorted(times: Tensor, offsets: Tensor) -> bool:
    """Whether int64 `times` [T] never fall within a user's events."""
    falls = times.diff() < 0
    inner = offsets[1:-1]
    falls[inner[(inner > 0) & (inner < len(times))] - 1] = False
    return not bool(falls.any())


def _since(times: list[Tensor], block: int) -> list[Tensor]:
    """The int64 [T] as int32 where they fit, with 0 for a block of events after the last."""
    largest = max((int(t.abs().max()) for t in times if len(t)), default=0)
    dtype = torch.int32 if largest < 2**30 else torch.int64
    return [torch.cat([t, t.new_zeros(block)]).to(dtype) for t in times]

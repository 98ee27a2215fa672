"""Rows of a table in a quarter of the memory: int8 with a scale a row, float32 again where they are read."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127


@dataclass(frozen=True)
class Int8Rows:
    """float32 rows [N, D] as `values` times `scales`; read like a tensor of them."""

    values: Tensor
    """int8 [N, D], within -127 .. 127."""
    scales: Tensor
    """float32 [N]: the largest of a row is 127 of it."""

    @classmethod
    def of(cls, rows: Tensor) -> "Int8Rows":
        """The nearest to finite float32 `rows` [N, D]: an entry is off by half a scale at most."""
        scales = rows.abs().amax(1) / LARGEST
        # The smallest rows have a scale of 0, and are 0.
        values = torch.where(scales[:, None] > 0, rows / scales[:, None], 0)
        return cls(values.round().clamp(-LARGEST, LARGEST).to(torch.int8), scales)

    @property
    def shape(self) -> torch.Size:
        """[N, D]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice | Tensor) -> Tensor:
        """float32 [k, D] rows of a slice or of int64 numbers [k]."""
        return self.values[part] * self.scales[part][:, None]  # float32, without a copy between

    def split(self, size: int) -> Iterator[Tensor]:
        """float32 [size, D] rows in turn, the last fewer."""
        return (self[begin : begin + size] for begin in range(0, len(self), size))

    def index_select(self, dim: int, ids: Tensor) -> Tensor:
        """float32 [k, D] rows of int64 numbers [k]; `dim` is 0, as of a tensor."""
        assert dim == 0
        return self[ids]


ItemRows = Tensor | Int8Rows

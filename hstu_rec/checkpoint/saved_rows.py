"""Rows of a checkpoint's tensor by number: only what is asked for is read.

DCP's own reader brings a whole shard of yesterday into memory for any row of it. Here a shard is mapped:

    __0_0.distcp   | archive of a tensor | archive of another | ...      where: tensors.json
                      archive/data/0 of torch.save's zip: the shard's numbers, row after row, not compressed
"""

import mmap
import struct
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from hstu_rec.checkpoint.storage import StorageReader

# Of a file in a zip: before its name, of which the last two numbers are the lengths of name and extra field.
ZIP_HEADER_BYTES = 30


class SavedRows:
    """The tensor `name` [N] or [N, D] of the checkpoint in `path`, in whatever shards it was saved.

    Raises ValueError when there is no such tensor, or its bytes are not where torch.save puts them.
    """

    def __init__(self, path: Path, name: str) -> None:
        metadata = StorageReader(path).read_metadata()
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata) or len(entry.size) not in (1, 2):
            raise ValueError(f"{path} has no rows named {name!r}")
        self.shape, self.dtype = tuple(entry.size), entry.properties.dtype
        self._shards: list[tuple[int, slice, np.ndarray]] = []
        for chunk in entry.chunks:
            stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            file = path / stored.relative_path
            first, *column = chunk.offsets
            num_rows, *width = chunk.sizes
            row_bytes, before = (self.dtype.itemsize * n for n in (sum(width) or 1, sum(column)))
            content = _mapped(file, stored.offset, stored.length, num_rows * row_bytes)
            window = slice(before, before + row_bytes)
            self._shards.append((first, window, content.reshape(num_rows, row_bytes)))

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows: np.ndarray) -> Tensor:
        """The rows int64 [n] of the tensor, [n] or [n, D], on CPU; fastest where they rise."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise ValueError(f"rows must be in 0..{len(self) - 1}; got {rows.min()}..{rows.max()}")
        taken = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        as_bytes = taken.view(len(rows), prod(self.shape[1:])).view(torch.uint8).numpy()
        for first, window, content in self._shards:
            here = np.flatnonzero((rows >= first) & (rows < first + len(content)))
            as_bytes[here, window] = content[rows[here] - first]
        return taken


def _mapped(path: Path, offset: int, length: int, num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes]: the numbers of the only tensor of the archive at `offset`, memory-mapped."""
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    size = offset - begin + length
    with path.open("rb") as file:
        memory: Any = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=begin)
    with zipfile.ZipFile(memory) as archive:
        entries = [one for one in archive.infolist() if one.filename.endswith("/data/0")]
    found = [(entry.compress_type, entry.file_size) for entry in entries]
    if found != [(zipfile.ZIP_STORED, num_bytes)]:
        raise ValueError(f"{path}: a tensor is not written as this version of torch.save writes it")
    names = entries[0].header_offset + ZIP_HEADER_BYTES
    begin = names + sum(struct.unpack("<HH", memory[names - 4 : names]))
    return np.frombuffer(memory, np.uint8, num_bytes, begin)

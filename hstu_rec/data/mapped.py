"""Arrow IPC files: written batch by batch, memory-mapped when read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa


@contextmanager
def arrow_writer(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchFileWriter]:
    """Writes an uncompressed file at `path`."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        yield writer


def open_arrow(path: Path) -> pa.Table:
    """The table of a file, memory-mapped. Raises ValueError when it is damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error}); prepare the dataset again") from error


def views(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The values of each record batch, without a copy."""
    return [chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks]


def whole(path: Path, table: pa.Table, name: str) -> np.ndarray:
    """A column of a file of one record batch, without a copy. Raises ValueError for more batches."""
    chunks = views(table.column(name))
    if len(chunks) != 1:
        raise ValueError(
            f"{path} has {len(chunks)} record batches, where one is wanted; prepare the dataset again"
        )
    return chunks[0]

"""Arrow IPC files: written batch by batch, memory-mapped when read.

The kernel ends a process that reads a mapped file beyond its end, by SIGBUS, without a word: files are held
open, and looked at.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

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


class OpenFiles:
    """Files held open while they are mapped; one that is removed meanwhile stays as it was.

    Raises OSError for one that cannot be opened.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = {path: path.open("rb") for path in paths}
        self._sizes = {path: self._size(path) for path in self._files}
        _OPEN.add(self)

    def check(self) -> None:
        """Raises ValueError when a file has another size than when it was opened; 1 us a file."""
        if cut := self.what_was_cut():
            raise ValueError("; ".join(cut))

    def what_was_cut(self) -> list[str]:
        """A sentence a file that has another size, or that can no longer be read."""
        found = []
        for path, size in self._sizes.items():
            try:
                now = self._size(path)
            except OSError as error:
                found.append(f"{path} can no longer be read ({error}); see to its file system")
                continue
            if now != size:
                found.append(
                    f"{path} was changed while it was read: it had {size:,} bytes and now has {now:,}; "
                    "prepare the dataset again, in a folder that no run reads"
                )
        return found

    def _size(self, path: Path) -> int:
        return os.fstat(self._files[path].fileno()).st_size


_OPEN: "WeakSet[OpenFiles]" = WeakSet()


def what_was_cut() -> list[str]:
    """`OpenFiles.what_was_cut` of all that are open in this process."""
    return [sentence for files in _OPEN for sentence in files.what_was_cut()]

"""A prepared dataset folder, memory-mapped: only what a batch needs is read.

items.parquet   one row an item    item_id | index | count | train_count
users.arrow     one row a user     user_id | start | length | train_end | valid_end
events.arrow    user after user    item | timestamp        (record batches of 2**22 rows)

     user 0                user 1
|<-- length[0] -->|<------- length[1] ------->|
[ e e e e e  v  t | e e e e e e e e e  v  t   | ...
  train_end--^  ^--valid_end
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT_VERSION = 1
EVENT_CHUNK_ROWS = 2**22
FILES = ("items.parquet", "users.arrow", "events.arrow", "stats.json")


class Dataset:
    """Users' event sequences of one prepared folder.

    Raises FileNotFoundError when `path` is no dataset folder, ValueError when another version wrote it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        missing = [name for name in FILES if not (self.path / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"data.path: {self.path} is no prepared dataset ({', '.join(missing)} missing); "
                "make one with: python apps/prepare.py INPUT " + str(self.path)
            )
        self.stats: dict[str, Any] = json.loads((self.path / "stats.json").read_text())
        if self.stats.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{self.path}/stats.json has format_version {self.stats.get('format_version')}, "
                f"this version reads {FORMAT_VERSION}; prepare the dataset again"
            )
        users = _open_arrow(self.path / "users.arrow")
        self._user_ids = users.column("user_id")
        self.starts, self.lengths, self.train_ends, self.valid_ends = (
            _as_numpy(users.column(name)) for name in ("start", "length", "train_end", "valid_end")
        )
        events = _open_arrow(self.path / "events.arrow")
        self._items = [_view(chunk) for chunk in events.column("item").chunks]
        self._timestamps = [_view(chunk) for chunk in events.column("timestamp").chunks]
        self.num_events = len(events)
        self.num_users = len(users)
        self.num_items = int(self.stats["items"])
        num_rows = pq.read_metadata(self.path / "items.parquet").num_rows
        if num_rows != self.num_items:
            raise ValueError(
                f"{self.path}: stats.json counts {self.num_items} items, items.parquet has {num_rows} "
                "rows; prepare the dataset again"
            )

    @property
    def facts(self) -> dict[str, int | float | str]:
        """The statistics that are single values."""
        return {k: v for k, v in self.stats.items() if isinstance(v, int | float | str)}

    @cached_property
    def _item_table(self) -> pa.Table:
        return pq.read_table(self.path / "items.parquet")

    @property
    def item_ids(self) -> pa.ChunkedArray:
        """Own id of every item, by index."""
        return self._item_table.column("item_id")

    @property
    def user_ids(self) -> pa.ChunkedArray:
        """Own id of every user, by index."""
        return self._user_ids

    @property
    def train_counts(self) -> np.ndarray:
        """int64 [N]: events of each item in the training part."""
        return _as_numpy(self._item_table.column("train_count"))

    @property
    def items_by_count(self) -> np.ndarray:
        """int64 [N]: items by rising count in the training part, equal ones by index."""
        return self._items_by_count

    @cached_property
    def _items_by_count(self) -> np.ndarray:
        return np.argsort(self.train_counts, kind="stable")

    def train_time_range(self) -> tuple[int, int]:
        """Times in s of the first and last training event. Raises ValueError when there is none."""
        users = np.flatnonzero(self.train_ends > 0)
        if not len(users):
            raise ValueError(
                f"{self.path}: no user has a training event; check the split of prepare"
            )
        ends = self.train_ends[users]
        first = _take(self._timestamps, self.starts[users])
        last = _take(self._timestamps, self.starts[users] + ends - 1)
        return int(first.min()), int(last.max())

    def gather(
        self, users: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Events [begins[b], ends[b]) of each user, as (items [T], timestamps [T] in s, offsets [B+1]).

        Positions count from the user's first event. All int64.
        """
        counts = ends - begins
        offsets = np.zeros(len(users) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        first = self.starts[users] + begins
        rows = np.repeat(first - offsets[:-1], counts) + np.arange(offsets[-1])
        return _take(self._items, rows), _take(self._timestamps, rows), offsets


def _open_arrow(path: Path) -> pa.Table:
    """The table of an Arrow IPC file, memory-mapped."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error}); prepare the dataset again") from error


def _view(chunk: pa.Array) -> np.ndarray:
    """The chunk's values without a copy."""
    return chunk.to_numpy(zero_copy_only=True)


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """The column as int64 [rows], without a copy when it is one chunk."""
    chunks = [_view(chunk) for chunk in column.chunks]
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int64)


def _take(chunks: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Values int64 at global `rows` of a column whose chunks, but the last, hold EVENT_CHUNK_ROWS."""
    if len(chunks) == 1:
        return chunks[0][rows].astype(np.int64)
    taken = np.empty(len(rows), dtype=np.int64)
    chunk_of = rows // EVENT_CHUNK_ROWS
    for index in np.unique(chunk_of):
        here = chunk_of == index
        taken[here] = chunks[index][rows[here] - index * EVENT_CHUNK_ROWS]
    return taken

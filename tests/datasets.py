"""Small dataset folders, written without prepare."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_rec.data.dataset import EVENT_CHUNK_ROWS, FORMAT_VERSION, Dataset, digests, fingerprint


def write_dataset(
    path: Path,
    sequences: Sequence[Sequence[int]],
    timestamps: Sequence[Sequence[int]] | None = None,
    num_items: int | None = None,
    item_ids: Sequence[int] | Sequence[str] | None = None,
) -> Dataset:
    """The dataset of these users' item indices, leave-one-out; an hour between events by default.

    Own ids of items are their indices where not given.
    """
    path.mkdir(parents=True)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    items = np.array([item for sequence in sequences for item in sequence], dtype=np.int32)
    if timestamps is None:
        timestamps = [[3600 * place for place in range(length)] for length in lengths]
    assert [len(times) for times in timestamps] == lengths.tolist()
    times = np.array([time for user in timestamps for time in user], dtype=np.int64)
    num_items = int(items.max()) + 1 if num_items is None else num_items
    is_split = lengths >= 3
    starts = np.cumsum(lengths) - lengths
    train_ends = lengths - 2 * is_split
    place = np.arange(len(items)) - np.repeat(starts, lengths)
    is_train = place < np.repeat(train_ends, lengths)
    _write_arrow(
        path / "users.arrow",
        {
            "user_id": np.arange(len(lengths)),
            "start": starts,
            "length": lengths,
            "train_end": train_ends,
            "valid_end": lengths - is_split,
        },
    )
    _write_arrow(path / "events.arrow", {"item": items, "timestamp": times})
    train_counts = np.bincount(items[is_train], minlength=num_items)
    _write_arrow(
        path / "counts.arrow",
        {"train_count": train_counts, "by_train_count": np.argsort(train_counts, kind="stable")},
    )
    index = np.arange(num_items)
    counts = {"count": np.bincount(items, minlength=num_items), "train_count": train_counts}
    ids = pa.array(index if item_ids is None else item_ids)
    pq.write_table(pa.table({"item_id": ids, "index": index, **counts}), path / "items.parquet")
    stats = {"users": len(lengths), "items": num_items, "events": len(items)}
    (path / "stats.json").write_text(
        json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "split": {"kind": "leave_one_out"},
                "parquet": fingerprint(path),
                "mapped": digests(path),
                **stats,
            }
        )
    )
    return Dataset(path)


def _write_arrow(path: Path, columns: dict[str, np.ndarray]) -> None:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=EVENT_CHUNK_ROWS)

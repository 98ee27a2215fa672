"""Dataset folders as another engine leaves them: parquet in parts, written by pyarrow alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ITEMS: dict[str, Any] = {"item_id": ["c", "a", "b"], "index": [0, 1, 2]}
SEQUENCES: dict[str, Any] = {
    "user_id": ["u2", "u1", "u3"],
    "item_indices": [[0, 1, 2, 1], [2, 2, 0], [1, 0]],
    "timestamps": [[10, 20, 20, 30], [5, 6, 7], [8, 9]],
}


def portable(
    path: Path, items: dict[str, Any] = ITEMS, sequences: dict[str, Any] = SEQUENCES
) -> Path:
    """A folder of items.parquet and sequences.parquet, each of one file."""
    path.mkdir(parents=True)
    pq.write_table(pa.table(items), path / "items.parquet")
    pq.write_table(pa.table(sequences), path / "sequences.parquet")
    return path


def in_parts(path: Path, content: pa.Table, rows: Sequence[int], num_parts: int) -> None:
    """A folder of parts as Spark names them, with the rows in that order."""
    path.mkdir(parents=True)
    (path / "_SUCCESS").touch()
    (path / "._SUCCESS.crc").touch()
    for number, part in enumerate(np.array_split(np.asarray(rows), num_parts)):
        name = f"part-{number:05d}-c000.snappy.parquet"
        pq.write_table(content.take(pa.array(part)), path / name, compression="snappy")


def grouped(events: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(items, sequences) of events user_id, item_id, timestamp, each user's in order of the rows.

    As an engine would: items by id, users in order of their first event.
    """
    ids = sorted(set(events.column("item_id").to_pylist()))
    index = {item: place for place, item in enumerate(ids)}
    users: dict[Any, list[tuple[int, int]]] = {}
    for event in events.to_pylist():
        users.setdefault(event["user_id"], []).append((event["timestamp"], index[event["item_id"]]))
    ordered = {user: sorted(own, key=lambda event: event[0]) for user, own in users.items()}
    items = pa.table({"item_id": ids, "index": pa.array(range(len(ids)), pa.int32())})
    sequences = pa.table(
        {
            "user_id": list(ordered),
            "item_indices": pa.array(
                [[item for _, item in own] for own in ordered.values()], pa.list_(pa.int32())
            ),
            "timestamps": [[time for time, _ in own] for own in ordered.values()],
        }
    )
    return items, sequences

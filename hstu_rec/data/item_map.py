"""Own ids of a run's rows, kept with the run, and matched with those of another catalogue.

RUN/items.parquet holds item_id | index, and title where the dataset has it, by index: the dataset may be
prepared again.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_rec.data.database import database
from hstu_rec.data.dataset import ITEMS, parts
from hstu_rec.data.own_ids import hash_items
from hstu_rec.data.sources import quoted

ITEM_MAP = "items.parquet"
# What the join of own ids may take; beyond it DuckDB works on disk.
MEMORY_LIMIT = "2GB"
BATCH_ROWS = 2**20


@dataclass(frozen=True)
class MatchedItems:
    """How a catalogue relates to the former one."""

    num_known: int
    num_new: int
    num_retired: int


def keep_item_map(dataset: Path, folder: Path) -> None:
    """Copies the dataset's map into `folder`, complete or not at all."""
    partial = folder / f"{ITEM_MAP}.tmp"
    sources = parts(dataset / ITEMS)
    files = ", ".join(quoted(file) for file in sources)
    title = ", title" if "title" in pq.read_schema(sources[0]).names else ""
    with database(folder, MEMORY_LIMIT) as connection:
        connection.execute(
            f"COPY (SELECT item_id, index{title} FROM read_parquet([{files}], hive_partitioning=false) "
            f"ORDER BY index) TO {quoted(partial)} (FORMAT parquet, COMPRESSION zstd)"
        )
    os.replace(partial, folder / ITEM_MAP)


def item_map_hash(path: Path) -> str:
    """The item_map_hash of stats.json, of a map that a run kept."""
    with pq.ParquetFile(path) as file:
        return hash_items(batch.column(0) for batch in file.iter_batches(columns=["item_id"]))


def match_items(former: Path, now: Path, output: Path) -> MatchedItems:
    """Writes int64 [N] as `output` (.npy): for every row of the map `now` that of `former`, -1 for new items.

    Both are files with item_id and index. Raises ValueError when own ids are of different types, or repeated.
    """
    kinds = [_kind(path) for path in (former, now)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"item ids are {kinds[0]} in {former} and {kinds[1]} in {now}; prepare the events again with "
            f"item ids that are {kinds[0]}"
        )
    num_former, num_items = (pq.read_metadata(path).num_rows for path in (former, now))
    matched = np.lib.format.open_memmap(output, "w+", dtype=np.int64, shape=(num_items,))
    query = (
        f"SELECT n.index AS now, coalesce(f.index, -1) AS former FROM read_parquet({quoted(now)}) n "
        f"LEFT JOIN read_parquet({quoted(former)}) f ON n.item_id = f.item_id"
    )
    num_rows = num_known = 0
    with database(output.parent, MEMORY_LIMIT) as connection:
        connection.execute("SET preserve_insertion_order = false")
        for batch in connection.sql(query).to_arrow_reader(BATCH_ROWS):
            rows, before = (batch.column(name).to_numpy() for name in ("now", "former"))
            matched[rows] = before
            num_rows += len(rows)
            num_known += int((before >= 0).sum())
    if num_rows != num_items or num_known > num_former:
        raise ValueError(f"{former} or {now} names an item twice; prepare the dataset again")
    matched.flush()
    return MatchedItems(num_known, num_items - num_known, num_former - num_known)


def _kind(path: Path) -> str:
    """What own ids are in a map, in words."""
    kind = pq.read_schema(path).field("item_id").type
    return "whole numbers" if pa.types.is_integer(kind) else "strings"

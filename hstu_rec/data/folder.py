"""The files of a dataset folder, streamed out of DuckDB.

users(user_id, start, length, train_end, valid_end)          --> users.arrow
a query of item, timestamp, time: user after user, in order  --> events.arrow, counts.arrow, features.arrow
items(place, item_id, title)                                 --> items.parquet
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_rec.data import dataset
from hstu_rec.data.database import row
from hstu_rec.data.mapped import arrow_writer
from hstu_rec.data.own_ids import hash_items
from hstu_rec.data.tally import Tally

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
READ_ROWS = 2**20


def write_users(connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Writes the table `users` as one record batch, so that its columns can be mapped as they are."""
    columns = "user_id, start, length, train_end, valid_end"
    users = connection.sql(f"SELECT {columns} FROM users ORDER BY start").to_arrow_table()
    if pa.types.is_string(users.schema.field("user_id").type):  # one batch may pass 2 GiB
        users = users.cast(users.schema.set(0, pa.field("user_id", pa.large_string())))
    with arrow_writer(folder / "users.arrow", users.schema) as writer:
        writer.write_table(users.combine_chunks())


def write_events(
    connection: duckdb.DuckDBPyConnection, query: str, folder: Path, features: Sequence[str] = ()
) -> Tally:
    """Writes events.arrow, counts.arrow and, with `features`, the file of those; the tables users and items
    tell how many there are.

    query: item int32, timestamp int64 s, time, the same in the precision of the input, and float32 a feature.
    """
    marks = connection.sql("SELECT length, train_end FROM users ORDER BY start").fetchnumpy()
    num_items = row(connection, "SELECT count(*) FROM items")[0]
    tally = Tally(num_items, marks["length"], marks["train_end"])
    reader = connection.sql(query).to_arrow_reader(min(dataset.EVENT_CHUNK_ROWS, READ_ROWS))
    schema = pa.schema([("item", pa.int32()), ("timestamp", pa.int64())])
    of_features = dataset.schema_of_features([*features])
    with ExitStack() as files:
        events = files.enter_context(arrow_writer(folder / "events.arrow", schema))
        beside = None
        if features:
            beside = files.enter_context(arrow_writer(folder / dataset.FEATURES, of_features))
        for batch in _rechunked(_tallied(reader, tally), dataset.EVENT_CHUNK_ROWS):
            events.write_batch(batch.select(schema.names))
            if beside is not None:
                columns = batch.columns[len(schema) :]
                beside.write_batch(pa.record_batch(columns, schema=of_features))
    # One batch, so that the columns can be mapped as they are.
    counts = pa.record_batch(
        {"train_count": tally.train_counts, "by_train_count": dataset.by_count(tally.train_counts)}
    )
    with arrow_writer(folder / "counts.arrow", counts.schema) as writer:
        writer.write_batch(counts)
    return tally


def _tallied(reader: pa.RecordBatchReader, tally: Tally) -> Iterator[pa.RecordBatch]:
    """The batches, counted, with the columns that are written."""
    for batch in reader:
        tally.add(*(batch.column(name).to_numpy() for name in ("item", "timestamp", "time")))
        yield batch.drop_columns(["time"])


def write_items(connection: duckdb.DuckDBPyConnection, tally: Tally, folder: Path) -> None:
    """Writes the table `items` and what was counted of each; titles where there are any."""
    has_title = row(connection, "SELECT count(title) > 0 FROM items")[0]
    reader = _item_ids(connection, "item_id, title" if has_title else "item_id")
    schema = pa.schema(
        [reader.schema.field("item_id")]
        + [pa.field(name, pa.int64()) for name in ("index", "count", "train_count")]
        + ([pa.field("title", pa.string())] if has_title else [])
    )
    begin = 0
    with pq.ParquetWriter(folder / "items.parquet", schema, compression="zstd") as writer:
        for batch in reader:
            part = slice(begin, begin + len(batch))
            columns = [batch.column(0), np.arange(part.start, part.stop)]
            columns += [tally.counts[part], tally.train_counts[part], *batch.columns[1:]]
            writer.write_table(pa.table(columns, schema=schema))
            begin = part.stop


def _rechunked(reader: pa.RecordBatchReader, rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly `rows`, the last shorter."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in reader:
        while num_waiting + len(batch) >= rows:
            head = batch.slice(0, rows - num_waiting)
            yield pa.concat_batches([*waiting, head])
            batch, waiting, num_waiting = batch.slice(len(head)), [], 0
        if len(batch):
            waiting.append(batch)
            num_waiting += len(batch)
    if waiting:
        yield pa.concat_batches(waiting)


def measure(connection: duckdb.DuckDBPyConnection, tally: Tally) -> dict[str, Any]:
    """Counts, lengths, density, ties, duplicates, the range of times and the hash of the item map."""
    marks = ", ".join(f"quantile_disc(length, {share})" for share in QUANTILES.values())
    num_users, valid_targets, test_targets, *lengths = row(
        connection,
        f"""SELECT count(*), count(*) FILTER (train_end < valid_end),
                   count(*) FILTER (valid_end < length), {marks} FROM users""",
    )
    num_events, num_items = tally.num_events, len(tally.counts)
    spread = dict(zip(QUANTILES, lengths, strict=True))
    return {
        "users": num_users,
        "items": num_items,
        "events": num_events,
        "length": {"mean": round(num_events / num_users, 3)} | spread,
        "density": num_events / (num_users * num_items),
        "tie_share": tally.num_tied / num_events,
        "tie_last_two_share": tally.num_tied_last_two / num_users,
        "duplicates": tally.num_duplicates,
        "first_timestamp": tally.first_timestamp,
        "last_timestamp": tally.last_timestamp,
        "valid_targets": valid_targets,
        "test_targets": test_targets,
        "item_map_hash": hash_items(batch.column(0) for batch in _item_ids(connection)),
    }


def _item_ids(
    connection: duckdb.DuckDBPyConnection, columns: str = "item_id"
) -> pa.RecordBatchReader:
    """Own ids of the items (column item_id), by index."""
    return connection.sql(f"SELECT {columns} FROM items ORDER BY place").to_arrow_reader(READ_ROWS)


def write_stats(stats: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes stats.json beside the mapped files, whose content it adds; what it holds."""
    stats = stats | {"mapped": dataset.digests(folder)}
    (folder / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    return stats

"""Clean events, already in one DuckDB table of codes, into the files of a dataset folder.

    events(user, item, time [, tie], seq)
           --order--> users, items, sequence
           --write--> users.arrow, items.parquet, events.arrow

Codes rise with the own ids, so that indices do not depend on the order of rows or files.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_rec.data import dataset
from hstu_rec.data.sources import quoted

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
MAX_ITEMS = 2**31 - 1


def cut_times(
    connection: duckdb.DuckDBPyConnection, seconds: str, valid_fraction: float, test_fraction: float
) -> tuple[int, int]:
    """(valid_time, test_time) in unix s that leave about these shares of events to each part."""
    # Rounded, as a decimal in SQL: 1 - (0.2 + 0.1) is a little less than 0.7.
    cuts = []
    for later in (valid_fraction + test_fraction, test_fraction):
        earlier = f"{1 - later:.9f}"
        row = connection.execute(
            f"""SELECT min(s) FROM (
                    SELECT s, sum(n) OVER (ORDER BY s) AS so_far, sum(n) OVER () AS total
                    FROM (SELECT {seconds} AS s, count(*) AS n FROM events GROUP BY s)
                ) WHERE so_far > total * {earlier}"""
        ).fetchone()
        assert row is not None
        cuts.append(row[0])
    return cuts[0], cuts[1]


def order(
    connection: duckdb.DuckDBPyConnection,
    *,
    seconds: str,
    has_tie: bool,
    cut: tuple[int, int] | None,
) -> None:
    """Makes the tables users, sequence and items; `seconds` is the SQL of an event's unix second.

    `cut` holds the times at which validation and test begin; None is leave-one-out.
    """
    if cut is None:
        train_end, valid_end = (f"count(*) - if(count(*) >= 3, {n}, 0)" for n in (2, 1))
    else:
        train_end, valid_end = (f"count(*) FILTER ({seconds} < {moment})" for moment in cut)
    connection.execute(
        f"""CREATE TABLE users AS
            SELECT row_number() OVER (ORDER BY code) - 1 AS place, code, length, train_end,
                   valid_end, (sum(length) OVER (ORDER BY code ROWS UNBOUNDED PRECEDING)
                               - length)::BIGINT AS start
            FROM (SELECT user AS code, count(*) AS length, {train_end} AS train_end,
                         {valid_end} AS valid_end
                  FROM events GROUP BY user);
            CREATE TABLE item_places AS
            SELECT row_number() OVER (ORDER BY item) - 1 AS place, item AS code
            FROM (SELECT DISTINCT item FROM events)"""
    )
    row = connection.execute(
        "SELECT (SELECT count(*) FROM item_places), count(*) FILTER (valid_end < length), "
        "count(*) FILTER (0 < train_end AND train_end < valid_end), "
        "min(length), max(length) FROM users"
    ).fetchone()
    assert row is not None
    num_items, num_tests, num_valid, *_ = row
    if num_items > MAX_ITEMS:
        raise ValueError(f"{num_items:,} items are more than {MAX_ITEMS:,}; raise min_item_events")
    if num_tests == 0:
        reason = (
            "every user has fewer than 3 events"
            if cut is None
            else f"no event is at {cut[1]} s or later"
        )
        raise ValueError(
            f"the split leaves no test target: {reason}; give more events or another split"
        )
    if num_valid == 0:
        raise ValueError(
            "the split leaves no validation target: no user has an event before and one in the "
            "validation part; give other times or fractions"
        )
    connection.execute(
        f"""CREATE TABLE sequence AS
            SELECT u.place AS user, i.place::INTEGER AS item, ({seconds})::BIGINT AS timestamp
            FROM events e JOIN users u ON e.user = u.code JOIN item_places i ON e.item = i.code
            ORDER BY u.place, time, {"tie, " if has_tie else ""}seq;
            CREATE TABLE items AS
            SELECT s.item::BIGINT AS place, count(*) AS count,
                   count(*) FILTER (s.rowid < u.start + u.train_end) AS train_count
            FROM sequence s JOIN users u ON s.user = u.place GROUP BY s.item"""
    )


def write(connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Streams the tables users, items and sequence into the dataset's three table files."""
    write_arrow(
        connection,
        "SELECT d.id AS user_id, start, length, train_end, valid_end "
        "FROM users u JOIN user_ids d ON u.code = d.code ORDER BY u.place",
        folder / "users.arrow",
    )
    write_arrow(
        connection, "SELECT item, timestamp FROM sequence ORDER BY rowid", folder / "events.arrow"
    )
    connection.execute(
        "COPY (SELECT d.id AS item_id, p.place AS index, n.count, n.train_count "
        "FROM item_places p JOIN item_ids d ON p.code = d.code JOIN items n ON n.place = p.place "
        "ORDER BY p.place) "
        f"TO {quoted(folder / 'items.parquet')} (FORMAT parquet, COMPRESSION zstd)"
    )


def write_arrow(connection: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    """Writes an uncompressed Arrow file in batches of EVENT_CHUNK_ROWS, the last one shorter."""
    rows = dataset.EVENT_CHUNK_ROWS
    reader = connection.sql(query).to_arrow_reader(min(rows, 2**20))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, reader.schema) as writer:
        for batch in _rechunked(reader, rows):
            writer.write_batch(batch)


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


def measure(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Counts, lengths, density, ties and the range of times; made of events, users and sequence."""
    marks = ", ".join(f"quantile_disc(length, {share})" for share in QUANTILES.values())
    row = connection.execute(
        f"""SELECT count(*), (SELECT count(*) FROM items), sum(length)::BIGINT, {marks},
                   count(*) FILTER (train_end < valid_end), count(*) FILTER (valid_end < length),
                   (SELECT min(timestamp) FROM sequence), (SELECT max(timestamp) FROM sequence)
            FROM users"""
    ).fetchone()
    assert row is not None
    num_users, num_items, num_events, *lengths, valid_targets, test_targets, first, last = row
    tied = connection.execute(
        """SELECT sum(tied)::BIGINT, count(*) FILTER (newest >= 2)
           FROM (SELECT sum(if(n >= 2, n, 0)) AS tied, arg_max(n, time) AS newest
                 FROM (SELECT user, time, count(*) AS n FROM events GROUP BY user, time)
                 GROUP BY user)"""
    ).fetchone()
    assert tied is not None
    spread = dict(zip(QUANTILES, lengths, strict=True))
    return {
        "users": num_users,
        "items": num_items,
        "events": num_events,
        "length": {"mean": round(num_events / num_users, 3)} | spread,
        "density": num_events / (num_users * num_items),
        "tie_share": tied[0] / num_events,
        "tie_last_two_share": tied[1] / num_users,
        "first_timestamp": first,
        "last_timestamp": last,
        "valid_targets": valid_targets,
        "test_targets": test_targets,
    }


def hash_items(path: Path) -> str:
    """SHA-256 of the own ids in index order: equal hashes mean equal item maps."""
    lengths, values = hashlib.sha256(), hashlib.sha256()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["item_id"]):
            ids = batch.column(0)
            if pa.types.is_integer(ids.type):
                values.update(np.ascontiguousarray(ids.to_numpy(), dtype="<i8").tobytes())
                continue
            raw = ids.cast(pa.large_binary())
            sizes = pc.binary_length(raw).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
            lengths.update(np.ascontiguousarray(sizes, dtype="<i8").tobytes())
            values.update(b"".join(raw.to_pylist()))
    return hashlib.sha256(lengths.digest() + values.digest()).hexdigest()


def sync(folder: Path, *, is_deep: bool = True) -> None:
    """Flushes a folder, and if `is_deep` its files, to the disk."""
    paths = [*(path for path in folder.iterdir() if is_deep and path.is_file()), folder]
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

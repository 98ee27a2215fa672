"""Whether a dataset folder keeps its specification, and the mapped files where there are none yet.

    items.parquet, sequences.parquet   by any engine: rules of specification.py, then the mapped files
    items.parquet, *.arrow, stats.json by prepare:    the same invariants of the mapped files

Every file is streamed, so that a folder larger than memory is checked too.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hstu_rec.data import dataset, specification
from hstu_rec.data.database import MEMORY_LIMIT, database
from hstu_rec.data.dataset import ITEMS, LATEST_S, MAPPED, SEQUENCES
from hstu_rec.data.events import num_targets
from hstu_rec.data.folder import (
    measure,
    write_events,
    write_stats,
    write_users,
)
from hstu_rec.data.mapped import open_arrow
from hstu_rec.data.tally import Tally
from hstu_rec.durable import sync
from hstu_rec.tracking import Stages

AGAIN = "prepare the dataset again"
USERS_COLUMNS = {name: pa.int64() for name in ("start", "length", "train_end", "valid_end")}
EVENTS_COLUMNS = {"item": pa.int32(), "timestamp": pa.int64()}
COUNTS_COLUMNS = {"train_count": pa.int64(), "by_train_count": pa.int64()}
# Counted by the input's own precision of time, of which the folder keeps the seconds.
NOT_COUNTED_AGAIN = {"tie_share", "tie_last_two_share"}


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Which folder is checked."""

    check: str
    """A dataset folder, by prepare or by another engine."""
    memory_limit: str = MEMORY_LIMIT
    """Memory DuckDB may take, such as 4GB or a share of the machine's; the rest is kept on disk."""


def check(
    path: str | Path, memory_limit: str = MEMORY_LIMIT, *, has_progress: bool = False
) -> dict[str, Any]:
    """Checks the folder and returns its statistics; makes the mapped files of one with sequences.

    These appear complete or not at all. Raises ValueError that tells all that is wrong, with the
    first file and row of each, FileNotFoundError when nothing is at `path`.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"check={path}: there is no such folder")
    has_sequences = (path / SEQUENCES).exists()
    stats = {} if has_sequences else dataset.read_stats(path)
    with (
        _work_folder(path) as work,
        database(work, memory_limit) as connection,
        Stages(3, is_shown=has_progress) as stages,
    ):
        if has_sequences:
            return _make(path, work, connection, stages)
        with stages.stage("items"):
            _refuse(path, specification.open_rows(connection, path, ITEMS))
            _refuse(path, specification.item_problems(connection, path))
            connection.execute("CREATE VIEW items AS SELECT index AS place, item_id FROM item_rows")
        with stages.stage("users"):
            users = open_arrow(path / "users.arrow")
            _refuse(path, _user_problems(path / "users.arrow", users))
            connection.register("users", users)
        with stages.stage("events"):
            _refuse(path, _mapped_problems(path, connection, users, stats))
        now = dataset.digests(path)
        if changed := [name for name in now if now[name] != stats["mapped"].get(name)]:
            _refuse(path, [f"{', '.join(changed)}: not as when stats.json was written; {AGAIN}"])
        dataset.check_fingerprint(path, stats)
    return stats


def _make(
    path: Path, work: Path, connection: duckdb.DuckDBPyConnection, stages: Stages
) -> dict[str, Any]:
    """Checks the parquet files and makes the mapped ones of them; returns the statistics."""
    began = time.perf_counter()
    with stages.stage("check"):
        problems = specification.open_rows(connection, path, ITEMS)
        _refuse(path, problems + specification.open_rows(connection, path, SEQUENCES))
        _refuse(
            path,
            specification.item_problems(connection, path)
            + specification.sequence_problems(connection, path),
        )
    with stages.stage("order, write"):
        ordered = specification.make_tables(connection, path)
        valid, test = num_targets(connection)
        if not valid or not test:
            told = f"{path / SEQUENCES}: {valid} validation and {test} test targets with a history"
            _refuse(path, [f"{told}; there must be some of each: look at train_end and valid_end"])
        write_users(connection, work)
        tally = write_events(connection, ordered, work)
    with stages.stage("measure"):
        _refuse(path, _count_problems(path, connection, tally))
        has_ends = "train_end" in specification.given(connection, path, SEQUENCES)
        stats = {
            "format_version": dataset.FORMAT_VERSION,
            **measure(connection, tally),
            "rows_read": tally.num_events,
            "dropped": {},
            "time_unit": "s",
            "split": {"kind": "given" if has_ends else "leave_one_out"},
            "files": [file.name for file in dataset.parts(path / SEQUENCES)],
            "parquet": dataset.fingerprint(path),
            "prepare_s": round(time.perf_counter() - began, 3),
        }
        stats = write_stats(stats, work)
        _publish(work, path)
    return stats


@contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """A folder within `path` that is gone when the block ends."""
    work = path / f".check-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, path: Path) -> None:
    """Moves the mapped files to their place; without stats.json a folder is no dataset yet."""
    sync(work)
    (path / "stats.json").unlink(missing_ok=True)
    sync(path, is_deep=False)
    for name in (*MAPPED, "stats.json"):
        os.rename(work / name, path / name)
    sync(path, is_deep=False)


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        told = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{path} does not keep the specification of a dataset folder:\n{told}")


def _count_problems(path: Path, connection: duckdb.DuckDBPyConnection, tally: Tally) -> list[str]:
    """Whether the counts in items.parquet, where there are some, are those of the events."""
    counted = {"count": tally.counts, "train_count": tally.train_counts}
    names = [name for name in counted if name in specification.given(connection, path, ITEMS)]
    problems: dict[str, str] = {}
    if not names:
        return []
    query = f"SELECT {', '.join(names)} FROM item_rows ORDER BY index"
    begin = 0
    for batch in connection.sql(query).to_arrow_reader(2**20):
        for name in names:
            found, wanted = batch.column(name).to_numpy(), counted[name][begin : begin + len(batch)]
            wrong = np.flatnonzero(found != wanted)
            if len(wrong) and name not in problems:
                at = wrong[0]
                problems[name] = (
                    f"{path / ITEMS}: {name} of index {begin + at:,} is {found[at]:,}, the events "
                    f"have {wanted[at]:,}; mend the column, or leave it out of a folder with {SEQUENCES}"
                )
        begin += len(batch)
    return list(problems.values())


def _schema_problems(path: Path, table: pa.Table, columns: dict[str, pa.DataType]) -> list[str]:
    found = {field.name: field.type for field in table.schema}
    return [
        f"{path}: column {name!r} is {found.get(name, 'missing')}, not {kind}; {AGAIN}"
        for name, kind in columns.items()
        if found.get(name) != kind
    ] + [
        f"{path}: column {name!r} has nulls; {AGAIN}"
        for name in table.column_names
        if table.column(name).null_count
    ]


def _first_bad(path: Path, tests: dict[str, np.ndarray], begin: int = 0) -> list[str]:
    """A sentence for each test that is true in some row."""
    return [
        f"{path}: {what}, first in row {begin + int(bad.argmax()) + 1:,}"
        f"{f' and {bad.sum() - 1:,} more' if bad.sum() > 1 else ''}; {AGAIN}"
        for what, bad in tests.items()
        if bad.any()
    ]


def _shown(values: np.ndarray, bad: np.ndarray) -> str:
    """The first five bad values."""
    return ", ".join(map(str, values[bad][:5]))


def _user_problems(path: Path, users: pa.Table) -> list[str]:
    if problems := _schema_problems(path, users, USERS_COLUMNS):
        return problems
    ids = users.column("user_id")
    if ids.type not in (pa.int64(), pa.large_string()):
        return [f"{path}: column 'user_id' is {ids.type}, not int64 or large_string; {AGAIN}"]
    if ids.num_chunks != 1:
        return [f"{path} has {ids.num_chunks} record batches, where one is wanted; {AGAIN}"]
    start, length, train_end, valid_end = (
        users.column(name).chunk(0).to_numpy() for name in USERS_COLUMNS
    )
    is_rising = pc.less(  # pyright: ignore[reportAttributeAccessIssue]
        ids.slice(0, len(ids) - 1), ids.slice(1)
    ).to_numpy()
    tests = {
        "user_id does not rise": np.append(False, ~is_rising),
        "length is below 1": length < 1,
        "start is not the sum of the lengths before": start != np.cumsum(length) - length,
        "0 <= train_end <= valid_end <= length does not hold": ~(
            (train_end >= 0) & (train_end <= valid_end) & (valid_end <= length)
        ),
    }
    return _first_bad(path, tests)


def _mapped_problems(
    path: Path, connection: duckdb.DuckDBPyConnection, users: pa.Table, stats: dict[str, Any]
) -> list[str]:
    """What is wrong with events, counts and statistics, where users and items are sound."""
    counts = open_arrow(path / "counts.arrow")
    events = open_arrow(path / "events.arrow")
    length, train_end = (users.column(name).chunk(0).to_numpy() for name in ("length", "train_end"))
    num_items = int(connection.sql("SELECT count(*) FROM items").fetchall()[0][0])
    problems = _schema_problems(path / "counts.arrow", counts, COUNTS_COLUMNS)
    problems += _schema_problems(path / "events.arrow", events, EVENTS_COLUMNS)
    if len(counts) != num_items:
        problems.append(
            f"{path}/counts.arrow has {len(counts):,} rows for {num_items:,} items; {AGAIN}"
        )
    if len(events) != length.sum():
        told = f"{path}/events.arrow has {len(events):,} rows, the users {length.sum():,} events"
        problems.append(f"{told}; {AGAIN}")
    if problems:
        return problems
    tally = Tally(num_items, length, train_end)
    problems = _event_problems(path / "events.arrow", events, tally)
    if problems:
        return problems
    problems = _count_problems(path, connection, tally)
    wanted = (tally.train_counts, dataset.by_count(tally.train_counts))
    tests = {
        f"{name} is not what the events give": counts.column(name).to_numpy() != values
        for name, values in zip(COUNTS_COLUMNS, wanted, strict=True)
    }
    problems += _first_bad(path / "counts.arrow", tests)
    for name, value in measure(connection, tally).items():
        if name not in NOT_COUNTED_AGAIN and stats.get(name) != value:
            told = f"{path}/stats.json: {name} is {stats.get(name)}, the files give {value}"
            problems.append(f"{told}; {AGAIN}")
    return problems


def _event_problems(path: Path, events: pa.Table, tally: Tally) -> list[str]:
    """What is wrong with the events, which are counted; stops at the first batch that is bad."""
    rows = dataset.EVENT_CHUNK_ROWS
    before = np.zeros(0, dtype=np.int64)  # the last time of the batch before
    for number, batch in enumerate(events.to_batches()):
        begin = tally.num_events
        if len(batch) != min(rows, len(events) - begin):
            return [f"{path}: record batch {number} has {len(batch):,} rows, not {rows:,}; {AGAIN}"]
        items, timestamps = (batch.column(name).to_numpy() for name in EVENTS_COLUMNS)
        is_no_item = (items < 0) | (items >= len(tally.counts))
        is_no_time = (timestamps < 0) | (timestamps >= LATEST_S)
        tests = {
            f"item is outside 0..{len(tally.counts) - 1} ({_shown(items, is_no_item)})": is_no_item,
            f"timestamp is negative or beyond the year 5000 ({_shown(timestamps, is_no_time)})": is_no_time,
        }
        if problems := _first_bad(path, tests, begin):
            return problems
        is_first = tally.add(items, timestamps, timestamps)
        falls = np.diff(timestamps, prepend=before if len(before) else timestamps[:1]) < 0
        if problems := _first_bad(path, {"timestamp falls": falls & ~is_first}, begin):
            return problems
        before = timestamps[-1:]
    return []

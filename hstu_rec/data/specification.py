"""The folder that any engine may write, and every rule for it (docs/own-data.md, "The folder on disk").

items.parquet       one row an item   item_id | index [| count] [| train_count] [| title]
sequences.parquet   one row a user    user_id | item_indices | timestamps [| train_end | valid_end]

Each is a file or a folder of parts. The rules are SQL over rows, so that a folder of any size is
checked in a few passes and within DuckDB's memory limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb

from hstu_rec.data.database import quoted, scalar
from hstu_rec.data.dataset import ITEMS, LATEST_S, MAX_ITEMS, SEQUENCES, parts
from hstu_rec.data.events import leave_one_out

INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
IDS = ("BIGINT", "VARCHAR")
LISTS = tuple(f"{kind}[]" for kind in INTEGERS)
TEXT = ("VARCHAR",)
MEANINGS = {
    INTEGERS: "an integer",
    TEXT: "a string",
    IDS: "int64 or string",
    LISTS: "a list of integers",
}

REQUIRED = {
    ITEMS: {"item_id": IDS, "index": INTEGERS},
    SEQUENCES: {"user_id": IDS, "item_indices": LISTS, "timestamps": LISTS},
}
OPTIONAL = {
    ITEMS: {"count": INTEGERS, "train_count": INTEGERS, "title": TEXT},
    SEQUENCES: {"train_end": INTEGERS, "valid_end": INTEGERS},
}
VIEWS = {ITEMS: "item_rows", SEQUENCES: "sequence_rows"}


@dataclass(frozen=True)
class Rule:
    """What no row may be."""

    broken: str
    """SQL that is true for a bad row; NULL is not bad."""
    what: str
    """The same in words, after "where"."""
    advice: str
    """What to do."""
    value: str = "NULL"
    """SQL of what is shown of a bad row."""


def open_rows(connection: duckdb.DuckDBPyConnection, folder: Path, name: str) -> list[str]:
    """Makes the view of a parquet file's rows (VIEWS), with the file and the row of each.

    Columns that may be left out are there as NULL. Returns what is wrong with files and types; the
    view is made only when that is nothing.
    """
    files = parts(folder / name)
    if not files:
        return [f"{folder / name} is missing, or a folder without *.parquet files; write it"]
    shapes: dict[Path, dict[str, str]] = {}
    problems = []
    for file in files:
        try:
            shapes[file] = _shape(connection, file)
        except duckdb.Error as error:
            told = str(error).splitlines()[0]
            problems.append(f"{file} cannot be read ({told}); copy or write it again")
            continue
        problems += _type_problems(name, file, shapes[file], files[0], shapes.get(files[0], {}))
    if not problems:
        columns = ", ".join(
            column if column in shapes[files[0]] else f"NULL::BIGINT AS {column}"
            for column in REQUIRED[name] | OPTIONAL[name]
        )
        connection.execute(
            f"CREATE VIEW {VIEWS[name]} AS SELECT {columns}, filename AS file, "
            f"file_row_number + 1 AS row FROM read_parquet([{', '.join(map(quoted, files))}], "
            "filename=true, file_row_number=true, hive_partitioning=false)"
        )
    return problems


def given(connection: duckdb.DuckDBPyConnection, folder: Path, name: str) -> set[str]:
    """The columns of the first part."""
    return set(_shape(connection, parts(folder / name)[0]))


def _shape(connection: duckdb.DuckDBPyConnection, file: Path) -> dict[str, str]:
    relation = f"read_parquet({quoted(file)}, hive_partitioning=false)"
    described = connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    return {name: kind for name, kind, *_ in described}


def _type_problems(
    name: str, file: Path, shape: dict[str, str], first: Path, first_shape: dict[str, str]
) -> Iterator[str]:
    for column, kinds in (REQUIRED[name] | OPTIONAL[name]).items():
        kind = shape.get(column)
        if kind is None and column in REQUIRED[name]:
            yield f"{file}: column {column!r} is missing; the file has {', '.join(shape)}"
        elif kind is not None and kind not in kinds:
            yield f"{file}: column {column!r} is {kind}; write it as {MEANINGS[kinds]}"
        elif first_shape and kind != first_shape.get(column):
            yield (
                f"{file}: column {column!r} is {kind or 'missing'} here but "
                f"{first_shape.get(column, 'missing')} in {first}; write all parts alike"
            )
    if name == SEQUENCES and ("train_end" in shape) != ("valid_end" in shape):
        yield f"{file}: train_end and valid_end belong together; write both or neither"


def item_problems(connection: duckdb.DuckDBPyConnection, folder: Path) -> list[str]:
    """What is wrong with the rows of item_rows."""
    view, path = VIEWS[ITEMS], folder / ITEMS
    num_items = scalar(connection, f"SELECT count(*) FROM {view}")
    if not 0 < num_items <= MAX_ITEMS:
        return [f"{path} has {num_items:,} rows; allowed: 1 to {MAX_ITEMS:,}"]
    last = num_items - 1
    has = given(connection, folder, ITEMS)
    rules = [
        Rule(_is_no_id("item_id"), "item_id is null or empty", "give every item its id"),
        Rule("index IS NULL", "index is null", f"number the items 0..{last}"),
        Rule(
            f"index < 0 OR index > {last}",
            f"index is outside 0..{last}",
            f"number the {num_items:,} items from 0 without a gap",
            "index",
        ),
    ]
    for column in has & {"count", "train_count"}:
        told = f"{column} is null or negative"
        test = f"{column} IS NULL OR {column} < 0"
        rules.append(Rule(test, told, "give the number of events", column))
    return [
        *_broken(connection, view, path, rules),
        *_repeated(connection, view, path, "item_id", "give every item one row"),
        *_repeated(connection, view, path, "index", f"use each of 0..{last} once"),
    ]


def sequence_problems(connection: duckdb.DuckDBPyConnection, folder: Path) -> list[str]:
    """What is wrong with the rows of sequence_rows; item_rows tells how many items there are."""
    view, path = VIEWS[SEQUENCES], folder / SEQUENCES
    if not scalar(connection, f"SELECT count(*) FROM {view}"):
        return [f"{path} has no rows; write one for each user"]
    last = scalar(connection, f"SELECT count(*) FROM {VIEWS[ITEMS]}") - 1
    has_ends = "train_end" in given(connection, folder, SEQUENCES)
    rules = _sequence_rules(last, has_ends)
    return [
        *_broken(connection, view, path, rules),
        *_repeated(connection, view, path, "user_id", "give every user one row"),
    ]


def _sequence_rules(last: int, has_ends: bool) -> list[Rule]:
    """The rules of a user's row, for items 0..last, with or without ends."""
    is_complete = "len(timestamps) = list_count(timestamps)"
    rules = [
        Rule(_is_no_id("user_id"), "user_id is null or empty", "give every user its id"),
        *(
            Rule(
                f"{column} IS NULL OR len({column}) <> list_count({column})",
                f"{column} is null or has a null in it",
                "leave such events out",
            )
            for column in ("item_indices", "timestamps")
        ),
        Rule("len(item_indices) = 0", "item_indices is empty", "leave such users out"),
        Rule(
            "len(item_indices) <> len(timestamps)",
            "item_indices and timestamps differ in length",
            "give each event both",
        ),
        Rule(
            f"list_min(item_indices) < 0 OR list_max(item_indices) > {last}",
            f"an item index is outside 0..{last}",
            f"use the indices of {ITEMS}",
            f"list_filter(item_indices, lambda i: i < 0 OR i > {last})[1]",
        ),
        Rule(
            "list_min(timestamps) < 0",
            "a timestamp is negative",
            "leave such events out",
            "list_min(timestamps)",
        ),
        Rule(
            f"list_max(timestamps) >= {LATEST_S}",
            "a timestamp is beyond the year 5000",
            "write unix seconds, not milliseconds",
            "list_max(timestamps)",
        ),
        Rule(
            f"{is_complete} AND timestamps <> list_sort(timestamps)",
            "timestamps fall",
            "sort each user's events by time",
        ),
    ]
    if has_ends:
        rules.append(
            Rule(
                "(0 <= train_end AND train_end <= valid_end AND valid_end <= len(item_indices)) "
                "IS NOT TRUE AND item_indices IS NOT NULL",
                "0 <= train_end <= valid_end <= length does not hold",
                "count the events of training, and of training and validation",
            )
        )
    return rules


def make_tables(connection: duckdb.DuckDBPyConnection, folder: Path) -> str:
    """Makes the tables users and items of rows without problems; returns the query of the events."""
    items, sequences = VIEWS[ITEMS], VIEWS[SEQUENCES]
    train_end, valid_end = "train_end::BIGINT", "valid_end::BIGINT"
    if "train_end" not in given(connection, folder, SEQUENCES):
        train_end, valid_end = leave_one_out("len(item_indices)")
    connection.execute(
        f"""CREATE TABLE items AS SELECT index::BIGINT AS place, item_id FROM {items};
            CREATE TABLE users AS
            SELECT *, (sum(length) OVER (ROWS UNBOUNDED PRECEDING) - length)::BIGINT AS start
            FROM (SELECT user_id, len(item_indices) AS length, {train_end} AS train_end,
                         {valid_end} AS valid_end FROM {sequences} ORDER BY user_id)"""
    )
    return (
        "SELECT item, timestamp, timestamp AS time FROM ("
        "SELECT unnest(item_indices)::INTEGER AS item, unnest(timestamps)::BIGINT AS timestamp "
        f"FROM (SELECT item_indices, timestamps FROM {sequences} ORDER BY user_id))"
    )


def _is_no_id(column: str) -> str:
    return f"{column} IS NULL OR {column}::VARCHAR = ''"


def _broken(
    connection: duckdb.DuckDBPyConnection, view: str, path: Path, rules: list[Rule]
) -> Iterator[str]:
    """A sentence for each rule that some row breaks, all of them in one pass."""
    tests = ", ".join(
        f"count(*) FILTER ({rule.broken}), min({{'file': file, 'row': row, "
        f"'value': ({rule.value})::VARCHAR}}, 5) FILTER ({rule.broken})"
        for rule in rules
    )
    (found,) = connection.execute(f"SELECT {tests} FROM {view}").fetchall()
    for rule, num_rows, first in zip(rules, found[::2], found[1::2], strict=True):
        if num_rows:
            values = ", ".join(one["value"] for one in first if one["value"] is not None)
            yield (
                f"{path}: {num_rows:,} {'row' if num_rows == 1 else 'rows'} where {rule.what}, "
                f"first {first[0]['file']} row {first[0]['row']:,}"
                f"{values and f': {values}'}; {rule.advice}"
            )


def _repeated(
    connection: duckdb.DuckDBPyConnection, view: str, path: Path, column: str, advice: str
) -> Iterator[str]:
    """A sentence when a value is in more rows than one."""
    ((num_values, first),) = connection.execute(
        f"""SELECT count(*), min(again) FROM (
                SELECT max({{'file': file, 'row': row, 'value': {column}::VARCHAR}}) AS again
                FROM {view} WHERE {column} IS NOT NULL GROUP BY {column} HAVING count(*) > 1)"""
    ).fetchall()
    if num_values:
        yield (
            f"{path}: {num_values:,} {'value' if num_values == 1 else 'values'} of {column} in more "
            f"rows than one, such as {first['value']} in {first['file']} row {first['row']:,}; {advice}"
        )

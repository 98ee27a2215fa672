"""Kept events into users, items and one order: numbers in place of ids, filters, split positions.

    kept   --number--> events(seq, user, item, time [, tie]), user_ids, item_ids
           --filter--> events
           --order--> users, items, and the query that gives the events user after user

Numbers rise with the own ids, so that indices do not depend on the order of rows or files.
"""

from collections.abc import Iterable, Sequence
from decimal import Decimal

import duckdb

from hstu_rec.data.clean import Cleaned
from hstu_rec.data.database import row, scalar
from hstu_rec.data.dataset import MAX_ITEMS
from hstu_rec.data.features import number_texts


def number(
    connection: duckdb.DuckDBPyConnection, cleaned: Cleaned, features: dict[str, str]
) -> tuple[int, int]:
    """Makes the table `events`, in numbers, of the view `kept`; drops what that was made of.

    features: names of their columns, by role.

    Numbers are in the order of the ids: integers by value, strings by bytes. Returns how many users and
    items there are.
    """
    for role in ("user", "item"):
        connection.execute(
            f"CREATE TABLE {role}_ids AS SELECT row_number() OVER () - 1 AS code, id "
            f"FROM (SELECT DISTINCT {role} AS id FROM kept ORDER BY id)"
        )
    tie = ", tie" if cleaned.has_tie else ""
    numbers = number_texts(connection, features).items()
    also = "".join(f", {value} AS {role}" for role, value in numbers)
    connection.execute(
        f"CREATE TABLE events AS SELECT u.code AS user, i.code AS item, time{tie}{also}, seq "
        "FROM kept k JOIN user_ids u ON k.user = u.id JOIN item_ids i ON k.item = i.id"
    )
    titled = (
        "SELECT i.code, k.title, count(*) AS num_rows FROM kept k JOIN item_ids i ON k.item = i.id "
        "WHERE k.title IS NOT NULL GROUP BY i.code, k.title"
        if cleaned.has_title
        else "SELECT 0 AS code, '' AS title, 0 AS num_rows WHERE false"
    )
    connection.execute(
        "CREATE TABLE titles AS SELECT code, count(*) AS num_titles, "
        f"arg_min(title, (-num_rows, title)) AS title FROM ({titled}) GROUP BY code"
    )
    connection.execute("DROP VIEW kept; DROP VIEW typed; DROP TABLE staged; CHECKPOINT")
    num_users, num_items = row(
        connection, "SELECT (SELECT count(*) FROM user_ids), (SELECT count(*) FROM item_ids)"
    )
    return num_users, num_items


def drop_repeats(
    connection: duckdb.DuckDBPyConnection, cleaned: Cleaned, *, of_one_second: bool = False
) -> int:
    """Keeps a user's first event on an item, or on an item in a second; the number of events dropped."""
    same = f"user, item, {cleaned.seconds}" if of_one_second else "user, item"
    by = "time, tie, seq" if cleaned.has_tie else "time, seq"
    return _keep(connection, f"QUALIFY row_number() OVER (PARTITION BY {same} ORDER BY {by}) = 1")


def drop_rare(connection: duckdb.DuckDBPyConnection, roles: Sequence[str], least: int) -> int:
    """Leaves out events whose user or item, as `roles` say, has fewer; the number dropped."""
    rare = {
        role: f"SELECT {role} FROM events GROUP BY {role} HAVING count(*) < {least}"
        for role in roles
    }
    # Most often there are none, and then nothing of the size of the events is written.
    tests = [
        f"{role} NOT IN (FROM rare_{role})"
        for role, query in rare.items()
        if scalar(connection, f"CREATE OR REPLACE TEMP TABLE rare_{role} AS {query}")
    ]
    return _keep(connection, f"WHERE {' AND '.join(tests)}") if tests else 0


def _keep(connection: duckdb.DuckDBPyConnection, condition: str) -> int:
    before = count(connection)
    connection.execute(f"CREATE TABLE fewer AS SELECT * FROM events {condition}")
    connection.execute("DROP TABLE events; ALTER TABLE fewer RENAME TO events")
    return before - count(connection)


def count(connection: duckdb.DuckDBPyConnection) -> int:
    """Rows of the table `events`."""
    return scalar(connection, "SELECT count(*) FROM events")


def cut_times(
    connection: duckdb.DuckDBPyConnection, seconds: str, valid_fraction: float, test_fraction: float
) -> tuple[int, int]:
    """(valid_time, test_time) in unix s that leave about these shares of events to each part."""
    # Decimals of few digits: 1 - (0.2 + 0.1) is a little less than 0.7.
    earlier = [
        Decimal(f"{1 - later:.9f}") for later in (valid_fraction + test_fraction, test_fraction)
    ]
    total = count(connection)
    valid_time, test_time = (
        scalar(
            connection,
            f"SELECT {seconds} AS s FROM events ORDER BY s LIMIT 1 OFFSET {int(total * share)}",
        )
        for share in earlier
    )
    return valid_time, test_time


def leave_one_out(length: str) -> tuple[str, str]:
    """SQL of train_end and valid_end: with 3 events or more, the last two are targets."""
    return f"{length} - if({length} >= 3, 2, 0)", f"{length} - if({length} >= 3, 1, 0)"


def order(
    connection: duckdb.DuckDBPyConnection,
    cleaned: Cleaned,
    cut: tuple[int, int] | None,
    features: Iterable[str] = (),
    *,
    ends: tuple[str, str] | None,
) -> str:
    """Makes the tables users and items; returns the query of the events, user after user in order.

    cut: the times at which validation and test begin, or `ends`: SQL of train_end and valid_end.
    features: roles of their columns.
    Raises ValueError when there are too many items, or no targets.
    """
    # One of the two is given.
    train_end, valid_end = ends or (
        f"count(*) FILTER ({cleaned.seconds} < {time})" for time in cut or ()
    )
    connection.execute(
        f"""CREATE TABLE users AS
            SELECT id AS user_id, length, train_end, valid_end,
                   (sum(length) OVER (ROWS UNBOUNDED PRECEDING) - length)::BIGINT AS start
            FROM (SELECT code, id, length, train_end, valid_end
                  FROM (SELECT user AS code, count(*) AS length, {train_end} AS train_end,
                               {valid_end} AS valid_end
                        FROM events GROUP BY user) JOIN user_ids USING (code)
                  ORDER BY code);
            CREATE TABLE items AS
            SELECT row_number() OVER () - 1 AS place, code, id AS item_id, title, num_titles
            FROM (SELECT code, id, title, num_titles FROM (SELECT DISTINCT item AS code FROM events)
                  JOIN item_ids USING (code) LEFT JOIN titles USING (code) ORDER BY code);
            DROP TABLE user_ids; DROP TABLE item_ids; DROP TABLE titles"""
    )
    num_items = scalar(connection, "SELECT count(*) FROM items")
    if num_items > MAX_ITEMS:
        raise ValueError(f"{num_items:,} items are more than {MAX_ITEMS:,}; raise min_item_events")
    if train_end != "count(*)":
        _check_targets(connection, cut)
    also = "".join(f", coalesce(e.{role}, 'nan')::FLOAT AS {role}" for role in features)
    return (
        f"SELECT i.place::INTEGER AS item, ({cleaned.seconds})::BIGINT AS timestamp, time{also} "
        "FROM events e JOIN items i ON e.item = i.code "
        f"ORDER BY e.user, time, {'tie, ' if cleaned.has_tie else ''}seq"
    )


def _check_targets(connection: duckdb.DuckDBPyConnection, cut: tuple[int, int] | None) -> None:
    """Raises ValueError when there are none of a kind."""
    num_valid, num_tests = num_targets(connection)
    if num_tests == 0:
        reason = (
            "every user has fewer than 3 events, or too few for the fractions"
            if cut is None
            else f"no user has an event before and one at {cut[1]} s or later"
        )
        raise ValueError(
            f"the split leaves no test target: {reason}; give more events or another split"
        )
    if num_valid == 0:
        raise ValueError(
            "the split leaves no validation target: no user has an event before and one in the "
            "validation part; give other times or fractions"
        )


def count_titles(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """How many of the table `items` have no title, and how many had several."""
    without, several = row(
        connection,
        "SELECT count(*) FILTER (title IS NULL), count(*) FILTER (num_titles > 1) FROM items",
    )
    return {"items_without": without, "items_with_several": several}


def num_targets(connection: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """Validation and test targets of the table `users` that have a history to predict them by."""
    valid, test = row(
        connection,
        "SELECT count(*) FILTER (0 < train_end AND train_end < valid_end), "
        "count(*) FILTER (0 < valid_end AND valid_end < length) FROM users",
    )
    return valid, test

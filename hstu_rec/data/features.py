"""What events carry beside item and time: prepare's feature_columns, for ranking models.

features.arrow   one row an event, in the order of events.arrow; float32 columns by name, NaN where an event
                 has none. A text is its place among the column's values, which stats.json lists, by bytes.
"""

from typing import Any

import duckdb

from hstu_rec.data.database import row, scalar

# Of texts: what is worth a row of a small table each.
MAX_VALUES = 2**16


def roles_of(names: list[str]) -> dict[str, str]:
    """The column's name by its role, which is its name in SQL."""
    return {f"feature_{place}": name for place, name in enumerate(names)}


def number_texts(connection: duckdb.DuckDBPyConnection, roles: dict[str, str]) -> dict[str, str]:
    """SQL of each role's number in the view `kept`; makes tables of the values of texts.

    Raises ValueError for a column of more than MAX_VALUES texts.
    """
    kinds = {name: kind for name, kind, *_ in connection.execute("DESCRIBE kept").fetchall()}
    found = {}
    for role, name in roles.items():
        found[role] = f"k.{role}"
        if kinds[role] != "VARCHAR":
            continue
        connection.execute(
            f"CREATE TABLE values_{role} AS SELECT row_number() OVER () - 1 AS place, value "
            f"FROM (SELECT DISTINCT {role} AS value FROM kept WHERE {role} IS NOT NULL ORDER BY value)"
        )
        count = scalar(connection, f"SELECT count(*) FROM values_{role}")
        if count > MAX_VALUES:
            raise ValueError(
                f"feature_columns: {name!r} holds {count:,} different texts, more than {MAX_VALUES:,}; give "
                "a column of numbers, or of fewer values"
            )
        found[role] = f"(SELECT place::DOUBLE FROM values_{role} WHERE value = k.{role})"
    return found


def facts_of(connection: duckdb.DuckDBPyConnection, roles: dict[str, str]) -> dict[str, Any]:
    """What stats.json tells of the features of the table `events`, by name: how many events have none; the
    values of texts; of numbers the least, the largest, mean and deviation, and whether all are whole.

    Raises ValueError for a column that no event has.
    """
    tables = {name for (name, *_) in connection.execute("SHOW TABLES").fetchall()}
    found: dict[str, Any] = {}
    for role, name in roles.items():
        num_events, num_values = row(connection, f"SELECT count(*), count({role}) FROM events")
        if not num_values:
            raise ValueError(f"feature_columns: {name!r} holds no value; leave it out")
        found[name] = {"num_missing": num_events - num_values}
        if f"values_{role}" in tables:
            values = connection.execute(f"SELECT value FROM values_{role} ORDER BY place")
            found[name] |= {"values": [value for (value,) in values.fetchall()]}
        else:
            marks = row(
                connection,
                f"SELECT min({role}), max({role}), avg({role}), stddev_pop({role}), "
                f"bool_and({role} = floor({role})) FROM events",
            )
            names = "min", "max", "mean", "deviation", "is_whole"
            found[name] |= dict(zip(names, marks, strict=True))
    return found

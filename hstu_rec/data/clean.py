"""Staged rows into typed events: what a value means, which rows are bad, and the unit of time.

    staged --types--> typed: a view, with the reason why a row is bad
           --kept--> kept(seq, user, item, time [, tie]): a view

A type is decided over all rows. `time` keeps the input's precision; `seq` is the row's place in
the input.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb

from hstu_rec.data.bad_rows import TIME_FORMS, TOO_LATE, BadRows, bad_row_counts
from hstu_rec.data.database import row, scalar
from hstu_rec.data.dataset import LATEST_S
from hstu_rec.data.sources import Staged

TimeUnit = Literal["auto", "s", "ms", "us", "ns"]

TICKS_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# Bands that do not touch: 1973 to 2286 in each unit. A value in none of them is ambiguous.
BANDS = {unit: (10**8 * ticks, 10**10 * ticks) for unit, ticks in TICKS_PER_S.items()}

INTEGER = r"(0|-?[1-9][0-9]*)"
# What programs write into a column of numbers where there is none.
NO_NUMBER = r"(?i)[-+]?(nan|n/?a|<na>|none|null|inf|infinity)"
MAX_FEATURE = 3.4e38  # of float32
NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?"


MOMENT_UNITS: dict[str, TimeUnit] = {"TIMESTAMP": "us", "TIMESTAMP_NS": "ns"}


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What the view `kept` holds."""

    rows_read: int
    """Rows of the input, malformed lines included."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    time_unit: str
    """Unit of the input's times, in words."""
    seconds: str
    """SQL of an event's unix second."""
    has_tie: bool
    """Whether there is a column `tie`."""
    has_title: bool
    """Whether there is a column `title`, NULL where an item's row has none."""


@dataclass(frozen=True, kw_only=True)
class _Column:
    """SQL of a typed column."""

    value: str
    """Expression, NULL where the staged value is no such thing."""
    kind: str
    """BIGINT, DOUBLE, VARCHAR, or TIMESTAMP and TIMESTAMP_NS: BIGINT in micro- and nanoseconds."""


@dataclass(frozen=True)
class _Bad:
    """Why a row is bad."""

    reason: str
    """In words."""
    role: str
    """The column whose values are shown."""
    test: str
    """SQL that is true for such a row."""


def clean(
    connection: duckdb.DuckDBPyConnection,
    staged: Staged,
    *,
    min_rating: float | None,
    time_unit: TimeUnit,
    bad_rows: BadRows,
) -> Cleaned:
    """Makes the view `kept` over the table `staged`.

    Raises ValueError for bad rows (unless they are dropped), for ids that are floats with
    fractions, and for times of mixed or ambiguous unit.
    """
    typed = _typed(connection, staged, bad_rows)
    # No row is bad for its title.
    tests = _bad(staged, {r: one for r, one in typed.items() if r != "title"}, time_unit)
    values = ", ".join(f"{column.value} AS {role}" for role, column in typed.items())
    reasons = " ".join(f"WHEN {one.test} THEN '{one.reason}'" for one in tests)
    raws = " ".join(f"WHEN {one.test} THEN raw_{one.role}::VARCHAR" for one in tests)
    connection.execute(
        f"CREATE VIEW typed AS SELECT seq, file, {', '.join(typed)}, "
        f"CASE {reasons} END AS reason, CASE {raws} END AS raw FROM (SELECT rowid AS seq, file, "
        f"{values}, {', '.join(f'{role} AS raw_{role}' for role in typed)} FROM staged)"
    )
    rows_read = scalar(connection, "SELECT count(*) FROM staged") + staged.num_malformed
    dropped = bad_row_counts(connection, staged, bad_rows)
    is_kept = "reason IS NULL" if sum(dropped.values()) > staged.num_malformed else "true"
    if min_rating is not None:
        is_low = f"{is_kept} AND rating < {float(min_rating)!r}"
        below = scalar(connection, f"SELECT count(*) FROM typed WHERE {is_low}")
        dropped |= {f"rating below {min_rating:g}": below} if below else {}
        is_kept += f" AND rating >= {float(min_rating)!r}"
    if not rows_read:
        raise ValueError(f"there are no rows in {_names(staged.files)}; give files with events")
    if rows_read == sum(dropped.values()):
        forms = f"; {TIME_FORMS}" if f"unreadable {staged.columns['time']}" in dropped else ""
        raise ValueError(
            f"no rows are left of {rows_read:,} in {_names(staged.files)}"
            f"{_counted(dropped)}{forms}; look at the columns given, or lower the limits"
        )
    unit = _unit(connection, staged, typed["time"].kind, time_unit, is_kept)
    kept = ", ".join(role for role in typed if role != "rating")
    connection.execute(f"CREATE VIEW kept AS SELECT seq, {kept} FROM typed WHERE {is_kept}")
    ticks = TICKS_PER_S[unit]
    is_moment = typed["time"].kind.startswith("TIMESTAMP")
    return Cleaned(
        rows_read=rows_read,
        dropped=dropped,
        time_unit=f"timestamps ({unit})" if is_moment else unit,
        seconds=f"floor(time / {ticks})::BIGINT"
        if typed["time"].kind == "DOUBLE"
        else f"time // {ticks}",
        has_tie="tie" in typed,
        has_title="title" in typed,
    )


def _typed(
    connection: duckdb.DuckDBPyConnection, staged: Staged, bad_rows: BadRows
) -> dict[str, _Column]:
    """The columns that there are, by role."""
    typed = {role: _id_column(connection, staged, role, bad_rows) for role in ("user", "item")}
    typed["time"] = _time_column(connection, staged)
    if "tie" in staged.types:
        typed["tie"] = _tie_column(connection, staged)
    if "rating" in staged.types:
        rating = f"TRY_CAST({_text(staged, 'rating')} AS DOUBLE)"
        typed["rating"] = _Column(value=rating, kind="DOUBLE")
    if "title" in staged.types:
        title = f"nullif(trim({_text(staged, 'title')}::VARCHAR), '')"
        typed["title"] = _Column(value=title, kind="VARCHAR")
    for role in (one for one in staged.types if one.startswith("feature_")):
        typed[role] = _feature_column(connection, staged, role)
    return typed


def _names(files: list[Path]) -> str:
    """Up to three file names."""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(str(path) for path in files[:3]) + more


def _counted(dropped: dict[str, int]) -> str:
    return "".join(f"; {why}: {count:,}" for why, count in dropped.items())


def _text(staged: Staged, role: str) -> str:
    """The staged value, JSON strings without their quotes."""
    if staged.types[role] != "JSON":
        return role
    return (
        f"CASE WHEN starts_with({role}, '\"') THEN json_extract_string({role}, '$') ELSE {role} END"
    )


def _profile(
    connection: duckdb.DuckDBPyConnection, staged: Staged, role: str
) -> tuple[int, int, int]:
    """How many texts a column has but for NO_NUMBER, how many are plain int64s, how many numbers."""
    value = f"nullif(trim({_text(staged, role)}), '')"
    return row(
        connection,
        f"""SELECT count(v) FILTER (NOT regexp_full_match(v, '{NO_NUMBER}')),
                   count(*) FILTER (regexp_full_match(v, '{INTEGER}')
                                    AND TRY_CAST(v AS BIGINT) IS NOT NULL),
                   count(*) FILTER (regexp_full_match(v, '{NUMBER}'))
            FROM (SELECT {value} AS v FROM staged)""",
    )


def _first_place(connection: duckdb.DuckDBPyConnection, staged: Staged, test: str) -> int:
    """The row, from 1 and within its file, of the first staged row for which `test` holds."""
    file = f"(SELECT min(file) FROM staged WHERE {test})"
    return scalar(
        connection,
        f"SELECT min(rowid) FILTER ({test}) - min(rowid) + 1 FROM staged WHERE file = {file}",
    )


def _first_file(connection: duckdb.DuckDBPyConnection, staged: Staged, test: str) -> Path:
    """The first file with a staged row for which `test` holds."""
    return staged.files[scalar(connection, f"SELECT min(file) FROM staged WHERE {test}")]


def _id_column(
    connection: duckdb.DuckDBPyConnection, staged: Staged, role: str, bad_rows: BadRows
) -> _Column:
    """A user or item id: integer if every value is one, else string; floats only if whole."""
    name, kind = staged.columns[role], staged.types[role]
    if kind.startswith("TIMESTAMP"):
        raise ValueError(
            f"{staged.files[0]}: column {name!r} ({role}_column) holds timestamps; "
            "ids are integers or strings"
        )
    if kind == "JSON":
        _refuse_odd_json(connection, staged, role)
    if kind in ("TEXT", "JSON"):
        text = f"nullif({_text(staged, role)}, '')"
        is_string = f"starts_with({role}, '\"')"
        if kind == "JSON" and scalar(connection, f"SELECT count(*) FROM staged WHERE {is_string}"):
            return _Column(value=text, kind="VARCHAR")
        count, num_integers, num_numbers = _profile(connection, staged, role)
        if num_integers == count:
            return _Column(value=f"TRY_CAST({text} AS BIGINT)", kind="BIGINT")
        # Numbers with a point or an exponent are integers that passed through a float column.
        # Plain digits beyond int64 are kept as strings.
        has_float = num_numbers == count and scalar(
            connection, f"SELECT count(*) FROM staged WHERE {text} SIMILAR TO '.*[.eE].*'"
        )
        if not has_float:
            return _Column(value=text, kind="VARCHAR")
        return _whole_floats(connection, staged, role, f"TRY_CAST({text} AS DOUBLE)", bad_rows)
    if kind in ("FLOAT", "DOUBLE"):
        return _whole_floats(connection, staged, role, role, bad_rows)
    if kind == "VARCHAR":
        return _Column(value=f"nullif({role}, '')", kind=kind)
    return _Column(value=role, kind=kind)


def _whole_floats(
    connection: duckdb.DuckDBPyConnection, staged: Staged, role: str, value: str, bad_rows: BadRows
) -> _Column:
    """Integer ids out of floats that hold them exactly; anything else is refused."""
    name = staged.columns[role]
    exact = 2**24 if staged.types[role] == "FLOAT" else 2**53
    finite = f"CASE WHEN isfinite({value}) THEN {value} END"
    inexact = f"isfinite({value}) AND ({value} <> floor({value}) OR abs({value}) > {exact})"
    advice = "write the ids as integers or strings before they pass through a float column"
    count = scalar(connection, f"SELECT count(*) FROM staged WHERE {inexact}")
    if count:
        raise ValueError(
            f"{_first_file(connection, staged, inexact)}: column {name!r} ({role}_column) is float "
            f"and {count:,} values are fractions or too large to be exact, first in row "
            f"{_first_place(connection, staged, inexact):,} {staged.place}, such as "
            f"{_examples(connection, value, inexact)}; {advice} (bad_rows=drop leaves none of these out)"
        )
    is_null = f"({finite}) IS NULL"
    num_null = scalar(connection, f"SELECT count(*) FROM staged WHERE {is_null}")
    if num_null and bad_rows == "raise":
        raise ValueError(
            f"{_first_file(connection, staged, is_null)}: column {name!r} ({role}_column) is float "
            f"because of {num_null:,} nulls, NaN or infinities, first in row "
            f"{_first_place(connection, staged, is_null):,} {staged.place}; {advice}, or leave those rows "
            "out with bad_rows=drop"
        )
    return _Column(value=f"CAST({finite} AS BIGINT)", kind="BIGINT")


def _examples(connection: duckdb.DuckDBPyConnection, value: str, test: str) -> str:
    """Up to five values of staged rows for which `test` holds."""
    rows = connection.execute(f"SELECT {value} FROM staged WHERE {test} LIMIT 5").fetchall()
    return ", ".join(f"{value}" for (value,) in rows)


def _refuse_odd_json(connection: duckdb.DuckDBPyConnection, staged: Staged, role: str) -> None:
    """Refuses JSON ids that are neither all strings nor all numbers."""
    name = staged.columns[role]
    odd = f"{role}[1] IN ('{{', '[', 't', 'f')"
    num_odd, num_strings, count = row(
        connection,
        f"SELECT count(*) FILTER ({odd}), count(*) FILTER (starts_with({role}, '\"')), "
        f"count({role}) FROM staged",
    )
    if num_odd:
        raise ValueError(
            f"{_first_file(connection, staged, odd)}: column {name!r} holds {num_odd:,} objects, "
            f"lists or booleans, such as {_examples(connection, f'{role}[:40]', odd)}; ids are "
            "integers or strings"
        )
    if 0 < num_strings < count:
        is_number = f"NOT starts_with({role}, '\"')"
        raise ValueError(
            f"{_first_file(connection, staged, is_number)}: column {name!r} mixes "
            f"{num_strings:,} strings with {count - num_strings:,} numbers; "
            "write all of them as strings"
        )


def _tie_column(connection: duckdb.DuckDBPyConnection, staged: Staged) -> _Column:
    """The value that orders events of one time: numbers as numbers, else text by bytes."""
    if staged.types["tie"] not in ("TEXT", "JSON"):
        return _Column(value="tie", kind=staged.types["tie"])
    text = f"nullif({_text(staged, 'tie')}, '')"
    count, num_integers, num_numbers = _profile(connection, staged, "tie")
    kind = "BIGINT" if num_integers == count else "DOUBLE" if num_numbers == count else "VARCHAR"
    return _Column(value=f"TRY_CAST({text} AS {kind})", kind=kind)


def _feature_column(connection: duckdb.DuckDBPyConnection, staged: Staged, role: str) -> _Column:
    """A number, or a text; NULL where there is none."""
    kind, value = staged.types[role], role
    if kind.startswith("TIMESTAMP"):
        raise ValueError(
            f"{staged.files[0]}: column {staged.columns[role]!r} (feature_columns) holds timestamps; give "
            "numbers or texts"
        )
    if kind == "VARCHAR":
        return _Column(value=f"nullif(trim({role}), '')", kind=kind)
    if kind in ("TEXT", "JSON"):
        text = f"nullif(trim({_text(staged, role)}), '')"
        count, _, num_numbers = _profile(connection, staged, role)
        if num_numbers < count or not num_numbers:
            return _Column(value=text, kind="VARCHAR")
        value = f"TRY_CAST({text} AS DOUBLE)"
    number = f"CAST({value} AS DOUBLE)"
    return _Column(value=f"CASE WHEN NOT isnan({number}) THEN {number} END", kind="DOUBLE")


def _time_column(connection: duckdb.DuckDBPyConnection, staged: Staged) -> _Column:
    """Time as a number in the input's own unit; text that is no number is an ISO date (UTC)."""
    kind, name = staged.types["time"], staged.columns["time"]
    value = "time"
    if kind == "FLOAT":
        raise ValueError(
            f"{staged.files[0]}: column {name!r} (time_column) is a 32-bit float, which rounds "
            "unix time to minutes; write it as int64"
        )
    if kind == "VARCHAR" or kind in ("TEXT", "JSON"):
        text = f"nullif(trim({_text(staged, 'time')}), '')"
        count, num_integers, num_numbers = _profile(connection, staged, "time")
        if num_numbers == 0 and count:
            # Dates begin with the year; DuckDB reads 'epoch' and 'infinity' as well.
            date = f"CASE WHEN {text}[1] BETWEEN '0' AND '9' THEN {text} END"
            return _Column(value=f"epoch_us(TRY_CAST({date} AS TIMESTAMPTZ))", kind="TIMESTAMP")
        if num_integers == num_numbers:
            # Only plain integers: TRY_CAST alone would round '1.7' and '1e3'.
            is_integer = f"regexp_full_match({text}, '{INTEGER}')"
            return _Column(
                value=f"CASE WHEN {is_integer} THEN TRY_CAST({text} AS BIGINT) END", kind="BIGINT"
            )
        kind, value = "DOUBLE", f"TRY_CAST({text} AS DOUBLE)"
    if kind == "TIMESTAMP":
        return _Column(value="epoch_us(time)", kind=kind)
    if kind == "TIMESTAMP_NS":
        return _Column(value="epoch_ns(time)", kind=kind)
    if kind == "DOUBLE":
        finite = f"CASE WHEN isfinite({value}) THEN {value} END"
        is_broken = f"{finite} <> floor({finite}) OR abs({finite}) > {2**53}"
        if scalar(connection, f"SELECT count(*) FROM staged WHERE {is_broken}"):
            return _Column(value=finite, kind="DOUBLE")
        return _Column(value=f"CAST({finite} AS BIGINT)", kind="BIGINT")
    return _Column(value=value, kind=kind)


def _bad(staged: Staged, typed: dict[str, _Column], asked: TimeUnit) -> list[_Bad]:
    """Tests over the typed and the raw columns; the first that holds is a row's reason."""
    tests: list[_Bad] = []
    if set(staged.types.values()) == {"JSON"}:
        # What DuckDB makes of a malformed line, or of an object with other keys.
        nothing = " AND ".join(f"raw_{role} IS NULL" for role in typed)
        tests.append(_Bad("nothing readable", "time", nothing))
    for role, column in typed.items():
        name = staged.columns[role].replace("'", "''")
        if role.startswith("feature_"):  # which an event need not have
            if column.kind == "DOUBLE":
                tests.append(_Bad(f"unreadable {name}", role, f"abs({role}) > {MAX_FEATURE}"))
            continue
        is_null, is_empty = f"raw_{role} IS NULL", f"trim(raw_{role}) IN ('', '\"\"')"
        is_unreadable = f"{role} IS NULL"
        if column.kind == "DOUBLE":
            is_unreadable += f" OR NOT isfinite({role})"
        if staged.types[role] == "TEXT":  # which has no nulls: an empty field is staged as one
            tests.append(_Bad(f"empty {name}", role, f"{is_null} OR {is_empty}"))
        else:
            tests.append(_Bad(f"null {name}", role, is_null))
        if staged.types[role] in ("JSON", "VARCHAR"):
            tests.append(_Bad(f"empty {name}", role, is_empty))
        tests.append(_Bad(f"unreadable {name}", role, is_unreadable))
    name = staged.columns["time"].replace("'", "''")
    tests.append(_Bad(f"negative {name}", "time", "time < 0"))
    unit = MOMENT_UNITS.get(typed["time"].kind, asked)
    if unit != "auto":
        test = f"time >= {LATEST_S * TICKS_PER_S[unit]}"
        tests.append(_Bad(f"{name} {TOO_LATE}", "time", test))
    return tests


def _unit(
    connection: duckdb.DuckDBPyConnection, staged: Staged, kind: str, asked: TimeUnit, is_kept: str
) -> str:
    """The one unit of all kept times."""
    name = staged.columns["time"]
    if kind.startswith("TIMESTAMP"):
        if asked != "auto":
            raise ValueError(
                f"time_unit={asked} has no effect: column {name!r} holds timestamps; leave it out"
            )
        return MOMENT_UNITS[kind]
    if asked != "auto":
        return asked
    cases = " ".join(
        f"WHEN time >= {low} AND time < {high} THEN '{unit}'" for unit, (low, high) in BANDS.items()
    )
    found = connection.execute(
        f"SELECT band, count(*), min(time), max(time), min(file) FROM "
        f"(SELECT time, file, CASE {cases} ELSE 'unclear' END AS band FROM typed WHERE {is_kept}) "
        "GROUP BY band ORDER BY band"
    ).fetchall()
    units = [band for band, *_ in found]
    if len(units) == 1 and units[0] != "unclear":
        return units[0]
    problem = "mixes time units" if len(units) > 1 else "has an ambiguous time unit"
    told = "; ".join(
        f"{count:,} values look like {band} ({low} to {high}, first in {staged.files[file]})"
        if band != "unclear"
        else f"{count:,} values fit no unit ({low} to {high}, first in {staged.files[file]})"
        for band, count, low, high, file in found
    )
    raise ValueError(
        f"column {name!r} {problem}: {told}; mend the values, or if all have one unit, "
        "set time_unit=s|ms|us|ns, and bad_rows=drop to leave out those beyond the year 5000 in it"
    )

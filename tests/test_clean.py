"""What values mean: ids, times and their unit, ties, and rows that are bad."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_files import (
    DAY,
    ROWS,
    SEQUENCES,
    START,
    as_csv,
    as_json,
    parquet,
    prepared,
    refusal,
    table,
    text,
)

from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare, report


def test_a_numeric_tie_column_in_text_is_ordered_by_value(tmp_path: Path) -> None:
    rows = [("u", "late", START, 10), ("u", "early", START, 9), ("u", "last", START, 11)]
    source = text(tmp_path, as_csv(rows))
    assert prepared(source, tmp_path, tie_column="row")[1] == {"u": ["early", "late", "last"]}


def test_order_uses_the_full_precision_of_the_times(tmp_path: Path) -> None:
    times = [START * 1000 + ms for ms in (30, 10, 20)]
    rows = [("u", item, ms, 0) for item, ms in zip("abc", times, strict=True)]
    stats, found = prepared(parquet(tmp_path, table(rows)), tmp_path)
    assert found == {"u": ["b", "c", "a"]}
    assert (stats["time_unit"], stats["first_timestamp"], stats["tie_share"]) == ("ms", START, 0)


def test_integer_ids_stay_int64_and_are_sorted_by_value(tmp_path: Path) -> None:
    rows = [(user, item, START + item, 0) for user in (10, 9) for item in (2, 100, 30)]
    for source in (
        parquet(tmp_path, table(rows)),
        text(tmp_path, as_csv(rows)),
        text(tmp_path, as_json(rows), "e.json"),
    ):
        output = tmp_path / f"out-{source.name}"
        prepare(PrepareConfig(), source, output)
        data = Dataset(output)
        assert data.item_ids.type == data.user_ids.type == pa.int64()
        assert data.item_ids.to_pylist() == [2, 30, 100]
        assert data.user_ids.to_pylist() == [9, 10]


def test_ids_with_leading_zeros_or_beyond_int64_stay_strings(tmp_path: Path) -> None:
    for first in ("007", "99999999999999999999"):
        rows = [("1", item, START, 0) for item in (first, "8", "9")]
        assert prepared(text(tmp_path, as_csv(rows)), tmp_path)[1] == {1: [first, "8", "9"]}
    rows = [("u", item, START, 0) for item in ("1", "2", "3")]
    assert prepared(text(tmp_path, as_json(rows), "e.json"), tmp_path)[1] == {"u": ["1", "2", "3"]}


def test_whole_float_ids_become_the_integers_they_hold(tmp_path: Path) -> None:
    rows = [(1.0, float(item), START, 0) for item in (3, 1, 2)]
    assert prepared(parquet(tmp_path, table(rows)), tmp_path)[1] == {1: [3, 1, 2]}
    assert prepared(text(tmp_path, as_csv(rows)), tmp_path)[1] == {1: [3, 1, 2]}


def test_minimum_rating_drops_and_counts(tmp_path: Path) -> None:
    rows = [("u", item, START, 0) for item in "abcde"]
    source = parquet(tmp_path, table(rows, rating=[5.0, 3.0, 4.0, 1.0, 4.0]))
    stats, found = prepared(source, tmp_path, min_rating=4)
    assert found == {"u": ["a", "c", "e"]}
    assert stats["dropped"] == {"rating below 4": 2}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.fault("R19")
def test_units_of_integer_times_are_found(tmp_path: Path, unit: str) -> None:
    ticks = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    rows = [(user, item, when * ticks, row) for user, item, when, row in ROWS]
    stats, found = prepared(parquet(tmp_path, table(rows)), tmp_path)
    assert found == SEQUENCES
    assert (stats["time_unit"], stats["last_timestamp"]) == (unit, START + 11 * DAY)


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.fault("R19")
def test_timestamp_columns_become_unix_seconds(tmp_path: Path, unit: Any, zone: str | None) -> None:
    ticks = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    times = pa.array([row[2] * ticks for row in ROWS]).cast(pa.timestamp(unit, zone))
    stats, found = prepared(parquet(tmp_path, table(timestamp=times)), tmp_path)
    assert found == SEQUENCES
    assert stats["first_timestamp"] == START


@pytest.mark.fault("R19")
def test_text_times_are_iso_dates_or_float_seconds(tmp_path: Path) -> None:
    for first, second in (
        ("2011-03-13T07:06:40Z", "2011-03-13 09:06:41+02:00"),
        ("1300000000.25", "1300000001.75"),
    ):
        rows = [("u", "b", second, 0), ("u", "a", first, 1), ("u", "c", second, 2)]
        for source in (text(tmp_path, as_csv(rows)), text(tmp_path, as_json(rows), "e.json")):
            stats, found = prepared(source, tmp_path)
            assert found == {"u": ["a", "b", "c"]}
            assert (stats["first_timestamp"], stats["last_timestamp"]) == (START, START + 1)


@pytest.mark.fault("R19")
def test_small_times_need_a_unit(tmp_path: Path) -> None:
    rows = [("u", item, place, 0) for place, item in enumerate("abc")]
    source = parquet(tmp_path, table(rows))
    message = refusal(source, tmp_path)
    assert "column 'timestamp' has an ambiguous time unit: 3 values fit no unit (0 to 2" in message
    assert str(source) in message and "time_unit=s" in message
    stats, found = prepared(source, tmp_path, time_unit="s")
    assert found == {"u": ["a", "b", "c"]} and stats["last_timestamp"] == 2


@pytest.mark.fault("R19")
def test_mixed_units_are_refused_with_counts(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    parquet(parts, table(), "a.parquet")
    parquet(parts, table([(u, i, t * 1000, r) for u, i, t, r in ROWS[:4]]), "b.parquet")
    message = refusal(parts, tmp_path)
    assert "mixes time units: 4 values look like ms" in message
    assert f"first in {parts / 'b.parquet'}" in message and "10 values look like s" in message


@pytest.mark.fault("R19")
def test_a_wrong_unit_or_one_without_effect_is_refused(tmp_path: Path) -> None:
    rows = [(user, item, when * 10**6, row) for user, item, when, row in ROWS]
    assert "beyond the year 5000" in refusal(
        parquet(tmp_path, table(rows)), tmp_path, time_unit="s"
    )
    times = pa.array([row[2] for row in ROWS]).cast(pa.timestamp("s"))
    source = parquet(tmp_path, table(timestamp=times))
    assert "time_unit=ms has no effect" in refusal(source, tmp_path, time_unit="ms")


BAD = [
    *ROWS,
    (None, "fig", START, 10),
    ("u1", None, START, 11),
    ("u1", "fig", None, 12),
    ("u1", "fig", -5, 13),
]


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
@pytest.mark.fault("R16")
def test_bad_rows_are_an_error_or_dropped_with_counts(tmp_path: Path, kind: str) -> None:
    written = [tuple("" if value is None else value for value in row) for row in BAD]
    source = {
        "parquet": lambda: parquet(tmp_path, table(BAD)),
        "csv": lambda: text(tmp_path, as_csv(written)),
        "json": lambda: text(tmp_path, as_json(BAD), "e.json"),
    }[kind]()
    message = refusal(source, tmp_path)
    null = "empty" if kind == "csv" else "null"  # which CSV does not have
    for part in (
        f"1 row with {null} user_id",
        f"{null} item_id",
        f"{null} timestamp",
        "negative timestamp",
    ):
        assert part in message
    assert str(source) in message and "bad_rows=drop" in message
    stats, found = prepared(source, tmp_path, bad_rows="drop")
    assert found == SEQUENCES
    reasons = ("negative timestamp", f"{null} item_id", f"{null} timestamp", f"{null} user_id")
    assert stats["dropped"] == dict.fromkeys(reasons, 1)
    assert stats["rows_read"] == stats["events"] + 4


def test_empty_strings_are_bad_rows(tmp_path: Path) -> None:
    for source in (
        parquet(tmp_path, table([*ROWS, ("", "x", START, 0)])),
        text(tmp_path, as_json([*ROWS, ("", "x", START, 0)]), "e.json"),
    ):
        assert "1 row with empty user_id" in refusal(source, tmp_path)


def test_unreadable_times_and_ratings_are_bad_rows(tmp_path: Path) -> None:
    source = text(tmp_path, as_csv([*ROWS, ("u1", "fig", "soon", 1), ("u1", "fig", "13.5e", 1)]))
    assert "2 rows with unreadable timestamp" in refusal(source, tmp_path)
    assert prepared(source, tmp_path, bad_rows="drop")[0]["dropped"] == {"unreadable timestamp": 2}
    rated = "user_id,item_id,timestamp,rating\n" + "".join(
        f"u,{i},{START},{r}\n" for i, r in zip("abcde", ("5", "x", "", "4", "nan"), strict=True)
    )
    message = refusal(text(tmp_path, rated), tmp_path, min_rating=1)
    assert "1 row with empty rating" in message and "2 rows with unreadable rating" in message


@pytest.mark.fault("R16")
def test_nan_times_are_bad_rows(tmp_path: Path) -> None:
    times = [float(row[2]) for row in ROWS[:-1]] + [math.nan]
    source = parquet(tmp_path, table(timestamp=times))
    assert "1 row with unreadable timestamp" in refusal(source, tmp_path)
    assert "32-bit float" in refusal(
        parquet(tmp_path, table(timestamp=pa.array(times, pa.float32()))), tmp_path
    )


def test_null_tie_is_a_bad_row(tmp_path: Path) -> None:
    source = parquet(tmp_path, table([*ROWS, ("u1", "fig", START, None)]))
    assert "1 row with null row" in refusal(source, tmp_path, tie_column="row")
    assert prepared(source, tmp_path)[0]["events"] == len(ROWS) + 1


@pytest.mark.parametrize("write", ["parquet", "csv"])
@pytest.mark.fault("R16")
def test_integer_ids_that_became_floats_are_refused(tmp_path: Path, write: str) -> None:
    def source(values: list[Any]) -> Path:
        rows = [(1, value, START, 0) for value in values]
        if write == "parquet":
            return parquet(tmp_path, table(rows, item_id=pa.array(values, pa.float64())))
        return text(tmp_path, as_csv([tuple("" if v is None else v for v in row) for row in rows]))

    message = refusal(source([1.0, 2.0, 3.0, None]), tmp_path)
    assert "'item_id' (item_column) is float because of 1 nulls" in message
    assert prepared(source([1.0, 2.0, 3.0, None]), tmp_path, bad_rows="drop")[1] == {1: [1, 2, 3]}
    for broken in (1.5, 2.0**60):
        message = refusal(source([1.0, broken, 3.0]), tmp_path, bad_rows="drop")
        assert "is float and 1 values are fractions or too large to be exact" in message


@pytest.mark.fault("R16")
def test_columns_of_no_use_as_ids_are_refused(tmp_path: Path) -> None:
    lists = parquet(tmp_path, table(item_id=[[n] for n in range(10)]))
    assert "'item_id' has type INTEGER[]" in refusal(lists, tmp_path).replace(
        "BIGINT[]", "INTEGER[]"
    )
    times = parquet(tmp_path, table(item_id=pa.array([START] * 10).cast(pa.timestamp("s"))))
    assert "holds timestamps" in refusal(times, tmp_path)
    mixed = text(tmp_path, as_json([*ROWS, ("u1", 5, START, 10)]), "e.json")
    assert "mixes 10 strings with 1 numbers" in refusal(mixed, tmp_path)
    odd = text(tmp_path, as_json([*ROWS, ("u1", ["fig"], START, 10)]), "e.json")
    assert "holds 1 objects, lists or booleans" in refusal(odd, tmp_path)
    twice = text(tmp_path, as_csv().replace("row", "item_id", 1))
    assert "names column 'item_id' twice" in refusal(twice, tmp_path)


def test_no_rows_left_says_why(tmp_path: Path) -> None:
    source = parquet(tmp_path, table(rating=[1.0] * 10))
    assert "no rows are left of 10" in refusal(source, tmp_path, min_rating=5)
    assert "rating below 5: 10" in refusal(source, tmp_path, min_rating=5)
    message = refusal(source, tmp_path, min_user_events=50)
    assert "no rows are left of 10; user with fewer than 50 events: 10; lower" in message
    assert "there are no rows in" in refusal(text(tmp_path, as_csv([])), tmp_path)
    assert "no rows are left" in refusal(source, tmp_path, kcore=9)


def test_the_row_of_the_first_bad_value_is_told_within_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    good, bad = table(), table().to_pydict()
    bad["item_id"][6] = None
    pq.write_table(good, folder / "a.parquet")
    pq.write_table(pa.table(bad), folder / "b.parquet")
    message = refusal(folder, tmp_path)
    assert "b.parquet: 1 row with null item_id, first in row 7 of this file" in message


def test_rows_of_a_file_without_a_header_are_counted_in_the_file(tmp_path: Path) -> None:
    lines = [f"{user},{item},5.0,{when}\n" for user, item, when, _ in ROWS]
    lines[3] = "u9,fig,5.0,soon\n"
    source = text(tmp_path, "".join(lines))
    assert "first in row 4 of this file: soon" in refusal(source, tmp_path, preset="amazon2014")
    source = text(tmp_path, "".join(["user_id,item_id,rating,timestamp\n", *lines]))
    assert "first in row 4 after the header: soon" in refusal(source, tmp_path)


@pytest.mark.parametrize(
    ("rows", "options", "remarks"),
    [
        (ROWS, {}, []),
        (
            [(u, i, t / 86_400 + 25_569, r) for u, i, t, r in ROWS],
            {"time_unit": "s"},
            ["before 1975"],
        ),
        (
            [("u1", *row[1:]) for row in ROWS],
            {},
            ["one user alone, from which nothing can be learnt"],
        ),
        (
            [("u1", "fig", *row[2:]) for row in ROWS],
            {},
            ["one user alone", "one item alone, from which nothing can be learnt"],
        ),
    ],
)
def test_the_report_remarks_what_can_teach_nothing_or_is_no_time(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], remarks: list[str]
) -> None:
    stats, _ = prepared(text(tmp_path, as_csv(rows)), tmp_path, **options)
    found = [line for line in report(stats).splitlines() if line.startswith("remark ")]
    assert len(found) == len(remarks)
    assert all(part in line for part, line in zip(remarks, found, strict=True))

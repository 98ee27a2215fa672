"""Malformed values, times and users: refused in a sentence, or left out and counted."""

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_rec.data.check import check
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare, report
from hstu_rec.data.stream import DataConfig, TrainStream
from tests.event_files import (
    ROWS,
    SEQUENCES,
    START,
    as_csv,
    parquet,
    prepared,
    refusal,
    table,
    text,
)
from tests.folders import portable

few, many = settings(max_examples=10), settings(max_examples=150)


GOOD_TIMES = st.integers(START, START + 50)
INTEGERS = st.integers(0, 5)
VALUES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "integers": {"id": INTEGERS | st.none(), "time": GOOD_TIMES | st.none() | st.integers(-9, -1)},
    "floats": {
        "id": INTEGERS.map(float) | st.sampled_from([None, math.nan, math.inf, -math.inf]),
        "time": GOOD_TIMES.map(float) | st.sampled_from([None, math.nan, math.inf, -7.0]),
    },
    "strings": {
        "id": st.sampled_from(["a", "b", "ç d", "nan", " x"]) | st.sampled_from([None, "", "  "]),
        "time": GOOD_TIMES.map(str) | st.sampled_from([None, "", " ", "soon", "-4", "NaN"]),
    },
    "text": {
        "id": INTEGERS.map(str) | st.sampled_from(["", "nan", "NULL", " "]),
        "time": GOOD_TIMES.map(str) | st.sampled_from(["", "null", "soon", "-4", "2011-02-31"]),
    },
}
ARROW = {"integers": pa.int64(), "floats": pa.float64(), "strings": pa.string()}


def fault_of_id(kind: str, value: Any) -> str:
    """'null', 'empty', 'unreadable' or nothing, by plain Python."""
    if value is None:
        return "null"
    if isinstance(value, str) and not value.strip():
        return "empty"
    if isinstance(value, float) and not math.isfinite(value):
        return "unreadable"
    return "unreadable" if kind == "text" and not str(value).isdigit() else ""


def fault_of(kind: str, user: Any, item: Any, time: Any) -> str:
    """The reason why a row is dropped, the first that holds, or nothing."""
    for name, value in (("user_id", user), ("item_id", item)):
        if why := fault_of_id(kind, value):
            return f"{why} {name}"
    if time is None:
        return "null timestamp"
    if isinstance(time, str) and not time.strip():
        return "empty timestamp"
    try:
        number = float(time)
    except ValueError:
        return "unreadable timestamp"
    if not math.isfinite(number):
        return "unreadable timestamp"
    return "negative timestamp" if number < 0 else ""


def events_of(kind: str) -> st.SearchStrategy[list[tuple[Any, Any, Any]]]:
    ids, times = VALUES[kind]["id"], VALUES[kind]["time"]
    return st.lists(st.tuples(ids, ids, times), max_size=40)


@pytest.mark.fault("R16")
@pytest.mark.parametrize("kind", list(VALUES))
@few
@given(data=st.data())
def test_rows_kept_and_rows_dropped_are_all_rows(kind: str, data: st.DataObject) -> None:
    hold_the_account(kind, data.draw(events_of(kind)))


@pytest.mark.slow
@pytest.mark.fault("R16")
@pytest.mark.parametrize("kind", list(VALUES))
@many
@given(data=st.data())
def test_rows_kept_and_rows_dropped_are_all_rows_of_many_tables(
    kind: str, data: st.DataObject
) -> None:
    hold_the_account(kind, data.draw(events_of(kind)))


def hold_the_account(kind: str, rows: list[tuple[Any, Any, Any]]) -> None:
    """Prepares the rows, and compares what is kept and dropped with plain Python."""
    sure = {"integers": 1, "floats": 1.0, "strings": "a", "text": "1"}[kind]
    is_text = kind in ("strings", "text")
    rows += [(sure, sure, str(START) if is_text else START)] * 3  # a user with targets
    faults = Counter(why for row in rows if (why := fault_of(kind, *row)))
    kept = [row for row in rows if not fault_of(kind, *row)]
    wanted: dict[Any, list[Any]] = {}
    for user, item, _ in sorted(kept, key=lambda row: float(row[2])):  # stable
        own = (user, item) if kind == "strings" else (int(user), int(item))
        wanted.setdefault(own[0], []).append(own[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "text":
            source = text(folder, as_csv([(*row, 0) for row in rows]))
        else:
            columns = zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True)
            arrays = {
                one: pa.array(values, ARROW[kind], from_pandas=False) for one, values in columns
            }
            source = parquet(folder, pa.table(arrays))
        if faults:
            told = refusal(source, folder)
            assert str(source) in told and "bad_rows=drop" in told
        stats, found = prepared(source, folder, bad_rows="drop", min_user_events=1)
    assert stats["dropped"] == dict(faults)
    assert stats["rows_read"] == len(rows) == stats["events"] + sum(faults.values())
    assert found == wanted
    assert all(f"{why} {count}" in report(stats) for why, count in faults.items())


@pytest.mark.fault("R16")
def test_a_refusal_tells_the_count_the_place_and_five_of_the_values(tmp_path: Path) -> None:
    words = [(f"u{n}", "fig", f"when{n}", n) for n in range(7)]
    source = text(tmp_path, as_csv([*ROWS, *words]))
    assert (
        f"{source}: 7 rows with unreadable timestamp, first in row 11 after the header: "
        "when0, when1, when2, when3, when4; mend the rows (times are unix time in s, ms, us or ns, or ISO "
        "dates such as 2024-12-31 or 2024-12-31T08:00:00Z), or leave them out with bad_rows=drop"
    ) in refusal(source, tmp_path)
    nulls = [(None, "fig", START, n) for n in range(7)]
    source = parquet(tmp_path, table([*ROWS, *nulls]))
    told = refusal(source, tmp_path)
    assert "7 rows with null user_id, first in row 11 of this file (11, 12, 13, 14, 15)" in told
    halves = parquet(tmp_path, table(item_id=[n + 0.5 for n in range(10)]))
    told = refusal(halves, tmp_path)
    assert (
        "exact, first in row 1 of this file, such as 0.5, 1.5, 2.5, 3.5, 4.5; write the ids" in told
    )
    assert "bad_rows=drop leaves none of these out" in told
    folder = tmp_path / "parts"
    folder.mkdir()
    whole = [float(n) for n in range(10)]
    parquet(folder, table(item_id=whole), "a.parquet")
    for value in (1.5, math.nan):
        second = parquet(folder, table(item_id=[*whole[:6], value, *whole[:3]]), "b.parquet")
        told = refusal(folder, tmp_path)
        assert told.startswith(f"{second}: ") and "first in row 7 of this file" in told


@pytest.mark.fault("R16")
def test_a_word_for_no_number_among_numbers_is_no_id(tmp_path: Path) -> None:
    rows = [(1, item, START, 0) for item in ("3", "nan", "2", "<NA>", "1")]
    source = text(tmp_path, as_csv(rows))
    assert "2 rows with unreadable item_id, first in row 2 after the header: nan, <NA>" in refusal(
        source, tmp_path
    )
    stats, found = prepared(source, tmp_path, bad_rows="drop")
    assert found == {1: [3, 2, 1]} and stats["dropped"] == {"unreadable item_id": 2}
    rows = [("u", item, START, 0) for item in ("nan", "x", "y")]
    assert prepared(text(tmp_path, as_csv(rows)), tmp_path)[1] == {"u": ["nan", "x", "y"]}


MOMENT = "2011-03-13T07:06:40"  # START


@pytest.mark.fault("R19")
@pytest.mark.parametrize(
    "written",
    [
        *(MOMENT, MOMENT.replace("T", " "), f"{MOMENT}Z", f"{MOMENT}+00:00", f"{MOMENT}.000001"),
        *(
            "2011-03-13T09:06:40+02:00",
            "2011-03-13 02:36:40-0430",
            "2011-03-13 16:06:40 Asia/Tokyo",
        ),
    ],
)
def test_dates_in_words_are_made_utc(tmp_path: Path, written: str) -> None:
    rows = [("u", item, written, 0) for item in "abc"]
    stats, found = prepared(text(tmp_path, as_csv(rows)), tmp_path)
    assert found == {"u": ["a", "b", "c"]} and stats["first_timestamp"] == START
    assert "read in timestamps (us)" in report(stats)


@pytest.mark.fault("R19")
@pytest.mark.parametrize(
    "written", ["03/13/2011", "13.03.2011", "Sun, 13 Mar 2011", "epoch", "now"]
)
def test_dates_of_other_forms_are_shown_not_guessed(tmp_path: Path, written: str) -> None:
    rows = [*((u, i, MOMENT, r) for u, i, _, r in ROWS), ("u1", "fig", written, 10)]
    source = parquet(tmp_path, table(rows))
    told = refusal(source, tmp_path)
    assert f"1 row with unreadable timestamp, first in row 11 of this file: {written}" in told
    assert "ISO dates such as 2024-12-31 or 2024-12-31T08:00:00Z" in told
    alone = parquet(tmp_path, table([("u1", item, written, 0) for item in "abc"]))
    assert "times are unix time in s, ms, us or ns, or ISO dates" in refusal(
        alone, tmp_path, bad_rows="drop"
    )


@pytest.mark.fault("R19")
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_before_1970_and_after_the_year_5000_are_refused_or_dropped(
    tmp_path: Path, unit: Any
) -> None:
    ticks = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    late = 10**11 * ticks if unit != "ns" else 2**63 - 1  # ns end in 2262
    rows = [(u, i, t * ticks, r) for u, i, t, r in ROWS]
    rows += [("u1", "fig", -1 * ticks, 10), ("u1", "fig", late, 11)]
    source = parquet(tmp_path, table(rows))
    asked = {"time_unit": unit, "bad_rows": "drop"}
    wanted = {"negative timestamp": 1}
    if unit != "ns":
        wanted["timestamp beyond the year 5000"] = 1
        assert "or look at time_unit" in refusal(source, tmp_path, time_unit=unit)
    stats, found = prepared(source, tmp_path, **asked)
    assert stats["dropped"] == wanted
    assert (stats["time_unit"], stats["first_timestamp"]) == (unit, START)
    if unit != "ns":
        assert found == SEQUENCES
        times = pa.array([row[2] for row in rows]).cast(pa.timestamp(unit))
        assert "1 row with timestamp beyond the year 5000" in refusal(
            parquet(tmp_path, table(rows, timestamp=times)), tmp_path
        )


@pytest.mark.fault("R19")
def test_a_value_of_another_unit_names_the_way_out(tmp_path: Path) -> None:
    source = parquet(tmp_path, table([*ROWS, ("u1", "fig", START * 1000, 10)]))
    told = refusal(source, tmp_path)
    assert "mixes time units: 1 values look like ms" in told and "time_unit=s|ms|us|ns" in told
    stats, found = prepared(source, tmp_path, time_unit="s", bad_rows="drop")
    assert found == SEQUENCES and stats["dropped"] == {"timestamp beyond the year 5000": 1}


@pytest.mark.fault("R20")
def test_short_users_are_left_out_and_long_ones_cut_to_their_newest_events(tmp_path: Path) -> None:
    lengths = {1: 1, 2: 2, 3: 3, 4: 100_000}
    users = np.repeat(list(lengths), list(lengths.values()))
    random = np.random.default_rng(20)
    events = {
        "user_id": users,
        "item_id": random.integers(0, 1000, len(users)),
        "timestamp": START + np.arange(len(users)),
    }
    order = random.permutation(len(users))
    source = parquet(tmp_path, pa.table(events).take(pa.array(order)))
    stats = prepare(PrepareConfig(), source, tmp_path / "out")
    data = Dataset(tmp_path / "out")
    assert data.user_ids.to_pylist() == [3, 4] and data.lengths.tolist() == [3, 100_000]
    assert stats["dropped"] == {"user with fewer than 3 events": 3}
    assert "users    2 of 4\n" in report(stats) and "max 100000" in report(stats)
    batch = TrainStream(data, DataConfig(path=str(tmp_path)), 50, seed=1).batch(0, 0)
    own = np.array(data.item_ids.to_pylist())
    newest = events["item_id"][-2 - 51 : -2]  # two are targets
    assert own[batch.item_ids.numpy()].tolist() == newest[:-1].tolist()
    assert own[batch.target_ids.numpy()].tolist() == newest[1:].tolist()


@pytest.mark.fault("R20")
def test_a_user_without_events_is_refused_in_a_folder_of_another_engine(tmp_path: Path) -> None:
    rows = {"user_id": [1, 2], "item_indices": [[0, 1, 2], []], "timestamps": [[1, 2, 3], []]}
    with pytest.raises(
        ValueError, match=r"1 row where item_indices is empty.*leave such users out"
    ):
        check(portable(tmp_path / "d", sequences=rows))

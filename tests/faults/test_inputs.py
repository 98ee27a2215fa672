"""Malformed tables, ids and times: refused in a sentence, or left out and counted, never trained on."""

import hashlib
import itertools
import math
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.check import check
from hstu_rec.data.dataset import MAPPED, Dataset
from hstu_rec.data.mapped import arrow_writer, open_arrow
from hstu_rec.data.prepare import PrepareConfig, prepare, report
from hstu_rec.data.stream import DataConfig, TrainStream
from hstu_rec.item_table import check_ids
from hstu_rec.learner import Learner
from hstu_rec.pipeline import Place
from tests.bad_files import BAD_FILES, without_rights
from tests.datasets import write_dataset
from tests.event_files import (
    ROWS,
    SEQUENCES,
    START,
    as_csv,
    parquet,
    prepare_app,
    prepared,
    refusal,
    table,
    text,
)
from tests.faults.tries import Tries
from tests.folders import portable

# Folders are made within the tests.
few, many = settings(max_examples=10), settings(max_examples=150)


# R15: ids


@pytest.mark.fault("R15")
@given(
    st.integers(1, 2**40),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12), max_size=30),
)
def test_ids_outside_the_table_are_counted_and_shown(num_items: int, ids: list[int]) -> None:
    bad = [one for one in ids if not 0 <= one < num_items]
    if not bad:
        check_ids(torch.tensor(ids, dtype=torch.int64), num_items)
        return
    with pytest.raises(ValueError) as caught:
        check_ids(torch.tensor(ids, dtype=torch.int64), num_items)
    assert f"{len(bad)} item ids are outside the catalogue 0..{num_items - 1}" in str(caught.value)
    assert f"for example {bad[:5]};" in str(caught.value)


@pytest.mark.fault("R15")
@few
@given(
    st.lists(
        st.lists(st.integers(-2, 4) | st.integers(2**31 - 2, 2**33), min_size=3, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_indices_of_another_engine_are_counted_and_shown(users: list[list[int]]) -> None:
    bad = [user for user in users if not all(0 <= one <= 2 for one in user)]
    rows = {
        "user_id": list(range(len(users))),
        "item_indices": users,
        "timestamps": [list(range(len(user))) for user in users],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = portable(Path(folder) / "d", sequences=rows)
        if not bad:
            assert check(path)["events"] == sum(map(len, users))
            return
        with pytest.raises(ValueError) as caught:
            check(path)
    shown = [str(next(one for one in user if not 0 <= one <= 2)) for user in bad[:5]]
    rows_of = "1 row where" if len(bad) == 1 else f"{len(bad)} rows where"
    assert f"{rows_of} an item index is outside 0..2, first" in str(caught.value)
    assert f": {', '.join(shown)}; use the indices of items.parquet" in str(caught.value)


def changed(path: Path, name: str, column: str, rows: list[int], value: int) -> None:
    """Writes `value` into a mapped file, as one does by hand."""
    content = open_arrow(path / name)
    columns = {one: content.column(one).to_pylist() for one in content.column_names}
    for row in rows:
        columns[column][row] = value
    (path / name).unlink()
    with arrow_writer(path / name, content.schema) as writer:
        writer.write_table(pa.table(columns, schema=content.schema))


USERS = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2], [1, 1, 2, 3, 4]]


@pytest.mark.fault("R15")
@pytest.mark.parametrize("value", [-1, 6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("row", [0, 4, 5])  # trained on, validation target, test target
def test_a_mapped_id_changed_by_hand_stops_whatever_reads_it(
    tmp_path: Path, row: int, value: int
) -> None:
    write_dataset(tmp_path / "d", USERS)
    changed(tmp_path / "d", "events.arrow", "item", [row], value)
    data = Dataset(tmp_path / "d")
    users = np.arange(3)
    with pytest.raises(ValueError) as caught:
        data.gather(users, np.zeros_like(users), data.lengths)
    assert (
        f"events.arrow has been changed: 1 of 15 values of item are outside 0..5, such as [{value}]"
        in str(caught.value)
    )
    assert f"python apps/prepare.py check={tmp_path / 'd'}" in str(caught.value)
    data.gather(users[1:], np.zeros_like(users[1:]), data.lengths[1:])  # the others are sound


@pytest.mark.fault("R15")
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("start", -5), ("start", 2**40), ("length", -1), ("length", 10**6)),
        *(("train_end", -3), ("train_end", 10**6), ("valid_end", 10**6), ("valid_end", -1)),
    ],
)
def test_users_changed_by_hand_are_refused_when_opened(
    tmp_path: Path, column: str, value: int
) -> None:
    write_dataset(tmp_path / "d", USERS)
    for user in range(3):
        shutil.copytree(tmp_path / "d", tmp_path / f"{user}")
        changed(tmp_path / f"{user}", "users.arrow", column, [user], value)
        with pytest.raises(
            ValueError, match=r"users\.arrow has been changed: \d rows are wrong, such as \["
        ):
            Dataset(tmp_path / f"{user}")


@pytest.mark.fault("R15")
def test_counts_changed_by_hand_draw_no_negative_outside_the_catalogue(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", USERS)
    changed(tmp_path / "d", "counts.arrow", "by_train_count", [4, 5], 99)
    settings = [f"data.path={tmp_path / 'd'}", "encoder.dim=8", "loss.negatives=frequency"]
    with distributed.process_group("cpu"):
        learner = Learner(load(RunConfig, settings), Dataset(tmp_path / "d"), torch.device("cpu"))
        with pytest.raises(
            ValueError, match=r"1 item ids are outside the catalogue 0\.\.5.*\[99\]"
        ):
            learner.step(0, 0, 0)


# R16: every row is kept, or dropped for a reason

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
    """'null', 'unreadable' or nothing, by plain Python."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "unreadable"
    return "unreadable" if kind == "text" and not value.isdigit() else ""


def fault_of(kind: str, user: Any, item: Any, time: Any) -> str:
    """The reason why a row is dropped, the first that holds, or nothing."""
    for name, value in (("user_id", user), ("item_id", item)):
        if why := fault_of_id(kind, value):
            return f"{why} {name}"
    if time is None or (isinstance(time, str) and not time.strip()):
        return "null timestamp"
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
        f"{source}: 7 rows with unreadable timestamp, first in row 11 of this file: "
        "when0, when1, when2, when3, when4; mend the rows, or leave them out with bad_rows=drop"
    ) in refusal(source, tmp_path)
    nulls = [(None, "fig", START, n) for n in range(7)]
    source = parquet(tmp_path, table([*ROWS, *nulls]))
    told = refusal(source, tmp_path)
    assert "7 rows with null user_id, first in row 11 of this file (11, 12, 13, 14, 15)" in told
    halves = parquet(tmp_path, table(item_id=[n + 0.5 for n in range(10)]))
    assert "exact, such as 0.5, 1.5, 2.5, 3.5, 4.5; write the ids" in refusal(halves, tmp_path)


@pytest.mark.fault("R16")
def test_a_word_for_no_number_among_numbers_is_no_id(tmp_path: Path) -> None:
    rows = [(1, item, START, 0) for item in ("3", "nan", "2", "<NA>", "1")]
    source = text(tmp_path, as_csv(rows))
    assert "2 rows with unreadable item_id, first in row 2 of this file: nan, <NA>" in refusal(
        source, tmp_path
    )
    stats, found = prepared(source, tmp_path, bad_rows="drop")
    assert found == {1: [3, 2, 1]} and stats["dropped"] == {"unreadable item_id": 2}
    rows = [("u", item, START, 0) for item in ("nan", "x", "y")]
    assert prepared(text(tmp_path, as_csv(rows)), tmp_path)[1] == {"u": ["nan", "x", "y"]}


# R17 and R18: order


def folder_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for name in ("items.parquet", *MAPPED):
        digest.update((path / name).read_bytes())
    return digest.hexdigest()


@pytest.mark.fault("R17")
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_and_files_in_any_order_give_the_same_folder_byte_for_byte(
    tmp_path: Path, kind: str, tries: Tries
) -> None:
    random = np.random.default_rng(17)
    rows = [
        (f"u{user}", f"é{item}", START + int(place), 0)
        for place, (user, item) in enumerate(random.integers(0, 40, (600, 2)))
    ]
    hashes = []
    for number in range(5):
        source, output = tmp_path / f"in{number}", tmp_path / f"out{number}"
        source.mkdir()
        order = random.permutation(len(rows)) if number else np.arange(len(rows))
        for place, part in enumerate(np.array_split(order, number + 1)):
            own = [rows[row] for row in part]
            name = f"{random.integers(10**6):06d}-{place}.{kind}"
            parquet(source, table(own), name) if kind == "parquet" else text(
                source, as_csv(own), name
            )
        prepare(PrepareConfig(), source, output)
        hashes.append(folder_hash(output))
        tries.count(hashes[-1] == hashes[0])


@pytest.mark.fault("R18")
@few
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("dbca"), st.integers(0, 3)), max_size=40),
    st.integers(1, 3),
)
def test_equal_times_keep_the_order_of_rows_and_files_never_of_ids(
    rows: list[tuple[int, str, int]], num_files: int
) -> None:
    rows = [*rows, (0, "d", 0), (0, "c", 0), (0, "a", 0)]
    wanted: dict[int, list[tuple[int, str]]] = {}
    for user, item, time in rows:
        wanted.setdefault(user, []).append((time, item))
    for own in wanted.values():
        own.sort(key=lambda event: event[0])  # stable
    num_tied = sum(
        [time for time, _ in own].count(event[0]) > 1 for own in wanted.values() for event in own
    )
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in"
        source.mkdir()
        for place, part in enumerate(np.array_split(np.arange(len(rows)), num_files)):
            own_rows = [(u, i, START + t, 0) for u, i, t in (rows[row] for row in part)]
            text(source, as_csv(own_rows), f"{place}.csv")
        stats, found = prepared(source, Path(name), min_user_events=1)
    assert found == {user: [item for _, item in own] for user, own in wanted.items()}
    assert stats["tie_share"] == num_tied / len(rows)
    assert f"ties     {num_tied / len(rows):.1%} of events" in report(stats)


# R19: times

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


# R20: users of few and of very many events


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


# R25: batches


def step_hash(made: Any) -> str:
    """Of all that a step is given."""
    batch, drawn = made.batch, made.negatives
    tensors = [batch.item_ids, batch.target_ids, batch.timestamps, batch.offsets, drawn.ids]
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in tensors)).hexdigest()


@pytest.mark.fault("R25")
def test_inputs_made_ahead_in_a_thread_or_not_at_all_are_the_same(
    tmp_path: Path, tries: Tries
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    random = np.random.default_rng(25)
    users = [random.integers(0, 30, length).tolist() for length in random.integers(4, 12, 40)]
    write_dataset(tmp_path / "d", users, num_items=30)
    options = [f"data.path={tmp_path / 'd'}", "encoder.dim=8", "data.batch_users=9"]
    places = [Place(epoch, step, 5 * epoch + step) for epoch in range(2) for step in range(5)]
    found: dict[str, list[str]] = {}
    with distributed.process_group("cpu"):
        for way in ("not at all", "ahead", "in a thread"):
            data = Dataset(tmp_path / "d")
            inputs = Learner(load(RunConfig, options), data, torch.device("cpu")).inputs
            if way == "in a thread":
                inputs._thread = ThreadPoolExecutor(1)
            hashes = []
            for place in places:
                made, _ = inputs.take(place)
                hashes.append(step_hash(made))
                if way != "not at all":
                    inputs.send_ahead(place.later(1))
                    inputs.make_ahead(place.later(2))
            found[way] = hashes
    assert len(set(found["not at all"])) == len(places)
    for hashes in found.values():
        for one, wanted in zip(hashes, found["not at all"], strict=True):
            tries.count(one == wanted)


@pytest.mark.fault("R25")
@pytest.mark.parametrize("alpha", [0.0, 1.6])
def test_the_global_batch_is_the_same_for_any_number_of_processes(
    tmp_path: Path, alpha: float, monkeypatch: pytest.MonkeyPatch, tries: Tries
) -> None:
    random = np.random.default_rng(26)
    users = [random.integers(0, 99, length).tolist() for length in random.integers(4, 60, 50)]
    data = write_dataset(tmp_path / "d", users, num_items=99)
    config = DataConfig(path=str(tmp_path), batch_users=13, length_alpha=alpha)

    def histories(epoch: int, step: int, ranks: int) -> list[tuple[bytes, bytes]]:
        parts = []
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            batch = TrainStream(data, config, 40, seed=3).batch(epoch, step)
            ends = batch.offsets.tolist()
            for begin, end in itertools.pairwise(ends):
                own = batch.item_ids[begin:end], batch.target_ids[begin:end]
                parts.append((own[0].numpy().tobytes(), own[1].numpy().tobytes()))
        return sorted(parts)

    for epoch, step in ((0, 0), (0, 3), (1, 1)):
        wanted = histories(epoch, step, 1)
        for ranks in (2, 3, 4, 7):
            tries.count(histories(epoch, step, ranks) == wanted)


# R30: files


@pytest.mark.fault("R30")
def test_every_bad_file_is_refused_by_name_and_leaves_nothing(tmp_path: Path, tries: Tries) -> None:
    wrong = {}
    for number, (fault, bad) in enumerate(BAD_FILES.items()):
        folder = tmp_path / f"{number}"
        (folder / "in").mkdir(parents=True)
        told = refusal(bad.write(folder / "in"), folder)
        has_held = bad.told in told and bad.named in told and str(folder) in told
        tries.count(has_held)
        if not has_held:
            wrong[fault] = told
    assert not wrong


@pytest.mark.fault("R30")
def test_types_that_differ_without_a_loss_are_one(tmp_path: Path, tries: Tries) -> None:
    items = list(range(10))
    pairs: dict[str, tuple[Any, Any]] = {
        "int32, int64": (pa.array(items, pa.int32()), pa.array(items)),
        "uint64, int8": (pa.array(items, pa.uint64()), pa.array(items, pa.int8())),
        "dictionary, string": (
            pa.array(map(str, items)).dictionary_encode(),
            pa.array(map(str, items), pa.large_string()),
        ),
        "decimal, int64": (pa.array(items).cast(pa.decimal128(20, 0)), pa.array(items)),
    }
    for number, (first, second) in enumerate(pairs.values()):
        source = tmp_path / f"{number}"
        source.mkdir()
        parquet(source, table(item_id=first), "a.parquet")
        parquet(source, table(item_id=second), "b.parquet")
        stats, found = prepared(source, tmp_path)
        tries.count(stats["events"] == 20 and len(found["u1"]) == 8)


@pytest.mark.fault("R30")
def test_other_files_a_loop_of_folders_and_partitions_change_nothing(tmp_path: Path) -> None:
    wanted = prepared(parquet(tmp_path, table()), tmp_path)[1]
    part = tmp_path / "in" / "user_id=7"
    part.mkdir(parents=True)
    (part / "again").symlink_to(part, target_is_directory=True)
    (part / "readme.md").write_text("events")
    (part / "_SUCCESS").touch()
    parquet(part, table())
    for source in (part, tmp_path / "in" / "**" / "*.parquet"):
        stats, found = prepared(source, tmp_path)
        assert found == wanted and stats["rows_read"] == len(ROWS)


@pytest.mark.fault("R30")
def test_a_file_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        source = parquet(folder, table())
        source.chmod(0)
        with without_rights():
            told = refusal(source, folder)
    assert f"{source}: cannot be read: " in told and "ermission denied" in told


@pytest.mark.fault("R30")
def test_a_file_that_vanishes_while_others_are_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu_rec.data import sources

    parquet(tmp_path, table(), "a.parquet")
    last = parquet(tmp_path, table(), "b.parquet")
    check_types = sources._same_types

    def meanwhile(*given: Any) -> None:
        last.unlink(missing_ok=True)
        check_types(*given)

    monkeypatch.setattr(sources, "_same_types", meanwhile)
    with pytest.raises(FileNotFoundError, match=r"b\.parquet was there and is gone"):
        prepare(PrepareConfig(), tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.fault("R30")
def test_the_app_ends_with_a_sentence_where_no_folder_can_be(tmp_path: Path) -> None:
    source = parquet(tmp_path, table())
    done = prepare_app(source, source / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "no file, folder or glob match at ''" in refusal("", tmp_path)

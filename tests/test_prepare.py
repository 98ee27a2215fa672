"""prepare: filters, splits, the folder that it leaves, and the app."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
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
    prepare_app,
    prepared,
    refusal,
    sequences,
    table,
    text,
)

from hstu_rec.data import dataset
from hstu_rec.data import prepare as prepare_module
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare, report

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.fault("R18")
def test_ties_follow_the_rows_of_the_input(tmp_path: Path) -> None:
    tied = [("u", item, START, 0) for item in ("c", "a", "d", "b")]
    assert prepared(parquet(tmp_path, table(tied)), tmp_path)[1] == {"u": ["c", "a", "d", "b"]}


@pytest.mark.fault("R17")
def test_shuffled_rows_give_the_same_sequences_when_a_tie_column_orders_them(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)
    for name, write in (("e.csv", as_csv), ("e.json", as_json)):
        for _ in range(3):
            rows = [ROWS[place] for place in random.permutation(len(ROWS))]
            assert (
                prepared(text(tmp_path, write(rows), name), tmp_path, tie_column="row")[1]
                == SEQUENCES
            )


@pytest.mark.fault("R18")
def test_share_of_ties_is_counted_over_events_and_over_last_two(tmp_path: Path) -> None:
    stats, _ = prepared(parquet(tmp_path, table()), tmp_path)
    assert stats["tie_share"] == 4 / 10
    assert stats["tie_last_two_share"] == 1 / 3


def test_statistics_are_those_of_the_rows(tmp_path: Path) -> None:
    source = parquet(tmp_path, table())
    output = tmp_path / "out"
    stats = prepare(PrepareConfig(), source, output)
    assert json.loads((output / "stats.json").read_text()) == stats
    assert (stats["users"], stats["items"], stats["events"]) == (3, 4, 10)
    assert stats["density"] == 10 / 12
    assert stats["duplicates"] == 0
    assert (stats["length"]["min"], stats["length"]["median"], stats["length"]["max"]) == (3, 3, 4)
    assert (stats["first_timestamp"], stats["last_timestamp"]) == (START, START + 11 * DAY)
    printed = report(stats)
    for part in (
        "users    3",
        "items    4",
        "events   10 of 10",
        "ties     40.0%",
        "dropped  none",
    ):
        assert part in printed
    items = pq.read_table(output / "items.parquet").to_pydict()
    assert items["item_id"] == ["apple", "fig", "kiwi", "pear"]
    assert items["index"] == [0, 1, 2, 3]
    assert items["count"] == [2, 3, 3, 2]
    assert items["train_count"] == [1, 3, 0, 0]


def test_drop_repeats_keeps_the_first_event_on_an_item(tmp_path: Path) -> None:
    rows = [("u", item, START + n, 0) for n, item in enumerate("abacba")]
    stats, found = prepared(parquet(tmp_path, table(rows)), tmp_path, drop_repeats=True)
    assert found == {"u": ["a", "b", "c"]}
    assert stats["dropped"] == {"repeated item": 3}


@pytest.mark.parametrize("ticks", [1, 1000])
def test_rows_written_twice_are_counted_and_left_out_on_request(tmp_path: Path, ticks: int) -> None:
    random = np.random.default_rng(5)
    drawn = random.integers((0, 0, 0), (9, 6, 8 * ticks), (200, 3)).tolist()
    rows = [(f"u{u}", f"i{i}", START * ticks + t, 0) for u, i, t in drawn]
    rows += [rows[place] for place in random.permutation(200)]
    first = {}  # by time, then as the rows lie
    for row in sorted(rows, key=lambda row: row[2]):
        first.setdefault((*row[:2], row[2] // ticks), row)
    kept = {user: [r[1] for r in first.values() if r[0] == user] for user, *_ in rows}
    stats, _ = prepared(source := parquet(tmp_path, table(rows)), tmp_path)
    assert stats["duplicates"] == 400 - len(first) >= 200
    assert f"\nrepeated {400 - len(first)} rows" in report(stats)
    stats, found = prepared(source, tmp_path, drop_duplicates=True)
    assert found == kept and "repeated" not in report(stats)
    assert stats["dropped"] == {"duplicate row": 400 - len(first)}


def test_minimum_events_of_items_is_applied_before_that_of_users(tmp_path: Path) -> None:
    rows = [("u", item, START + n, 0) for n, item in enumerate("aabbb")]
    rows += [("v", item, START + n, 0) for n, item in enumerate("abx")]
    stats, found = prepared(parquet(tmp_path, table(rows)), tmp_path, min_item_events=2)
    assert found == {"u": list("aabbb")}
    assert stats["dropped"] == {
        "item with fewer than 2 events": 1,
        "user with fewer than 3 events": 2,
    }


@pytest.mark.fault("R20")
def test_users_too_short_for_targets_are_training_only(tmp_path: Path) -> None:
    rows = [("a", "x", START, 0), ("b", "x", START, 0), ("b", "y", START, 0)]
    rows += [("c", item, START, 0) for item in "xyz"]
    output = tmp_path / "out"
    stats = prepare(PrepareConfig(min_user_events=1), parquet(tmp_path, table(rows)), output)
    data = Dataset(output)
    assert data.lengths.tolist() == [1, 2, 3]
    assert data.train_ends.tolist() == [1, 2, 1]
    assert data.valid_ends.tolist() == [1, 2, 2]
    assert (stats["valid_targets"], stats["test_targets"]) == (1, 1)


def test_kcore_repeats_until_nothing_falls_out(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    rows = [
        (f"u{u}", f"i{i}", START + n, 0)
        for n, (u, i) in enumerate(random.integers(0, 30, (120, 2)))
    ]
    kept = rows
    while True:
        users, items = [row[0] for row in kept], [row[1] for row in kept]
        fewer = [r for r in kept if users.count(r[0]) >= 3 and items.count(r[1]) >= 3]
        if len(fewer) == len(kept):
            break
        kept = fewer
    stats, found = prepared(parquet(tmp_path, table(rows)), tmp_path, kcore=3, min_user_events=1)
    assert 0 < len(kept) < len(rows)
    assert found == {
        user: [r[1] for r in kept if r[0] == user] for user in sorted({r[0] for r in kept})
    }
    assert stats["dropped"] == {"outside the 3-core": len(rows) - len(kept)}


def test_leave_one_out_holds_back_the_last_two_events(tmp_path: Path) -> None:
    output = tmp_path / "out"
    prepare(PrepareConfig(), parquet(tmp_path, table()), output)
    data = Dataset(output)
    assert data.starts.tolist() == [0, 4, 7]
    assert data.train_ends.tolist() == [2, 1, 1]
    assert data.valid_ends.tolist() == [3, 2, 2]


@pytest.mark.parametrize(
    ("valid", "test"),
    [
        (str(START + DAY), str(START + 5 * DAY)),
        ("2011-03-14T07:06:40", "2011-03-18T07:06:40+00:00"),
        ("2011-03-14 07:06:40", "2011-03-18 09:06:40+02:00"),
    ],
)
def test_time_split_cuts_before_the_given_times(tmp_path: Path, valid: str, test: str) -> None:
    output = tmp_path / "out"
    config = PrepareConfig(split="time", valid_time=valid, test_time=test)
    stats = prepare(config, parquet(tmp_path, table()), output)
    data = Dataset(output)
    assert stats["split"] == {
        "kind": "time",
        "valid_time": START + DAY,
        "test_time": START + 5 * DAY,
    }
    assert data.train_ends.tolist() == [1, 1, 0]
    assert data.valid_ends.tolist() == [4, 1, 0]
    assert (stats["valid_targets"], stats["test_targets"]) == (1, 2)
    assert data.train_counts.tolist() == [0, 2, 0, 0]


def test_time_split_by_fractions_cuts_that_share_of_events(tmp_path: Path) -> None:
    rows = [(f"u{n % 5}", f"i{n % 7}", START + n * 10, 0) for n in range(100)]
    output = tmp_path / "out"
    config = PrepareConfig(split="time", valid_fraction=0.2, test_fraction=0.1)
    prepare(config, parquet(tmp_path, table(rows)), output)
    data = Dataset(output)
    assert (data.train_ends.sum(), data.valid_ends.sum(), data.lengths.sum()) == (70, 90, 100)


def test_split_without_test_targets_is_refused(tmp_path: Path) -> None:
    rows = [("a", "x", START, 0), ("b", "y", START, 0)]
    source = parquet(tmp_path, table(rows))
    assert "every user has fewer than 3 events" in refusal(source, tmp_path, min_user_events=1)
    times = {"valid_time": "2031-01-01", "test_time": "2032-01-01"}
    assert "no user has an event before and one at" in refusal(
        source, tmp_path, min_user_events=1, split="time", **times
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kcore": -1}, "kcore must be at least 0; got -1"),
        ({"min_user_events": 0}, "min_user_events must be at least 1; got 0"),
        ({"min_item_events": 0}, "min_item_events must be at least 1; got 0"),
        ({"drop_repeats": True, "drop_duplicates": True}, "drop_duplicates has no effect beside"),
        ({"rating_column": "stars"}, "rating_column has no effect without min_rating"),
        ({"valid_fraction": 0.6, "test_fraction": 0.5}, "must leave events to train on"),
        ({"test_fraction": 0.0}, "test_fraction must be in (0, 1); got 0.0"),
        ({"split": "time", "valid_time": "5"}, "valid_time and test_time belong together"),
        ({"valid_time": "5", "test_time": "6"}, "have no effect without split=time"),
        ({"split": "time", "valid_time": "6", "test_time": "5"}, "must be earlier than"),
        (
            {"split": "time", "valid_time": "May", "test_time": "5"},
            "neither unix seconds nor an ISO date",
        ),
        ({"tie_column": "timestamp"}, "must differ; got user_id, item_id, timestamp, timestamp"),
        (
            {"memory_limit": "lots"},
            "memory_limit must be a size such as 4GB, or a share such as 50%; got 'lots'",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(parquet(tmp_path, table()), tmp_path, **options)


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    source, output = parquet(tmp_path, table()), tmp_path / "out"
    prepare(PrepareConfig(), source, output)
    with pytest.raises(
        ValueError, match="already there; choose another folder or set overwrite=true"
    ):
        prepare(PrepareConfig(), source, output)
    prepare(PrepareConfig(overwrite=True, min_user_events=4), source, output)
    assert sequences(output) == {"u1": SEQUENCES["u1"]}
    with pytest.raises(ValueError, match="no rows are left"):
        prepare(PrepareConfig(overwrite=True, min_user_events=40), source, output)
    assert sequences(output) == {"u1": SEQUENCES["u1"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.parquet", "out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is no dataset, so overwrite=true does not remove it"):
        prepare(PrepareConfig(overwrite=True), source, precious)
    assert (precious / "thesis.txt").exists()


def test_a_failure_while_writing_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(tmp_path, table())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for function in ("write_events", "sync", "measure"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(prepare_module, function, full)
            prepare(PrepareConfig(), source, tmp_path / "out")
        assert list(tmp_path.iterdir()) == [source]


def test_the_folder_appears_only_when_all_files_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    synced: list[str] = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        assert output.exists() == (synced[-1] == tmp_path.name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    prepare(PrepareConfig(), parquet(tmp_path, table()), output)
    assert set(dataset.FILES) < set(synced)
    assert sorted(path.name for path in output.iterdir()) == sorted(dataset.FILES)


def test_a_folder_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = parquet(tmp_path, table()), tmp_path / "out"
    measure = prepare_module.measure

    def interfere(*given: Any) -> dict[str, Any]:
        output.mkdir()
        (output / "other").touch()
        return measure(*given)

    monkeypatch.setattr(prepare_module, "measure", interfere)
    with pytest.raises(ValueError, match="appeared while this ran"):
        prepare(PrepareConfig(), source, output)
    assert [path.name for path in output.iterdir()] == ["other"]


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_events_are_chunked_exactly_and_gathered_as_by_a_slow_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(dataset, "EVENT_CHUNK_ROWS", rows)
    random = np.random.default_rng(rows)
    events = [
        (int(user), int(item), START + int(when), place)
        for place, (user, item, when) in enumerate(random.integers(0, 25, (200, 3)))
    ]
    output = tmp_path / "out"
    prepare(
        PrepareConfig(tie_column="row", min_user_events=1), parquet(tmp_path, table(events)), output
    )
    with pa.OSFile(str(output / "events.arrow")) as file:
        reader = pa.ipc.open_file(file)
        sizes = [reader.get_batch(place).num_rows for place in range(reader.num_record_batches)]
    assert sizes == [rows] * (200 // rows) + ([200 % rows] if 200 % rows else [])
    data = Dataset(output)
    own = data.item_ids.to_pylist()
    users = random.integers(0, data.num_users, 40)
    begins = random.integers(0, data.lengths[users] + 1)
    ends = random.integers(begins, data.lengths[users] + 1)
    items, timestamps, offsets = data.gather(users, begins, ends)
    wanted: list[tuple[int, int]] = []
    wanted_offsets = [0]
    for user, begin, end in zip(users, begins, ends, strict=True):
        mine = [e for e in events if e[0] == data.user_ids[user].as_py()]
        mine.sort(key=lambda event: (event[2], event[3]))
        wanted += [(event[1], event[2]) for event in mine[begin:end]]
        wanted_offsets.append(len(wanted))
    assert offsets.tolist() == wanted_offsets
    assert [(own[i], t) for i, t in zip(items, timestamps, strict=True)] == wanted
    assert items.dtype == timestamps.dtype == offsets.dtype == np.int64


def test_item_map_hash_depends_on_the_ids_alone(tmp_path: Path) -> None:
    def hashed(items: list[Any], times: int = START) -> str:
        rows = [("u", item, times, 0) for item in items]
        return prepared(parquet(tmp_path, table(rows)), tmp_path)[0]["item_map_hash"]

    assert hashed(["a", "b", "c"]) == hashed(["c", "a", "b", "a"], START + 5)
    assert (
        len(
            {
                hashed(["a", "b", "c"]),
                hashed(["ab", "c", "d"]),
                hashed(["a", "bc", "d"]),
                hashed([1, 2, 3]),
            }
        )
        == 4
    )


def test_a_small_memory_limit_spills_and_gives_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    count = 1_000_000
    names = pa.array([f"name-{number:09d}" for number in range(100_000)])
    columns = {
        "user_id": names.take(pa.array(random.integers(0, 50_000, count))),
        "item_id": names.take(pa.array(random.integers(0, 100_000, count))),
        "timestamp": START + random.integers(0, 10**8, count),
    }
    source = parquet(tmp_path, pa.table(columns))
    large, small = tmp_path / "large", tmp_path / "small"
    prepare(PrepareConfig(), source, large)
    prepare(PrepareConfig(memory_limit="60MB"), source, small)
    for name in dataset.MAPPED:
        assert (large / name).read_bytes() == (small / name).read_bytes()
    assert "memory_limit=5MB is too small for this input; raise it" in refusal(
        source, tmp_path, memory_limit="5MB"
    )


def test_counts_and_users_are_views_of_the_mapped_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    prepare(PrepareConfig(), parquet(tmp_path, table()), output)
    monkeypatch.setattr(pq, "read_table", None)  # items.parquet is not read for them
    data = Dataset(output)
    assert data.train_counts.tolist() == [1, 3, 0, 0]
    assert data.items_by_count.tolist() == [2, 3, 0, 1]
    mapped = [data.train_counts, data.items_by_count]
    mapped += [data.starts, data.lengths, data.train_ends, data.valid_ends]
    for values in mapped:
        assert values.dtype == np.int64 and not values.flags.owndata and not values.flags.writeable


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not there")
@pytest.mark.parametrize(
    ("name", "counts", "last_two"),
    [
        ("amazon2014_beauty_5core", (22_363, 12_101, 198_502), 0.435),
        ("ml100k", (943, 1_682, 100_000), 0.440),
    ],
)
def test_real_data_has_the_published_counts_and_order(
    tmp_path: Path, name: str, counts: tuple[int, ...], last_two: float
) -> None:
    source = SHARED / f"{name}.parquet"
    stats = prepare(PrepareConfig(tie_column="row"), source, tmp_path / "out")
    assert (stats["users"], stats["items"], stats["events"]) == counts
    assert stats["tie_last_two_share"] == pytest.approx(last_two, abs=5e-4)
    events = pq.read_table(source, columns=["user_id", "item_id", "timestamp", "row"])
    order = [(key, "ascending") for key in ("user_id", "timestamp", "row")]
    wanted: dict[Any, list[Any]] = {}
    for row in events.sort_by(order).to_pylist():
        wanted.setdefault(row["user_id"], []).append(row["item_id"])
    assert sequences(tmp_path / "out") == wanted


def test_the_app_prepares_and_prints_the_statistics(tmp_path: Path) -> None:
    source = text(tmp_path, as_csv(), "events.csv.gz")
    done = prepare_app(source, tmp_path / "out", "tie_column=row", "min_user_events=4")
    assert done.returncode == 0
    told = [line.rsplit(maxsplit=2)[0] for line in done.stderr.splitlines()]
    assert told == ["read", "clean", "number ids", "filter", "split", "order, write", "measure"]
    assert "users    1 of 3\n" in done.stdout
    assert "dropped  user with fewer than 4 events 6\n" in done.stdout
    assert sequences(tmp_path / "out") == {"u1": SEQUENCES["u1"]}


def test_the_app_tells_errors_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    source = parquet(tmp_path, table())
    for arguments, sentence in (
        ((), "give INPUT and OUT"),
        ((source, "kcore=5"), "give INPUT and OUT"),
        ((tmp_path / "nothing.csv", tmp_path / "out"), "no file, folder or glob match"),
        ((source, tmp_path / "out", "item_column=item"), "nearest: 'item_id'"),
        ((source, tmp_path / "out", "k_core=5"), "kcore"),
    ):
        done = prepare_app(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()

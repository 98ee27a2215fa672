"""check: folders of another engine, every rule of the specification, and folders of prepare."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_files import START, parquet, prepare_app
from folders import ITEMS, SEQUENCES, grouped, in_parts, portable

from hstu_rec.data import dataset
from hstu_rec.data.check import check
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.mapped import arrow_writer, open_arrow
from hstu_rec.data.prepare import PrepareConfig, prepare, report

TIME = {"timestamp": pa.int64()}
ENDS = {"train_end": [1, 1, 2], "valid_end": [2, 2, 2]}


def some_events(num_events: int = 3000, num_users: int = 200) -> pa.Table:
    random = np.random.default_rng(4)
    users = random.integers(0, num_users, num_events)
    items = np.minimum(random.geometric(0.02, num_events), 300)
    return pa.table(
        {
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"é{item}" for item in items],
            "timestamp": START + random.integers(0, 500, num_events),
        }
    )


def refused(path: Path) -> str:
    """What `check` says about a bad folder; nothing in it may have changed."""
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="does not keep the specification") as caught:
        check(path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    return str(caught.value)


@pytest.mark.parametrize("chunk_rows", [7, 64, dataset.EVENT_CHUNK_ROWS])
@pytest.mark.fault("R17")
def test_parts_in_any_order_give_the_files_that_prepare_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    monkeypatch.setattr(dataset, "EVENT_CHUNK_ROWS", chunk_rows)
    events = some_events()
    wanted, path = tmp_path / "wanted", tmp_path / "spark"
    stats = prepare(PrepareConfig(min_user_events=1), parquet(tmp_path, events), wanted)
    items, sequences = grouped(events)
    random = np.random.default_rng(0)
    in_parts(path / "items.parquet", items, random.permutation(len(items)).tolist(), 3)
    in_parts(path / "sequences.parquet", sequences, random.permutation(len(sequences)).tolist(), 5)
    found = check(path)
    for name in dataset.MAPPED:
        assert (path / name).read_bytes() == (wanted / name).read_bytes()
    kept = set(found) - {"files", "parquet", "prepare_s"}
    assert {name: found[name] for name in kept} == {name: stats[name] for name in kept}
    assert report(found).splitlines()[:-1] == report(stats).splitlines()[:-1]
    assert Dataset(path).item_ids.to_pylist() == Dataset(wanted).item_ids.to_pylist()
    assert check(path) | {"prepare_s": 0} == found | {"prepare_s": 0}  # again, from the same


def test_own_indices_and_own_ends_are_kept(tmp_path: Path) -> None:
    path = portable(tmp_path / "d", sequences=SEQUENCES | ENDS)
    check(path)
    data = Dataset(path)
    assert data.item_ids.to_pylist() == ["c", "a", "b"]
    assert data.user_ids.to_pylist() == ["u1", "u2", "u3"]
    users = np.arange(3)
    items, timestamps, offsets = data.gather(users, np.zeros(3, dtype=np.int64), data.lengths)
    assert items.tolist() == [2, 2, 0, 0, 1, 2, 1, 1, 0]
    assert timestamps.tolist() == [5, 6, 7, 10, 20, 20, 30, 8, 9]
    assert offsets.tolist() == [0, 3, 7, 9]
    assert data.train_ends.tolist() == [1, 1, 2] and data.valid_ends.tolist() == [2, 2, 2]
    assert data.train_counts.tolist() == [2, 1, 1]
    assert data.items_by_count.tolist() == [1, 2, 0]
    assert data.stats["split"] == {"kind": "given"}
    assert (data.stats["tie_share"], data.stats["tie_last_two_share"]) == (2 / 9, 0)


def test_without_ends_users_of_three_events_hold_back_their_last_two(tmp_path: Path) -> None:
    path = portable(tmp_path / "d")
    assert check(path)["split"] == {"kind": "leave_one_out"}
    data = Dataset(path)
    assert data.train_ends.tolist() == [1, 2, 2] and data.valid_ends.tolist() == [2, 3, 2]


def test_training_names_the_command_for_a_folder_of_parquet_alone(tmp_path: Path) -> None:
    path = portable(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match=f"python apps/prepare.py check={path}"):
        Dataset(path)


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("item_id", ["a", None, "b"], "1 row where item_id is null or empty, first FILE row 2"),
        ("item_id", ["a", "b", ""], "1 row where item_id is null or empty, first FILE row 3"),
        ("item_id", ["a", "b", "a"], "1 value of item_id in more rows than one, such as a in FILE"),
        ("item_id", [1.0, 2.0, 3.0], "column 'item_id' is DOUBLE; write it as int64 or string"),
        ("index", [0, None, 1], "index is null, first FILE row 2; number the items 0..2"),
        ("index", [1, 2, 3], "index is outside 0..2, first FILE row 3"),
        ("index", [0, -1, 1], "index is outside 0..2, first FILE row 2"),
        ("index", [0, 2, 2], "1 value of index in more rows than one, such as 2 in FILE row 3"),
        ("index", ["0", "1", "2"], "column 'index' is VARCHAR; write it as an integer"),
        ("index", None, "column 'index' is missing; the file has item_id"),
        ("count", [3, None, 2], "count is null or negative, first FILE row 2"),
        ("count", [3, 4, 2], "count of index 1 is 4, the events have 3; mend the column"),
        ("train_count", [1, 1, 4], "train_count of index 0 is 1, the events have 2"),
    ],
)
def test_every_rule_for_items(tmp_path: Path, column: str, values: Any, sentence: str) -> None:
    items = {name: own for name, own in (ITEMS | {column: values}).items() if own is not None}
    path = portable(tmp_path / "d", items=items)
    told = refused(path).replace(str(path / "items.parquet"), "FILE")
    assert sentence in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"user_id": ["a", None, "b"]}, "user_id is null or empty, first FILE row 2"),
        ({"user_id": ["a", "b", "a"]}, "1 value of user_id in more rows than one, such as a in"),
        ({"user_id": [0.5, 1.5, 2.5]}, "column 'user_id' is DOUBLE; write it as int64 or string"),
        ({"item_indices": [0, 1, 2]}, "'item_indices' is BIGINT; write it as a list of integers"),
        ({"item_indices": None}, "column 'item_indices' is missing; the file has user_id, times"),
        (
            {"item_indices": [[0, 1, 2, 1], [2, None, 0], [1, 0]]},
            "item_indices is null or has a null in it, first FILE row 2",
        ),
        (
            {"timestamps": [[10, 20, 20, 30], [5, 6, 7], None]},
            "timestamps is null or has a null in it, first FILE row 3",
        ),
        (
            {"timestamps": [[10, 20, None, 30], [5, 6, 7], [8, 9]]},
            "timestamps is null or has a null in it, first FILE row 1",
        ),
        (
            {"timestamps": [[10, 20, 20, 30], [5, 6, 7, 8], [8, 9]]},
            "item_indices and timestamps differ in length, first FILE row 2",
        ),
        (
            {
                "item_indices": [[0, 1, 2, 1], [2, 2, 0], []],
                "timestamps": [[10, 20, 20, 30], [5, 6, 7], []],
            },
            "item_indices is empty, first FILE row 3; leave such users out",
        ),
        (
            {"item_indices": [[0, 1, 2, 1], [2, 3, 0], [1, 0]]},
            "an item index is outside 0..2, first FILE row 2",
        ),
        (
            {"item_indices": [[0, 1, 2, 1], [2, 2, 0], [-1, 0]]},
            "an item index is outside 0..2, first FILE row 3",
        ),
        (
            {"timestamps": [[-1, 20, 20, 30], [5, 6, 7], [8, 9]]},
            "a timestamp is negative, first FILE row 1",
        ),
        (
            {"timestamps": [[1, 20, 20, START * 1000], [5, 6, 7], [8, 9]]},
            "first FILE row 1: 1300000000000; write unix seconds, not milliseconds",
        ),
        (
            {"timestamps": [[10, 20, 20, 30], [5, 7, 6], [9, 8]]},
            "2 rows where timestamps fall, first FILE row 2; sort each user's events by time",
        ),
        ({"train_end": [1, 1, 2]}, "train_end and valid_end belong together"),
        (ENDS | {"train_end": [1, None, 2]}, "0 <= train_end <= valid_end <= length does not hold"),
        (ENDS | {"train_end": [-1, 1, 2]}, "valid_end <= length does not hold, first FILE row 1"),
        (ENDS | {"train_end": [1, 3, 2]}, "valid_end <= length does not hold, first FILE row 2"),
        (ENDS | {"valid_end": [2, 2, 3]}, "valid_end <= length does not hold, first FILE row 3"),
        (ENDS | {"valid_end": [4, 3, 2]}, "2 validation and 0 test targets with a history"),
        (ENDS | {"valid_end": [1, 1, 2]}, "0 validation and 2 test targets with a history"),
    ],
)
def test_every_rule_for_sequences(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    columns = {name: own for name, own in (SEQUENCES | changed).items() if own is not None}
    path = portable(tmp_path / "d", sequences=columns)
    told = refused(path).replace(str(path / "sequences.parquet"), "FILE")
    assert sentence in told and told.count("\n") == 1


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    items = ITEMS | {"index": [0, 5, 1]}
    sequences = SEQUENCES | {"user_id": ["a", "a", ""], "timestamps": [[4, 3, 2, 1], [5], [8, -9]]}
    told = refused(portable(tmp_path / "d", items, sequences))
    for part in ("outside 0..2", "null or empty", "such as a", "differ", "negative", "fall"):
        assert part in told


def test_bad_rows_are_named_by_part_and_row_within_it(tmp_path: Path) -> None:
    path = tmp_path / "d"
    items, sequences = grouped(some_events())
    in_parts(path / "items.parquet", items, range(len(items)), 2)
    in_parts(path / "sequences.parquet", sequences, range(len(sequences)), 4)
    part = sorted((path / "sequences.parquet").glob("part*"))[2]
    rows = pq.read_table(part).to_pydict()
    rows["timestamps"][7][0] = 10**12
    pq.write_table(pa.table(rows, schema=pq.read_schema(part)), part)
    assert f"first {part} row 8: 1000000000000; write unix seconds" in refused(path)
    part.write_bytes(part.read_bytes()[:-20])
    assert f"{part} cannot be read" in refused(path)
    pq.write_table(pa.table(rows | {"user_id": list(range(len(rows["user_id"])))}), part)
    assert f"{part}: column 'user_id' is BIGINT here but VARCHAR in" in refused(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    path = portable(tmp_path / "d")
    (path / "items.parquet").unlink()
    assert "items.parquet is missing" in refused(path)
    (path / "sequences.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="is no prepared dataset"):
        check(path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        check(tmp_path / "nowhere")
    no_rows = {"item_id": pa.array([], pa.string()), "index": pa.array([], pa.int64())}
    assert "has 0 rows" in refused(portable(tmp_path / "e", items=no_rows))


def test_a_failure_leaves_no_mapped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = portable(tmp_path / "d")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for function in ("write_events", "write_stats", "sync"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(f"hstu_rec.data.check.{function}", full)
            check(path)
        assert sorted(one.name for one in path.iterdir()) == ["items.parquet", "sequences.parquet"]


@pytest.fixture
def of_prepare(tmp_path: Path) -> Path:
    path = tmp_path / "prepared"
    prepare(PrepareConfig(), parquet(tmp_path, some_events()), path)
    return path


def test_a_folder_of_prepare_passes_and_is_left_as_it_is(of_prepare: Path) -> None:
    before = {file.name: file.read_bytes() for file in of_prepare.iterdir()}
    assert check(of_prepare) == json.loads(before["stats.json"])
    assert {file.name: file.read_bytes() for file in of_prepare.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "column", "row", "value", "sentence"),
    [
        ("users", "user_id", 1, "zzz", "users.arrow: user_id does not rise, first in row 3"),
        ("users", "start", 1, 2, "start is not the sum of the lengths before, first in row 2"),
        ("users", "length", 1, 0, "length is below 1, first in row 2"),
        ("users", "length", -1, 999, "events.arrow has "),
        ("users", "train_end", 4, 500, "valid_end <= length does not hold, first in row 5"),
        ("users", "train_end", 4, -1, "valid_end <= length does not hold, first in row 5"),
        ("users", "train_end", 4, 0, "train_count of index"),
        ("users", "train_end", 4, None, "users.arrow: column 'train_end' has nulls"),
        ("users", "valid_end", 4, 500, "valid_end <= length does not hold, first in row 5"),
        ("events", "item", 9, 300, "events.arrow: item is outside 0.."),
        ("events", "item", 9, -1, ", first in row 10; prepare the dataset again"),
        (
            "events",
            "timestamp",
            0,
            -1,
            "timestamp is negative or beyond the year 5000 (-1), first in",
        ),
        ("events", "timestamp", 0, 10**10, "events.arrow: timestamp falls, first in row 2"),
        ("events", "timestamp", 0, 10**12, "beyond the year 5000 (1000000000000), first in row 1"),
        ("events", "timestamp", 0, 1, "stats.json: first_timestamp is"),
        ("counts", "train_count", 3, 0, "counts.arrow: train_count is not what the events give"),
        ("counts", "by_train_count", 3, 0, "by_train_count is not what the events give"),
    ],
    ids=str,
)
@pytest.mark.fault("R15")
def test_every_invariant_of_the_mapped_files(
    of_prepare: Path, name: str, column: str, row: int, value: Any, sentence: str
) -> None:
    path = of_prepare / f"{name}.arrow"
    table = open_arrow(path)
    columns = {own: table.column(own).to_pylist() for own in table.column_names}
    columns[column][row] = value
    changed = pa.table(columns, schema=table.schema)
    path.unlink()  # the old file is still mapped
    with arrow_writer(path, table.schema) as writer:
        writer.write_table(changed)
    assert sentence in refused(of_prepare)


def test_mapped_files_of_another_shape_are_refused(of_prepare: Path) -> None:
    events = (of_prepare / "events.arrow").read_bytes()
    table = open_arrow(of_prepare / "events.arrow")
    wrong = {
        "record batch 0 has 100 rows, not": (table, 100),
        "column 'item' is int64, not int32": (
            table.cast(pa.schema({"item": pa.int64(), **TIME})),
            None,
        ),
        "column 'timestamp' is missing": (table.select(["item"]), None),
    }
    for told, (content, chunk) in wrong.items():
        (of_prepare / "events.arrow").unlink()
        with arrow_writer(of_prepare / "events.arrow", content.schema) as writer:
            writer.write_table(content, max_chunksize=chunk)
        assert told in refused(of_prepare)
    (of_prepare / "events.arrow").unlink()
    (of_prepare / "events.arrow").write_bytes(events[:-40])
    with pytest.raises(ValueError, match=r"events.arrow is damaged .*; prepare the dataset again"):
        check(of_prepare)
    assert sorted(file.name for file in of_prepare.iterdir()) == sorted(dataset.FILES)


def test_items_and_statistics_of_prepare_are_checked(of_prepare: Path) -> None:
    stats = json.loads((of_prepare / "stats.json").read_text())
    items = pq.read_table(of_prepare / "items.parquet")
    renamed = [*items.column("item_id").to_pylist()[:-1], "other"]
    changed = items.set_column(0, "item_id", pa.array(renamed))
    pq.write_table(changed, of_prepare / "items.parquet")
    assert "stats.json: item_map_hash is" in refused(of_prepare)
    wrong = pa.array([7] * len(items), pa.int64())
    pq.write_table(items.set_column(2, "count", wrong), of_prepare / "items.parquet")
    assert "items.parquet: count of index 0 is 7, the events have" in refused(of_prepare)
    pq.write_table(items.slice(0, len(items) - 1), of_prepare / "items.parquet")
    assert f"counts.arrow has {len(items)} rows for {len(items) - 1} items" in refused(of_prepare)
    pq.write_table(items, of_prepare / "items.parquet")
    for name in ("users", "items", "events", "last_timestamp", "valid_targets", "test_targets"):
        (of_prepare / "stats.json").write_text(json.dumps(stats | {name: 1}))
        assert f"stats.json: {name} is 1, the files give {stats[name]}" in refused(of_prepare)
    for content, told in (("{", "is damaged"), ('{"format_version": 1}', "format_version 1, this")):
        (of_prepare / "stats.json").write_text(content)
        with pytest.raises(ValueError, match=told):
            check(of_prepare)


def test_the_app_checks_a_folder_and_tells_what_is_wrong(tmp_path: Path) -> None:
    path = portable(tmp_path / "d")
    done = prepare_app(f"check={path}", "memory_limit=1GB")
    assert done.returncode == 0 and f"checked  {path}" in done.stdout
    assert "users    3\n" in done.stdout and "order, write" in done.stderr
    done = prepare_app(f"check={portable(tmp_path / 'e', items=ITEMS | {'index': [0, 1, 3]})}")
    assert done.returncode == 2
    assert "index is outside 0..2" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_parquet_files_written_anew_without_a_check_are_refused(tmp_path: Path) -> None:
    path = portable(tmp_path / "d")
    check(path)
    Dataset(path)
    items = pq.read_table(path / "items.parquet")
    pq.write_table(items.take([2, 0, 1]), path / "items.parquet")
    with pytest.raises(ValueError, match=f"make these again with: .*check={path}"):
        Dataset(path)
    check(path)
    Dataset(path)


def test_what_another_engine_wrote_is_not_overwritten(tmp_path: Path) -> None:
    path = portable(tmp_path / "d")
    check(path)
    events = parquet(tmp_path, some_events())
    with pytest.raises(ValueError, match=r"holds sequences\.parquet, .*does not remove it"):
        prepare(PrepareConfig(overwrite=True), events, path)
    assert (path / "sequences.parquet").exists()

"""Titles of items: which is kept, where they are carried, what is counted."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_rec.data.check import check
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.item_map import ITEM_MAP, keep_item_map
from hstu_rec.data.prepare import PrepareConfig, prepare, report

# Rows in an order that is not that of frequency; item 5 has none, item 6 a tie, item 7 spaces alone.
TITLES = {
    4: ["rare", "common", "common", None, "  common ", "rarer"],
    5: [None, "", None, None, None, None],
    6: ["zeta", "alpha", "zeta", "alpha", None, None],
    7: ["   ", None, "", None, None, None],
}
KEPT = {4: "common", 6: "alpha"}


def write_events(path, titles):
    rows = [
        (user, item, 10**9 + 60 * place, titles[item][user])
        for user in range(6)
        for place, item in enumerate(titles)
    ]
    users, items, times, names = zip(*rows, strict=True)
    table = {"user_id": users, "item_id": items, "timestamp": times, "name": names}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(table), path)
    else:
        lines = [",".join(map(str, row)).replace("None", "") for row in rows]
        path.write_text("user_id,item_id,timestamp,name\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_most_frequent_title_is_kept_and_the_others_counted(tmp_path, suffix):
    write_events(tmp_path / f"events{suffix}", TITLES)
    config = PrepareConfig(title_column="name")
    stats = prepare(config, tmp_path / f"events{suffix}", tmp_path / "data")
    assert stats["titles"] == {"items_without": 2, "items_with_several": 2}
    assert "titles   2 items have none; 2 have several" in report(stats)
    assert stats["rows_read"] == stats["events"] == 24 and not stats["dropped"]
    rows = pq.read_table(tmp_path / "data" / "items.parquet").to_pylist()
    assert {row["item_id"]: row["title"] for row in rows} == {4: None, 5: None, 7: None} | KEPT
    dataset = Dataset(tmp_path / "data")
    assert dataset.labels(np.array([2, 0, 1, 0])) == [
        {"item_id": 6, "title": "alpha"},
        {"item_id": 4, "title": "common"},
        {"item_id": 5},
        {"item_id": 4, "title": "common"},
    ]
    assert check(tmp_path / "data")["titles"] == stats["titles"]


def test_titles_change_neither_the_items_nor_the_events_and_go_with_the_run(tmp_path):
    write_events(tmp_path / "events.parquet", TITLES)
    with_titles = prepare(
        PrepareConfig(title_column="name"), tmp_path / "events.parquet", tmp_path / "data"
    )
    without = prepare(PrepareConfig(), tmp_path / "events.parquet", tmp_path / "plain")
    assert with_titles["item_map_hash"] == without["item_map_hash"]
    assert with_titles["mapped"] == without["mapped"] and "titles" not in without
    for name, columns in (("data", ["item_id", "index", "title"]), ("plain", ["item_id", "index"])):
        (tmp_path / f"run_{name}").mkdir()
        keep_item_map(tmp_path / name, tmp_path / f"run_{name}")
        assert pq.read_schema(tmp_path / f"run_{name}" / ITEM_MAP).names == columns


def test_a_folder_of_another_engine_may_have_titles_as_strings_alone(tmp_path):
    sequences = {"user_id": [1], "item_indices": [[0, 1, 0]], "timestamps": [[1, 2, 3]]}
    items = {"item_id": [8, 9], "index": [0, 1]}
    for name, titles in (("good", ["one", None]), ("bad", [1, 2])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({**items, "title": titles}), tmp_path / name / "items.parquet")
        pq.write_table(pa.table(sequences), tmp_path / name / "sequences.parquet")
    check(tmp_path / "good")
    labels = Dataset(tmp_path / "good").labels(np.array([1, 0]))
    assert labels == [{"item_id": 9}, {"item_id": 8, "title": "one"}]
    with pytest.raises(ValueError, match=r"column 'title' is BIGINT; write it as a string"):
        check(tmp_path / "bad")


def test_a_title_column_that_is_not_there_is_named(tmp_path):
    write_events(tmp_path / "events.parquet", TITLES)
    with pytest.raises(ValueError, match=r"'nam' is missing; nearest: 'name'.*title_column=NAME"):
        prepare(PrepareConfig(title_column="nam"), tmp_path / "events.parquet", tmp_path / "data")

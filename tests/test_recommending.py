"""Parts of apps/recommend.py hold what the model recommends, whoever wrote them and however often begun."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_rec import Recommender
from hstu_rec.config import load
from hstu_rec.data.dataset import Dataset
from hstu_rec.export import ExportConfig, export
from hstu_rec.recommending import RecommendConfig, recommend_all
from tests.ranks import run_ranks
from tests.test_recommender import SMALL, rows_of, table

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """(model, its run, its dataset)."""
    folder = tmp_path_factory.mktemp("recommending")
    model = Recommender(**SMALL | {"max_epochs": 3}).fit(table(), folder=folder)
    return model, folder / "run", folder / "data"


def told_parts(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))])


def recommended(run: Path, source: Path, output: Path, *settings: str) -> pa.Table:
    recommend_all(run, source, output, load(RecommendConfig, [*settings]))
    return told_parts(output)


def test_parts_hold_what_the_model_recommends_to_every_user(fitted, tmp_path):
    model, run, data = fitted
    users = Dataset(data).user_ids.to_pylist()
    for settings in (("k=5",), ("k=7", "filter_seen=false", "part_users=11")):
        config = load(RecommendConfig, [*settings])
        found = recommended(run, data, tmp_path / settings[0], *settings)
        expected = model.recommend(users, k=config.k, filter_seen=config.filter_seen)
        assert rows_of(found) == rows_of(expected) and found.column_names == expected.column_names
        parts = len([*(tmp_path / settings[0]).glob("part-*")])
        assert parts == -(-len(users) // config.part_users)


def test_before_the_test_target_they_are_what_evaluation_ranks(fitted, tmp_path):
    model, run, data = fitted
    dataset = Dataset(data)
    last, _, _ = dataset.gather(
        np.arange(dataset.num_users), dataset.valid_ends, dataset.valid_ends + 1
    )
    own = dataset.item_ids.to_pylist()
    target = dict(zip(dataset.user_ids.to_pylist(), (own[row] for row in last), strict=True))
    for part, is_masked in (("seen_masked", True), ("seen_allowed", False)):
        settings = ("until=test", "k=5", f"filter_seen={is_masked}")
        found = recommended(run, data, tmp_path / part, *settings)
        num_hits = sum(target[user] == item for user, _, item, _ in rows_of(found))
        assert num_hits / len(target) == model.result["test"][part]["recall@5"]


def count_rows(run: Path, data: Path, output: Path) -> int:
    return recommend_all(run, data, output, load(RecommendConfig, ["part_users=16"]))["done"][
        "rows"
    ]


def test_any_number_of_processes_writes_the_same_parts(fitted, tmp_path):
    _, run, data = fitted
    expected = recommended(run, data, tmp_path / "one", "part_users=16")
    assert run_ranks(3, count_rows, run, data, tmp_path / "three") == [len(expected)] * 3
    names = [one.name for one in sorted((tmp_path / "one").iterdir())]
    assert names == [one.name for one in sorted((tmp_path / "three").iterdir())]
    assert told_parts(tmp_path / "three").equals(expected)


def test_what_is_there_is_left_and_what_is_missing_is_made(fitted, tmp_path):
    _, run, data = fitted
    output = tmp_path / "out"
    expected = recommended(run, data, output, "part_users=16")
    times = {one.name: one.stat().st_mtime_ns for one in output.glob("part-*")}
    (output / "part-00003.parquet").unlink()
    (output / "part-00005.parquet.tmp").write_bytes(b"of one that was killed")
    assert recommended(run, data, output, "part_users=16").equals(expected)
    changed = [
        one.name for one in output.glob("part-*") if times.get(one.name) != one.stat().st_mtime_ns
    ]
    assert changed == ["part-00003.parquet"] or sorted(changed)[:1] == ["part-00003.parquet"]
    assert json.loads((output / "_recommendations.json").read_text())["done"]["users_made"] == 16
    with pytest.raises(ValueError, match="holds recommendations of other settings; remove it"):
        recommended(run, data, output, "part_users=16", "k=3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="mine holds other files; give a folder that is empty"):
        recommended(run, data, tmp_path / "mine")


def test_event_files_and_a_bundle_do_as_well(fitted, tmp_path):
    model, run, _ = fitted
    export(run, tmp_path / "bundle", ExportConfig())
    rows = [
        ("a", "item 3", 5),
        ("a", "item 4", 6),
        ("b", "new", 5),
        ("c", "item 9", 1),
        ("c", "new", 2),
    ]
    users, items, times = zip(*rows, strict=True)
    events = pa.table(
        {"who": users, "item_id": items, "timestamp": [1_700_000_000 + t for t in times]}
    )
    pq.write_table(events, tmp_path / "events.parquet")
    found = recommended(
        tmp_path / "bundle", tmp_path / "events.parquet", tmp_path / "out", "k=2", "user_column=who"
    )
    known = events.rename_columns(["user_id", "item_id", "timestamp"])
    with pytest.warns(UserWarning, match="new"):
        assert rows_of(found) == rows_of(model.recommend(known, k=2))
    done = json.loads((tmp_path / "out" / "_recommendations.json").read_text())["done"]
    assert (done["users"], done["users_without"], done["rows"]) == (2, 1, 4)
    names = [one.name for one in sorted((tmp_path / "out").iterdir())]
    assert names == ["_recommendations.json", "part-00000.parquet"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["k=0"], "k must be at least 1"),
        (["at=9"], "at has no effect on this model"),
        (["until=test", "at=9"], "at has no effect with until=test"),
        (["until=tomorrow"], "until must be"),
    ],
)
def test_settings_without_sense_are_refused(fitted, tmp_path, settings, told):
    _, run, data = fitted
    with pytest.raises(ValueError, match=told):
        recommended(run, data, tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


def test_histories_of_other_items_are_refused(fitted, tmp_path):
    _, run, _ = fitted
    events = {"user_id": ["a"], "timestamp": [1_700_000_000]}
    for item, told in (
        (7, "events.parquet: item ids are int64, the model's"),
        (
            "other",
            "events.parquet: none of its 1 items, such as 'other', is one of the model's, such as 'item 0', "
            "'item 1', 'item 10'; give histories",
        ),
    ):
        pq.write_table(pa.table({**events, "item_id": [item]}), tmp_path / "events.parquet")
        with pytest.raises(ValueError, match=told):
            recommended(run, tmp_path / "events.parquet", tmp_path / "out")
        assert [one.name for one in tmp_path.iterdir()] == ["events.parquet"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="none of its"):
        recommended(run, tmp_path / "events.parquet", tmp_path / "mine")
    assert [*(tmp_path / "mine").iterdir()] == []
    own = tmp_path / "mine" / ".histories"
    own.mkdir()
    (own / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is no dataset, so overwrite=true does not remove it"):
        recommended(run, tmp_path / "events.parquet", tmp_path / "mine")
    assert (own / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["out.csv", "out.Parquet"])
def test_a_name_of_a_file_is_no_folder_to_write_to(fitted, tmp_path, name):
    _, run, data = fitted
    with pytest.raises(ValueError, match=f"OUT is a folder of .*{name}.* give for example .*/out"):
        recommended(run, data, tmp_path / name)
    assert [*tmp_path.iterdir()] == []


def test_the_app_tells_what_it_wrote(fitted, tmp_path):
    _, run, data = fitted
    command = [
        sys.executable,
        "apps/recommend.py",
        str(run),
        str(data),
        str(tmp_path / "out"),
        "k=3",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = "450 rows of 150 users; 0 users without a known item"
    assert f"wrote    {tmp_path}/out: {told}" in done.stdout and "users/s)" in done.stdout
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"found    {tmp_path}/out: {told}" in done.stdout
    assert "(everything was there already)" in done.stdout and "users/s" not in done.stdout
    done = subprocess.run(command[:4], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "give MODEL, HISTORIES and OUT" in done.stderr

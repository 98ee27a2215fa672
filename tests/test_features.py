"""prepare's feature_columns: what events carry, in their order, or an error that says what to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
import pytest

from hstu_rec.data import dataset as dataset_module
from hstu_rec.data import features as features_module
from hstu_rec.data.check import check
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare, report

NAMES = ["stars", "device"]


def events(**changed: Any) -> pa.Table:
    """200 rows of 9 users in no order; what each carries is a function of user and time."""
    random = np.random.default_rng(3)
    user, at = random.integers(0, 9, 200), random.permutation(200)
    columns = {
        "user_id": [f"u{one}" for one in user],
        "item_id": random.integers(0, 30, 200),
        "timestamp": 1_300_000_000 + at,
        "stars": (at % 11) / 2 - 1,
        "device": [("phone", "Äpp", "tv")[one % 3] for one in at],
    }
    return pa.table(columns | changed)


def written(folder: Path, table: pa.Table, kind: str) -> Path:
    path = folder / f"events.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        pc_csv.write_csv(table, path)
    else:
        table.to_pandas().to_json(path, orient="records", lines=True)
    return path


def prepared(folder: Path, table: pa.Table, kind: str = "parquet", **options: Any) -> Dataset:
    config = PrepareConfig(**{"feature_columns": NAMES, "min_user_events": 1} | options)
    prepare(config, written(folder, table, kind), folder / "data")
    return Dataset(folder / "data")


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
@pytest.mark.parametrize("chunk_rows", [2**22, 64])
def test_every_event_keeps_what_it_carries(tmp_path, kind, chunk_rows, monkeypatch):
    monkeypatch.setattr(dataset_module, "EVENT_CHUNK_ROWS", chunk_rows)
    data = prepared(tmp_path, events(), kind)
    users = np.arange(data.num_users)
    none = np.zeros(data.num_users, dtype=np.int64)
    _, times, _ = data.gather(users, none, data.lengths)
    found = data.features(users, none, data.lengths)
    at = times - 1_300_000_000
    assert [*found] == NAMES and {one.dtype for one in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found["stars"], ((at % 11) / 2 - 1).astype(np.float32))
    # Texts are places in the order of their bytes: phone, tv, Äpp.
    np.testing.assert_array_equal(found["device"], np.array([0, 2, 1])[at % 3])
    assert data.stats["features"]["device"] == {
        "num_missing": 0,
        "values": ["phone", "tv", "Äpp"],
    }
    assert data.stats["features"]["stars"]["max"] == 4.0
    told = "\nfeatures stars -1 to 4, device 3 different texts\n"
    assert told in report(data.stats | {"prepare_s": 1.0})
    part = data.features(users[2:4], none[2:4] + 1, none[2:4] + 3)
    begin = data.starts[2] + 1
    assert part["stars"].tolist()[:2] == found["stars"].tolist()[begin : begin + 2]
    assert check(tmp_path / "data")["mapped"] == data.stats["mapped"]


def test_a_rating_may_be_a_limit_and_a_feature(tmp_path):
    for kind in ("parquet", "csv", "json"):
        (tmp_path / kind).mkdir()
        data = prepared(
            tmp_path / kind,
            events(),
            kind,
            rating_column="stars",
            min_rating=2.0,
            feature_columns=["stars"],
        )
        assert data.stats["features"]["stars"]["min"] == 2.0
        assert 0 < data.num_events < 200


def test_without_features_there_is_no_file(tmp_path):
    data = prepared(tmp_path, events(), feature_columns=[])
    assert data.feature_names == [] and not (tmp_path / "data" / "features.arrow").exists()
    none = np.zeros(1, dtype=np.int64)
    assert data.features(none, none, none + 1) == {}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"stars": [-float("inf")] * 2 + [1.0] * 198}, "2 rows with unreadable stars"),
        ({"stars": [1e300] + [1.0] * 199}, "1 row with unreadable stars"),
        (
            {"stars": pa.nulls(200, pa.float64())},
            "feature_columns: 'stars' holds no value; leave it",
        ),
        ({"device": [""] * 200}, "feature_columns: 'device' holds no value; leave it out"),
        ({"device": pa.array([0] * 200, pa.timestamp("s"))}, "'device' .* holds timestamps"),
        ({"device": pa.array([[0]] * 200)}, "column 'device' has type"),
    ],
)
def test_what_is_no_number_or_text_is_told(tmp_path, changed, told):
    with pytest.raises(ValueError, match=told):
        prepared(tmp_path, events(**changed))


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_an_event_may_have_none(tmp_path, kind):
    table, lacks = events(), np.arange(200) % 7 == 0
    stars = table["stars"].to_numpy().copy()
    if kind == "parquet":
        stars[lacks] = np.nan  # as pandas writes it
    else:
        stars = pa.array(stars, mask=lacks)
    device = pa.array(
        [("" if i % 2 else None) if i % 5 == 0 else "tv" for i in range(200)], pa.string()
    )
    data = prepared(tmp_path, events(stars=stars, device=device), kind)
    at = table["timestamp"].to_numpy()
    of_row = {
        time: (one, i % 5 == 0)
        for i, (time, one) in enumerate(
            zip(at, np.where(lacks, np.nan, table["stars"].to_numpy()), strict=True)
        )
    }
    users = np.arange(data.num_users)
    _, times, _ = data.gather(users, np.zeros_like(users), data.lengths)
    found = data.features(users, np.zeros_like(users), data.lengths)
    np.testing.assert_array_equal(found["stars"], [of_row[time][0] for time in times])
    np.testing.assert_array_equal(
        found["device"], [np.nan if of_row[time][1] else 0 for time in times]
    )
    facts = data.stats["features"]
    assert facts["device"] == {"num_missing": 40, "values": ["tv"]}
    assert facts["stars"]["num_missing"] == 29 and facts["stars"]["max"] == 4.0
    known = table["stars"].to_numpy()[~lacks]
    assert facts["stars"]["mean"] == pytest.approx(known.mean())
    assert "missing  stars 29, device 40" in report(data.stats | {"prepare_s": 1.0})


def test_rows_with_a_feature_that_is_unreadable_can_be_dropped(tmp_path):
    stars = [float("inf"), *[1.0] * 199]
    data = prepared(tmp_path, events(stars=stars), bad_rows="drop")
    assert data.stats["dropped"] == {"unreadable stars": 1} and data.num_events == 199


def test_texts_that_look_like_no_number_are_texts(tmp_path):
    device = ["NA", "none"] * 100
    data = prepared(tmp_path, events(device=device), "csv")
    assert data.stats["features"]["device"] == {"num_missing": 0, "values": ["NA", "none"]}
    stars = data.stats["features"]["stars"]
    assert (stars["is_whole"], stars["max"]) == (False, 4.0)


def test_a_column_of_too_many_texts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "MAX_VALUES", 2)
    with pytest.raises(ValueError, match="'device' holds 3 different texts, more than 2"):
        prepared(tmp_path, events())


def test_columns_must_be_there_and_differ(tmp_path):
    with pytest.raises(ValueError, match=r"feature_columns must differ; got stars, stars"):
        prepared(tmp_path, events(), feature_columns=["stars", "stars"])
    with pytest.raises(
        ValueError, match=r"column 'star' is missing; nearest: 'stars'; .* look at feature_columns"
    ):
        prepared(tmp_path, events(), feature_columns=["star"])


def test_a_changed_file_of_features_is_refused(tmp_path):
    data = prepared(tmp_path, events())
    path = data.path / "features.arrow"
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"features\.arrow missing"):
        Dataset(data.path)
    wrong = pa.table({"stars": pa.array([1.0] * 200, pa.float32())})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, wrong.schema) as writer:
        writer.write_table(wrong)
    with pytest.raises(ValueError, match=r"features\.arrow has been changed: it holds 200 rows of"):
        Dataset(data.path)
    damaged = bytearray(kept)
    damaged[600] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=r"features\.arrow: not as when stats\.json was written"):
        check(data.path)


def test_the_newest_share_of_each_users_events_is_the_test_and_other_splits_are_other_data(
    tmp_path,
):
    source = written(tmp_path, events(), "parquet")
    options = {"split": "share", "valid_fraction": 0.2, "test_fraction": 0.3}
    prepare(PrepareConfig(**options), source, tmp_path / "share")
    prepare(PrepareConfig(), source, tmp_path / "last")
    share, last = Dataset(tmp_path / "share"), Dataset(tmp_path / "last")
    np.testing.assert_array_equal(share.valid_ends, share.lengths - share.lengths * 3 // 10)
    np.testing.assert_array_equal(share.train_ends, share.lengths - share.lengths // 2)
    assert share.facts["split"] == "share 0.2 0.3" and last.facts["split"] == "leave_one_out"
    assert share.num_events == last.num_events

"""Recommender: tables of every kind in, the same ids out; what it says is what the model and the run say."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from hstu_rec import Recommender, recommender
from hstu_rec.signals import Stopped
from tests import oracles

ROOT = Path(__file__).parent.parent
NUM_ITEMS = 40
SMALL = {"dim": 16, "max_epochs": 9, "batch_users": 32, "dropout": 0.1, "device": "cpu"}


def table(num_users: int = 150) -> pa.Table:
    """Users who go from item to the next, seven apart from one another; every user of 4 to 12 events."""
    rows = [
        (f"user {user}", f"item {(user * 7 + place) % NUM_ITEMS}", 1_700_000_000 + 60 * place)
        for user in range(num_users)
        for place in range(4 + user % 9)
    ]
    users, items, times = zip(*rows, strict=True)
    return pa.table({"user_id": users, "item_id": items, "timestamp": times})


def rows_of(answer: pa.Table) -> list[tuple]:
    return [*zip(*(column.to_pylist() for column in answer.columns), strict=True)]


@pytest.fixture(scope="module")
def model():
    return Recommender(**SMALL).fit(table())


def test_users_of_fit_and_their_histories_get_the_same_and_what_follows_comes_first(model):
    users = ["user 149", "user 3", "user 4"]
    by_id = model.recommend(users, k=5)
    events = table()
    chosen = events.filter(pa.array(np.isin(events["user_id"].to_pylist(), users)))
    assert sorted(rows_of(by_id)) == sorted(rows_of(model.recommend(chosen, k=5)))
    assert by_id.column_names == ["user_id", "rank", "item_id", "score"]
    assert by_id["user_id"].to_pylist() == [user for user in users for _ in range(5)]
    assert by_id["rank"].to_pylist() == [1, 2, 3, 4, 5] * 3
    # 7 n + (4 + n % 9) comes next, for n = 149, 3, 4.
    assert by_id["item_id"].to_pylist()[::5] == ["item 12", "item 28", "item 36"]


def test_a_user_that_training_never_saw_gets_what_follows(model):
    new = {
        "user_id": [9, 9],
        "item_id": ["item 20", "item 21"],
        "timestamp": ["2024-05-01", "2024-05-02"],
    }
    assert model.recommend(new, k=1)["item_id"].to_pylist() == ["item 22"]
    assert len(model.recommend(new, k=1000)) == NUM_ITEMS - 2
    assert len(model.recommend(new, k=1000, filter_seen=False)) == NUM_ITEMS


def test_candidates_are_ranked_as_among_all(model):
    asked = [f"item {n}" for n in range(0, NUM_ITEMS, 3)]
    every = rows_of(model.recommend(["user 1", "user 2"], k=NUM_ITEMS))
    expected = [(user, item, score) for user, _, item, score in every if item in asked]
    with pytest.warns(UserWarning, match="1 of 15 candidates are of 1 items that are not among"):
        found = model.recommend(["user 1", "user 2"], k=NUM_ITEMS, candidates=[*asked, "nothing"])
    assert [(user, item, score) for user, _, item, score in rows_of(found)] == expected
    with pytest.raises(ValueError, match="none of 1 candidates is known"):
        model.recommend(["user 1"], candidates=["nothing"], on_unknown="ignore")


def test_similar_items_are_those_of_numpy(model):
    vectors = model.model._rows.numpy().astype(float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = model.model.items.ids.to_pylist()
    asked = ["item 5", "item 0", "item 5"]
    found = model.similar_items(asked, k=3)
    assert found.column_names == ["item_id", "rank", "similar_item_id", "score"]
    for place, item in enumerate(asked):
        cosines = vectors @ vectors[own.index(item)]
        cosines[own.index(item)] = -np.inf
        best = np.argsort(-cosines)[:3]
        part = found.slice(3 * place, 3)
        assert part["similar_item_id"].to_pylist() == [own[row] for row in best]
        np.testing.assert_allclose(part["score"], cosines[best], rtol=1e-5)
    assert len(model.similar_items(["item 5"], k=99)) == NUM_ITEMS - 1


def test_evaluation_of_the_same_events_is_what_the_run_measured(model):
    measured, again = model.evaluate(), model.evaluate(table())
    assert again["num_users"] == 150
    for part in ("seen_masked", "seen_allowed"):
        assert again[part] == measured[part] == model.result["test"][part]
    assert measured["seen_masked"]["recall@1"] > 0.9


def test_evaluation_is_that_of_the_recommendations_before_the_last_event(model):
    events = table(60).to_pandas()
    last = events.groupby("user_id", sort=False).tail(1)
    before = events.drop(last.index)
    found = model.recommend(before, k=NUM_ITEMS)
    target = dict(zip(last["user_id"], last["item_id"], strict=True))
    hit = found[found["item_id"] == found["user_id"].map(target)]
    ranks = hit["rank"].to_numpy() - 1
    assert len(ranks) == 60
    measured = model.evaluate(events, ks=[3])["seen_masked"]
    assert measured == pytest.approx(oracles.metrics(ranks.tolist(), [3]))


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow"])
def test_answers_are_tables_of_the_kind_that_was_given(model, kind):
    given = {
        "pandas": table(3).to_pandas(),
        "polars": polars.from_arrow(table(3)),
        "arrow": table(3),
    }
    answer = model.recommend(given[kind], k=2)
    types = {"pandas": pandas.DataFrame, "polars": polars.DataFrame, "arrow": pa.Table}
    assert type(answer) is types[kind]
    plain = pa.table(answer) if kind == "polars" else answer
    plain = pa.Table.from_pandas(plain, preserve_index=False) if kind == "pandas" else plain
    assert rows_of(plain) == rows_of(model.recommend(table(3), k=2))


def test_own_columns_moments_and_numbers_as_ids(tmp_path):
    frame = table(60).to_pandas()
    frame = pandas.DataFrame(
        {
            "when": pandas.to_datetime(frame["timestamp"], unit="s", utc=True),
            "price": 1.5,
            "product": frame["item_id"].str[5:].astype(int),
            "customer": frame["user_id"].astype("category"),
        }
    )
    columns = {"user_column": "customer", "item_column": "product", "time_column": "when"}
    model = Recommender(**SMALL | {"max_epochs": 1}).fit(frame, **columns, folder=tmp_path / "kept")
    answer = model.recommend(frame, k=2)
    assert [*answer.columns] == ["customer", "rank", "product", "score"]
    assert answer["product"].dtype.kind == "i" and len(answer) == 120
    assert [*model.recommend(["user 1"], k=1).columns] == [*answer.columns]
    assert (tmp_path / "kept" / "run" / "report.md").is_file()
    model.save(tmp_path / "shared")
    loaded = Recommender.load(tmp_path / "shared")  # which knows what columns are called
    assert loaded.recommend(frame, k=2).equals(answer)
    # As it was: nothing is trained again.
    again = Recommender(**SMALL | {"max_epochs": 1}).fit(frame, **columns, folder=tmp_path / "kept")
    assert again.recommend(frame, k=2).equals(answer)
    with pytest.raises(ValueError, match=r"encoder.dim was 16 and is 8"):
        Recommender(**SMALL | {"dim": 8}).fit(frame, **columns, folder=tmp_path / "kept")
    stats = (tmp_path / "kept" / "data" / "stats.json").read_bytes()
    with pytest.raises(ValueError, match="holds a fit to other events, or to the same prepared"):
        Recommender(**SMALL).fit(frame[:-9], **columns, folder=tmp_path / "kept")
    assert (tmp_path / "kept" / "data" / "stats.json").read_bytes() == stats
    assert not (tmp_path / "kept" / "data.new").exists()


def test_files_are_read_as_tables_are(tmp_path):
    for number in range(2):
        pq.write_table(table(40).slice(150 * number, 150), tmp_path / f"part-{number}.parquet")
    paths = str(tmp_path / "part-*.parquet")
    model = Recommender(**SMALL | {"max_epochs": 1}).fit(paths)
    by_id = sorted(rows_of(model.recommend(table(40).slice(0, 300), k=2)))
    assert rows_of(model.recommend(paths, k=2)) == by_id
    assert rows_of(model.recommend(tmp_path, k=2)) == rows_of(model.recommend(paths, k=2))
    with pytest.raises(
        FileNotFoundError, match=r"there is no file at cust_7; ids .*: \['cust_7'\]"
    ):
        model.recommend("cust_7")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"bad.parquet"):
        model.recommend(tmp_path / "bad.parquet")
    csv.write_csv(table(40).slice(0, 300), tmp_path / "events.csv")
    assert rows_of(model.recommend(tmp_path / "events.csv", k=2)) == rows_of(
        model.recommend(paths, k=2)
    )


def test_what_fit_takes_recommend_takes(tmp_path):
    """Ids that a NaN has made floats, numbers as text, columns of anything beside, users of few events."""
    given = table(40).to_pandas()
    given["user_id"] = given["user_id"].str.removeprefix("user ").astype(float)
    given["timestamp"] = given["timestamp"].astype(str)
    given["beside"] = [1, "a"] * (len(given) // 2) + [2.5] * (len(given) % 2)
    short = given.groupby("user_id").head(2).iloc[:2].assign(user_id=1000.0)
    given = pandas.concat([given, short])
    model = Recommender(**SMALL | {"max_epochs": 1}).fit(given)
    answer = model.recommend(given, k=np.int64(1))
    assert answer["user_id"].tolist() == given["user_id"].drop_duplicates().tolist()
    ids = [1000, int(given["user_id"].iloc[0])]
    assert model.recommend(ids, k=1)["item_id"].tolist() == [
        answer.set_index("user_id").loc[one, "item_id"] for one in ids
    ]
    assert model.evaluate(given, ks=[1])["num_users"] == 41
    with pytest.raises(ValueError, match=r"user_id: 1 ids are null; leave such rows out"):
        model.recommend({**given.head(2).to_dict("list"), "user_id": [1.0, None]})
    with pytest.raises(ValueError, match=r"user_id: 1 ids are floats that are no whole .* 1\.5"):
        model.recommend(given.assign(user_id=1.5).head(1))


def test_what_is_saved_and_loaded_recommends_the_same_to_any_history(model, tmp_path):
    model.save(tmp_path / "shared", name="mine")
    loaded = Recommender.load(tmp_path / "shared")
    assert rows_of(loaded.recommend(table(), k=7)) == rows_of(model.recommend(table(), k=7))
    assert loaded.evaluate() == model.evaluate() and loaded.model.config.about["name"] == "mine"
    with pytest.raises(ValueError, match="a model that was loaded knows no users"):
        loaded.recommend(["user 1"])
    loaded.save(tmp_path / "again")
    assert sorted(one.name for one in (tmp_path / "again").iterdir()) == sorted(
        one.name for one in (tmp_path / "shared").iterdir()
    )
    for one in (model, loaded):
        with pytest.raises(ValueError, match="again is there already"):
            one.save(tmp_path / "again")


def test_unknown_users_obey_the_policy(model):
    with pytest.warns(
        UserWarning, match="1 of 2 user ids are of 1 users that are not among the model's 150"
    ):
        assert len(model.recommend(["user 1", "nobody"], k=3)) == 3
    with pytest.raises(ValueError, match=r"not among the model's 150, for example .'nobody'"):
        model.recommend(["nobody"], on_unknown="raise")
    assert len(model.recommend(["nobody"], on_unknown="ignore")) == 0
    with pytest.raises(ValueError, match="user ids holds integers, the model's users are strings"):
        model.recommend([1, 2])
    with pytest.raises(ValueError, match="must be a list or an array of own ids; got 7"):
        model.recommend(7)
    with pytest.raises(ValueError, match="filter_seen must be True or False; got 'no'"):
        model.recommend(table(3), filter_seen="no")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dim": 15}, r"encoder.dim must be a multiple of num_heads .*; got 15 and 2"),
        ({"lr": -1}, "optim.lr must be above 0"),
        ({"device": "tpu"}, "train.device must be"),
        ({"settings": {"encoder.dmi": 3}}, "did you mean 'encoder.dim'"),
        ({"num_negatives": 0}, "loss.num_negatives must be at least 1"),
        ({"settings": {"data.path": "a"}}, r"settings: data.path are of fit\(events, folder=...\)"),
        ({"settings": {"optim.lr": print}}, "a setting is a number, a text, .*; got <built-in"),
    ],
)
def test_values_that_no_model_has_are_refused_before_anything_is_read(given, told):
    with pytest.raises(ValueError, match=told):
        Recommender(**given)


@pytest.mark.parametrize(
    ("events", "told"),
    [
        (
            table(9).rename_columns(["user", "item_id", "timestamp"]),
            "no column of the events is called 'user_id'; did you mean 'user'",
        ),
        ({"user_id": [1], "item_id": [1, 2], "timestamp": [1]}, "columns of equal length"),
        (
            pandas.DataFrame({"user_id": [1, "a"], "item_id": [1, 2], "timestamp": [1, 2]}),
            "each of one type",
        ),
        (7, "events must be a DataFrame of pandas or polars, .*; got int"),
        (table(9).slice(0, 0), "^there are no rows in the table; give"),
        (
            {"user_id": [1, None], "item_id": [1, 2], "timestamp": [1, 2]},
            "^the table: 1 row with null user_id, first in row 2 of it; mend .*bad_rows=drop "
            r"\(bad_rows: in fit's prepare_settings\)$",
        ),
        (
            polars.LazyFrame({"user_id": [1]}),
            r"a LazyFrame, which has no rows yet; give .* collect\(\)",
        ),
    ],
)
def test_tables_that_cannot_be_learnt_from_are_told(events, told):
    with pytest.raises(ValueError, match=told):
        Recommender(**SMALL).fit(events)


def test_a_fit_that_fails_leaves_the_former_model_and_its_files(tmp_path):
    model = Recommender(**SMALL | {"max_epochs": 1}).fit(table(20))
    with pytest.raises(ValueError, match="no column of the events"):
        model.fit({"user_id": [1]})
    answer = model.recommend(["user 3"], k=2)
    model.save(tmp_path / "kept")
    loaded = Recommender.load(tmp_path / "kept")
    assert rows_of(loaded.recommend(table(20), k=2))[6:8] == rows_of(answer)
    with pytest.raises(ValueError, match="a model that was loaded is saved as it is"):
        loaded.save(tmp_path / "again", name="other")
    with pytest.raises(ValueError, match="there is no model yet"):
        _ = Recommender().result


def test_what_a_stopped_or_changed_fit_is_told_is_in_words_of_fit(tmp_path, monkeypatch):
    given = SMALL | {"max_epochs": 1}
    Recommender(**given).fit(table(20), folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"optim.lr was .*Recommender\(settings=\{'train.resume_cha"
    ):
        Recommender(**given, lr=0.5).fit(table(20), folder=tmp_path)
    Recommender(**given, lr=0.5, settings={"train.resume_changed": True}).fit(
        table(20), folder=tmp_path
    )

    def stopped(_, by):
        raise Stopped("saved", by)

    for by, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)):
        monkeypatch.setattr(recommender, "train", partial(stopped, by=by))
        with pytest.raises(kind, match="fit was stopped; nothing is kept without folder="):
            Recommender(**given).fit(table(20))
        with pytest.raises(kind, match=r"stopped; call it again with folder='.*' to go on from"):
            Recommender(**given).fit(table(20), folder=tmp_path)


def test_a_stream_which_can_be_read_once_is_a_table_too():
    given = table(20)
    model = Recommender(**SMALL | {"max_epochs": 1}).fit(given.to_reader())
    assert len(model.recommend(["user 3"], k=2)) == 2


def test_before_fit_there_is_nothing():
    with pytest.raises(ValueError, match=r"call fit\(events\), or Recommender.load"):
        Recommender().recommend(table())


JOB = """
import os, sys
from hstu_rec import Recommender
from tests.test_recommender import SMALL, rows_of, table
model = Recommender(**SMALL | {"max_epochs": 1}).fit(table())
first = rows_of(model.recommend(["user 1", "user 2"], k=3))
model.save(sys.argv[1])
loaded = Recommender.load(sys.argv[1])
assert rows_of(loaded.recommend(table(), k=3)) == rows_of(model.recommend(table(), k=3))
assert rows_of(model.fit(table()).recommend(["user 1", "user 2"], k=3)) == first
print("done", os.environ["RANK"], first[0][2])
"""


def test_in_a_job_of_two_processes_both_call_the_same_and_know_the_same(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "job.py"), str(tmp_path / "shared")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("done")]
    assert len(told) == 2 and len({one[2] for one in told}) == 1

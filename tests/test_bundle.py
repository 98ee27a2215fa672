"""A model that is exported recommends what its run measured, in own ids, and says what it cannot do."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hstu_rec import checkpoint, distributed, export, load_bundle
from hstu_rec.bundle import BundleError
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import eval_batches
from hstu_rec.export import ExportConfig, serve_run
from hstu_rec.item_table import local_shards
from hstu_rec.learner import Learner
from tests.ranks import run_ranks
from tests.shared_models import (
    changed,
    events_of,
    lists,
    program_lists,
    refreshed,
    train_run,
    write_data,
)

ROOT = Path(__file__).parent.parent
NUM_USERS = 1000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "data"
    write_data(path, NUM_USERS)
    return path


@pytest.fixture(scope="module")
def run(data):
    """Of two processes, so that the table is in two shards; with the time of the event to predict."""
    folder = data.parent / "run"
    run_ranks(2, train_run, data, folder, "encoder.query_time=next", "encoder.calendar=day")
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """The bundle, its rows written in several blocks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export, "BLOCK_ROWS", 64)
        about = ExportConfig(license="Apache-2.0", program="torch")
        export.export(run, run.parent / "bundle", about)
    return run.parent / "bundle"


@pytest.fixture(scope="module")
def plain(data):
    """A bundle of a run by dot products that does not use the query time."""
    train_run(data, data.parent / "plain run", "loss.similarity=dot", "loss.temperature=0.5")
    export.export(data.parent / "plain run", data.parent / "plain", ExportConfig())
    return data.parent / "plain"


def eager_lists(run: Path, data: Path) -> dict[int, list[str]]:
    """Ten best unseen items of every user by the learner, its sharded table and a plain loop."""
    dataset = Dataset(data)
    config = load(RunConfig, [str(run / "config.yaml")])
    with distributed.process_group("cpu"):
        learner = Learner(config, dataset, torch.device("cpu"))
        checkpoint.load(checkpoint.resolve(run / "checkpoints", "best"), learner.state())
        learner.model.eval()
        own = dataset.item_ids.to_pylist()
        (rows, _), *_ = local_shards(learner.model)
        units = learner.loss.item_vectors(rows.detach()).double().numpy()
        found = {}
        for batch in eval_batches(dataset, "test", config.encoder.max_history_len, 300):
            scores = learner.model(batch.history)[0].detach().double().numpy() @ units.T
            for place, user in enumerate(batch.users.tolist()):
                seen = slice(*batch.seen_offsets[place : place + 2].tolist())
                scores[place, batch.seen_ids[seen].numpy()] = -np.inf
                found[user] = [own[row] for row in np.argsort(-scores[place])[:10]]
    return found


@pytest.mark.fault("R32")
def test_a_model_recommends_the_same_in_training_exported_reloaded_and_as_a_program(
    run, exported, data, tries
):
    dataset = Dataset(data)
    events, at, _ = events_of(dataset, np.arange(NUM_USERS))
    expected, by_program = eager_lists(run, data), program_lists(exported, dataset, 6)
    before, after = (
        lists(model.recommend(events, 10, at=at))
        for model in (serve_run(run), load_bundle(exported))
    )
    assert len({tuple(one) for one in expected.values()}) > NUM_USERS // 2
    for user in range(NUM_USERS):
        tries.count(expected[user] == before[user] == after[user] == by_program[user])


@pytest.mark.parametrize("shared", ["exported", "plain"])
@pytest.mark.parametrize("part", ["seen_masked", "seen_allowed"])
def test_recommendations_hit_as_often_as_the_run_measured(request, data, shared, part):
    model = load_bundle(request.getfixturevalue(shared))
    result = model.config.about["metrics"]["test"]
    users = np.arange(NUM_USERS)
    events, at, targets = events_of(Dataset(data), users)
    at = at if model.uses_query_time else None
    table = model.recommend(events, 10, filter_seen=part == "seen_masked", at=at)
    found = lists(table)
    seen = {*zip(events["user_id"].tolist(), events["item_id"].tolist(), strict=True)}
    hits = [target in found[user] for user, target in enumerate(targets)]
    if part == "seen_masked":
        # Evaluation masks no target, also one that was seen.
        is_repeat = [(user, target) in seen for user, target in enumerate(targets)]
        assert not any(hit and repeat for hit, repeat in zip(hits, is_repeat, strict=True))
        assert np.mean(hits) <= result[part]["recall@10"] <= np.mean(np.logical_or(hits, is_repeat))
    else:
        assert np.mean(hits) == pytest.approx(result[part]["recall@10"], abs=1e-12)
        assert result[part]["recall@10"] > 0.2
    scores = table.column("score").to_numpy().reshape(NUM_USERS, 10)
    assert (np.diff(scores) <= 0).all()


WITHOUT_TORCHREC = """
import sys, warnings
warnings.simplefilter("error")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchrec", "fbgemm_gpu", "torchx", "duckdb", "omegaconf"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
import hstu_rec
model = hstu_rec.load_bundle(sys.argv[1])
events = {"user_id": [1, 1], "item_id": ["item 0003", "item 0004"], "timestamp": [10**9, 10**9 + 5]}
found = model.recommend(events, k=4, at=10**9 + 9)
assert found.num_rows == 4 and found.column_names == ["user_id", "rank", "item_id", "score"]
assert not {"torchrec", "fbgemm_gpu"} & {name.split(".")[0] for name in sys.modules}
assert not torch.distributed.is_initialized()
print("done")
"""


def test_a_bundle_works_without_torchrec_and_fbgemm_and_after_its_run_is_gone(exported, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "elsewhere")
    command = [sys.executable, "-c", WITHOUT_TORCHREC, str(moved)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


@pytest.fixture(scope="module")
def model(plain):
    return load_bundle(plain)


def events(*rows):
    return dict(
        zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows, strict=True)), strict=True)
    )


@pytest.mark.fault("R24")
def test_a_k_beyond_the_catalogue_gives_every_unseen_item_once(model):
    given = events(("a", "item 0001", 5), ("a", "item 0002", 6), ("b", "item 0001", 7))
    found = lists(model.recommend(given, 10**9))
    everything = {f"item {number:04d}" for number in range(150)}
    assert {*found["a"]} == everything - {"item 0001", "item 0002"} and len(found["a"]) == 148
    assert {*found["b"]} == everything - {"item 0001"} and len(found["b"]) == 149
    found = lists(model.recommend(given, 10**9, filter_seen=False))
    assert [{*one} for one in found.values()] == [everything, everything]
    assert [len(one) for one in found.values()] == [150, 150]


@pytest.mark.fault("R24")
def test_who_has_seen_everything_gets_nothing_and_no_filler(model):
    rows = [("a", f"item {number:04d}", number) for number in range(150)]
    found = lists(model.recommend(events(*rows, ("b", "item 0001", 1)), 5))
    assert [*found] == ["b"] and len(found["b"]) == 5
    assert model.recommend(events(*rows[1:]), 5).column("item_id").to_pylist() == ["item 0000"]


@pytest.mark.fault("R24")
def test_unknown_items_obey_the_policy(model):
    known = [("a", "item 0001", 5), ("a", "item 0002", 6), ("b", "item 0007", 7)]
    unknown = [("a", f"new {number}", 1) for number in range(7)] * 2
    told = (
        r"14 of 17 events are of 7 items that are not among the model's 150, .*'new 0'.*'new 4'\]"
    )
    with pytest.warns(UserWarning, match=told):
        found = model.recommend(events(*unknown, *known), 5)
    assert found.equals(model.recommend(events(*known), 5))
    with pytest.raises(ValueError, match=told + ".* give on_unknown='warn'"):
        model.recommend(events(*unknown, *known), 5, on_unknown="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.recommend(events(*unknown, *known), 5, on_unknown="ignore").equals(found)
    with pytest.raises(ValueError, match="on_unknown must be one of warn, raise, ignore; got 'no'"):
        model.recommend(events(*known), 5, on_unknown="no")


@pytest.mark.fault("R24")
def test_who_has_no_known_event_gets_no_rows_and_it_is_told(model):
    given = events(("a", "item 0001", 5), ("b", "new", 6), ("c", "new", 7))
    with pytest.warns(
        UserWarning, match=r"2 of 3 users have no event of a known item .*\['b', 'c'\]"
    ):
        found = model.recommend(given, 5, on_unknown="ignore")
    assert {*found.column("user_id").to_pylist()} == {"a"}
    with pytest.warns(UserWarning):
        nothing = model.recommend(events(("b", "new", 6)), 5)
    assert nothing.num_rows == 0 and nothing.schema == found.schema
    assert model.recommend({"user_id": [], "item_id": [], "timestamp": []}, 5).num_rows == 0


def test_the_order_of_rows_and_the_kind_of_columns_do_not_matter(model, data):
    given, _, _ = events_of(Dataset(data), np.arange(50))
    expected = lists(model.recommend(given, 10))
    table = pa.table(given)
    for same in (
        table,
        table.append_column("further", pa.nulls(len(table))),
        table.set_column(1, "item_id", table.column("item_id").dictionary_encode()),
        {name: values.tolist() for name, values in given.items()},
    ):
        found = model.recommend(same, 10)
        assert lists(found) == expected
        assert found.column("user_id").to_pylist()[::10] == [
            *dict.fromkeys(given["user_id"].tolist())
        ]
    assert expected == lists(model.recommend({name: v[::-1] for name, v in given.items()}, 10))


def test_a_users_recommendations_are_those_of_the_user_alone(model, data):
    given, _, _ = events_of(Dataset(data), np.arange(40))
    together = model.recommend(given, 10)
    scores = together.column("score").to_numpy().reshape(-1, 10)
    for place, user in enumerate(dict.fromkeys(given["user_id"].tolist())):
        mine = given["user_id"] == user
        alone = model.recommend({name: values[mine] for name, values in given.items()}, 10)
        np.testing.assert_allclose(alone.column("score"), scores[place], atol=1e-6)


def test_histories_beyond_the_longest_are_cut_to_the_newest_but_none_is_recommended(model):
    old = [("a", f"item {number:04d}", number) for number in range(30)]
    newest = [("a", f"item {number:04d}", 10**6 + number) for number in range(100, 106)]
    both = model.recommend(events(*old, *newest), 120)
    alone = model.recommend(events(*newest), 150)
    is_old = np.isin(alone.column("item_id").to_pylist(), [item for _, item, _ in old])
    kept = alone.filter(pa.array(~is_old)).column("item_id").to_pylist()
    assert both.column("item_id").to_pylist() == kept and len(kept) == 114


def test_what_cannot_be_read_is_told(model):
    good = ("a", "item 0001", 5)
    for given, told in (
        (
            {"user_id": [1]},
            "need the columns user_id, item_id, timestamp; item_id, timestamp missing",
        ),
        (
            {"user_id": [1], "item_id": ["a", "b"], "timestamp": [1]},
            "give columns of equal length, each of one type",
        ),
        (
            events(("a", 3, 5)),
            "item_id holds integers, the model's items are strings, such as 'item ",
        ),
        (events(good, ("a", None, 5)), "item_id: 1 ids are null"),
        (events((1.5, "item 0001", 5)), "user_id: 1 ids are floats that are no whole numbers"),
        (
            events(("a", "item 0001", "yesterday")),
            "timestamp must be integers .*ISO text; got string, such as 'yesterday'",
        ),
        (
            events(good, ("a", "item 0001", 1_700_000_000_000)),
            "timestamps are of several units, from 5 to 1700000000000; give all of them in s,",
        ),
        (events(("a", "item 0001", -1)), "1 timestamps are outside 0"),
    ):
        with pytest.raises(ValueError, match=told):
            model.recommend(given, 5)
    for k in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="k must be a whole number of at least 1; got"):
            model.recommend(events(good), k)


def test_the_time_of_the_request_is_asked_for_where_it_counts(model, exported):
    with_time = load_bundle(exported)
    assert with_time.uses_query_time and not model.uses_query_time
    given = events(("a", "item 0001", 500), ("b", "item 0001", 600))
    with pytest.raises(ValueError, match=r"uses the query time .*: give at, the unix seconds"):
        with_time.recommend(given, 5)
    for at, got in (
        (599, "599 for user 'b'"),
        ({"a": 700}, "None for user 'b'"),
        (1e3, "1000.0 for"),
    ):
        with pytest.raises(ValueError, match=f"at must be unix seconds, .*got {got}"):
            with_time.recommend(given, 5, at=at)
    with pytest.raises(ValueError, match="at has no effect on this model"):
        model.recommend(given, 5, at=700)
    one, other = (with_time.recommend(given, 5, at=at) for at in (700, 700 + 10**6))
    assert one.column("score") != other.column("score")
    assert one.equals(with_time.recommend(given, 5, at={"a": 700, "b": 700}))


def test_an_export_is_whole_or_not_there(run, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(ValueError, match="taken is there already; remove it"):
        export.export(run, taken, ExportConfig())
    (taken / "file").touch()
    told = r"OUT .*/file/out cannot be made \(Not a directory.*\); give a folder where"
    with pytest.raises(NotADirectoryError, match=told):
        export.export(run, taken / "file" / "out", ExportConfig())

    def stop(path):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(export, "sync", stop)
        with pytest.raises(KeyboardInterrupt):
            export.export(run, out, ExportConfig())
    assert not [*tmp_path.glob("out*")]
    (tmp_path / "out.tmp").mkdir()  # of one that was killed
    export.export(run, out, ExportConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "taken"]
    load_bundle(out)


def test_what_is_no_finished_run_is_not_exported(run, tmp_path):
    bare = shutil.copytree(run, tmp_path / "bare")
    (bare / "result.json").unlink()
    (bare / "items.parquet").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"result.json, items.parquet missing; give the folder"
    ):
        export.export(bare, tmp_path / "out", ExportConfig())
    torn = shutil.copytree(run, tmp_path / "torn")
    shard = sorted(torn.glob("checkpoints/step_*/*.distcp"))
    for path in shard:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        export.export(torn, tmp_path / "out", ExportConfig())
    assert not (tmp_path / "out").exists()


def test_a_bundle_holds_known_kinds_of_files_and_says_what_it_is(run, exported):
    names = {
        "README.md",
        "config.json",
        "item_vectors.safetensors",
        "items.parquet",
        "model.safetensors",
        "program.pt2",
    }
    assert {path.name for path in exported.iterdir()} == names
    config = json.loads((exported / "config.json").read_text())
    result = json.loads((run / "result.json").read_text())
    assert config["about"]["metrics"]["test"] == result["test"]
    assert config["about"]["versions"]["trained"] == result["versions"]
    card = (exported / "README.md").read_text()
    assert "| split " in card and "split.kind" not in card  # statistics in words
    for part in (
        "Test: 1,000 users",
        "recall@10",
        "Apache-2.0",
        "at=now",
        result["versions"]["torch"],
    ):
        assert part in card
    assert str(run.parent) not in card + json.dumps(config)


@pytest.mark.fault("R29")
@pytest.mark.parametrize(
    ("version", "told"),
    [
        (
            2,
            "has format_version 2, newer than the 1 .*made with .*trained.*; update hstu_rec, or export",
        ),
        (
            0,
            "has format_version 0, older than the 1 .*read it with the version that made it, or export",
        ),
        ("1", "has format_version '1', where a whole number is wanted"),
        (None, "has format_version None"),
        (True, "has format_version True"),
    ],
)
def test_a_bundle_of_another_version_is_refused(plain, tmp_path, version, told):
    other = shutil.copytree(plain, tmp_path / "other")
    changed(other, format_version=version)
    with pytest.raises(BundleError, match=told):
        load_bundle(other)


GOLDEN = ROOT / "tests" / "golden" / "bundle_v1"


@pytest.mark.fault("R29")
def test_a_bundle_of_this_format_can_always_be_read():
    """Once exported from a run on made events; it is never made anew while its format_version is read."""
    expected = json.loads((ROOT / "tests" / "golden" / "bundle_v1.json").read_text())
    model = load_bundle(GOLDEN)
    for part in ("seen_masked", "seen_allowed"):
        filter_seen = part == "seen_masked"
        found = model.recommend(
            expected["events"], expected["k"], filter_seen=filter_seen
        ).to_pylist()
        for name in ("user_id", "rank", "item_id"):
            assert [row[name] for row in found] == [row[name] for row in expected[part]]
        scores = [row["score"] for row in expected[part]]
        assert [row["score"] for row in found] == pytest.approx(scores, abs=1e-5)


@pytest.mark.fault("R29")
def test_a_map_of_other_items_is_refused(plain, tmp_path):
    other = shutil.copytree(plain, tmp_path / "other")
    table = pq.read_table(other / "items.parquet")
    ids = table.column("item_id").to_pylist()
    swapped = [ids[1], ids[0], *ids[2:]]
    pq.write_table(table.set_column(0, "item_id", pa.array(swapped)), other / "items.parquet")
    with pytest.raises(BundleError, match=r"items.parquet .*(bytes instead|has changed since)"):
        load_bundle(other)
    refreshed(other)
    with pytest.raises(BundleError, match=r"items.parquet: its ids have the hash .* trained on"):
        load_bundle(other)

"""A ranker trained: windows, a rule learned, stops and resumptions, processes, what is not finite."""

import math
import os
import re
import signal

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.data.stream import DataConfig
from hstu_rec.export import ExportConfig, export
from hstu_rec.item_table import local_shards
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.learner import RankLearner
from hstu_rec.ranker.loading import load_ranker
from hstu_rec.ranker.model import RankBatch, RankerConfig
from hstu_rec.ranker.scoring import grouped_auc
from hstu_rec.ranker.training import train_ranker
from hstu_rec.ranker.windows import Windows
from hstu_rec.runs import measured_config
from hstu_rec.signals import Stopped
from hstu_rec.tracking import read_metrics
from hstu_rec.warm_start import former_run
from tests.ranks import run_ranks


def likes(folder, num_users, num_events=40):
    """A user likes even items or odd ones, which the user's ratings tell and nothing else."""
    random = np.random.default_rng(5)
    taste = random.integers(0, 2, num_users)
    user = np.repeat(np.arange(num_users), num_events)
    item = random.integers(0, 20, len(user))
    table = {
        "user_id": user,
        "item_id": item,
        "timestamp": 10**9 + np.tile(np.arange(num_events), num_users) * 60,
        "rating": np.where(item % 2 == taste[user], 5.0, 1.0),
    }
    pq.write_table(pa.table(table), folder / "likes.parquet")
    config = PrepareConfig(feature_columns=["rating"], split="share")
    prepare(config, folder / "likes.parquet", folder / "data")
    return Dataset(folder / "data")


def test_windows_hold_every_training_event_once_and_targets_after_their_history(tmp_path):
    data = likes(tmp_path, 7, 33)
    assert data.train_ends.tolist() == [27] * 7 and data.valid_ends.tolist() == [30] * 7
    windows = Windows(data, RankerConfig(), 8, 5, seed=3)
    for epoch in (0, 1):
        seen = []
        for step in range(windows.num_steps(epoch)):
            scored = windows.batch(epoch, step)
            lengths = scored.batch.offsets.diff()
            assert lengths.max() <= 8 and scored.is_target.all()
            assert scored.num_targets_global == len(scored.labels)
            seen += zip(scored.users.tolist(), scored.batch.timestamps.tolist(), strict=True)
        assert len(seen) == len({*seen}) == 7 * 27
    for split, begin, end in (("valid", 27, 30), ("test", 30, 33)):
        (scored,) = windows.evaluation(split)
        targets = scored.batch.timestamps[scored.is_target]
        expected = [10**9 + 60 * place for place in range(begin, end)]
        assert targets.tolist() == expected * 7
        lasts = scored.batch.timestamps[scored.batch.offsets[1:] - 1]
        assert lasts.tolist() == [expected[-1]] * 7
        assert scored.batch.offsets.diff().tolist() == [8] * 7  # five events, then the targets
        assert set(scored.labels.flatten().tolist()) == {0, 1}


SMALL = [
    "encoder.dim=16",
    "encoder.max_history_len=24",
    "data.batch_windows=16",
    "ranker.categories=[rating]",
    "train.device=cpu",
]


def test_a_rule_that_the_history_alone_tells_is_learned(tmp_path):
    likes(tmp_path, 100)
    settings = [
        *SMALL,
        f"data.path={tmp_path}/data",
        f"train.run_dir={tmp_path}/run",
        "train.max_epochs=5",
        "optim.lr=1e-2",
        "encoder.dropout=0",
    ]
    result = train_ranker(load(RankRunConfig, settings))
    figures = result["test"]["rating>=4"]
    assert figures["auc"] > 0.97 and figures["gauc"] > 0.97 and figures["ne"] < 0.5
    assert figures["num_events"] == 100 * 4
    report = (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "](curves.png)" in report
        and "rating>=4  test" in report
        and (tmp_path / "run" / "checkpoints" / "best").is_file()
    )
    with pytest.raises(ValueError, match="holds a run already"):
        train_ranker(load(RankRunConfig, settings))
    check_refused(tmp_path / "run", tmp_path / "out")
    check_loaded(tmp_path / "run", Dataset(tmp_path / "data"))


def check_refused(run, output):
    """What is for runs of the next-item model says what this is."""
    settings = RunConfig(data=DataConfig(path="x"))
    for wanted in (
        lambda: export(run, output, ExportConfig()),
        lambda: measured_config(run, []),
        lambda: former_run(str(run)).check(settings),
    ):
        with pytest.raises(
            ValueError, match=r"is a run of apps/train_ranker\.py; .*load_ranker reads"
        ):
            wanted()


def check_loaded(run, data):
    """A run is loaded without a process group, and scores what comes after each user's training events."""
    ranker = load_ranker(run)
    assert ranker.terms.tasks == ["rating>=4"]
    assert ranker.terms.items.ids.to_pylist() == list(range(20))
    events = pq.read_table(run.parent / "likes.parquet").to_pandas()
    events = events.sort_values(["user_id", "timestamp"])
    place = events.groupby("user_id").cumcount()
    past, wanted = events[place < 32], events[place == 32]
    # In any order, with a user of whom nothing is known.
    past = past.sample(frac=1, random_state=1)
    asked = pandas.concat([wanted, wanted.head(1).assign(user_id=10**6)])[["user_id", "item_id"]]
    found = ranker.score(past, asked.sample(frac=1, random_state=2))
    found = found.merge(wanted, on=["user_id", "item_id"])
    liked = (found["rating"] >= 4).to_numpy(dtype=float)
    none = np.zeros(data.num_users, dtype=np.int64)
    assert grouped_auc(found["rating>=4"].to_numpy(), liked, none)[0] > 0.97
    assert 0 < ranker.score(past, asked)["rating>=4"].iloc[-1] < 1
    check_scores(ranker, past, asked)
    kept = (run / "features.json").read_text()
    (run / "features.json").write_text(kept.replace('"item_map_hash": "', '"item_map_hash": "0'))
    with pytest.raises(ValueError, match="does not hold the items that were trained on"):
        load_ranker(run)
    (run / "features.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"features\.json missing"):
        load_ranker(run)


def check_scores(ranker, past, asked):
    """Scores are those of tensors, of the newest events alone; and what is wrong is told."""
    (user,) = past["user_id"].iloc[:1]
    own = past[past["user_id"] == user].sort_values("timestamp").tail(ranker.terms.longest)
    history = RankBatch(
        torch.tensor(own["item_id"].tolist()),
        torch.tensor(own["timestamp"].tolist()),
        torch.tensor([0, len(own)]),
        context={},
        outcomes={"rating": torch.tensor(own["rating"].tolist())},
    )
    newest = int(own["timestamp"].max())
    expected = ranker.model.score_candidates(
        torch.arange(20),
        torch.tensor([20]),
        ranker.model.encode_history(history),
        torch.tensor([newest]),
    )
    mine = {"user_id": [user] * 20, "item_id": [*range(20)]}
    found = ranker.score(past, mine)
    np.testing.assert_allclose(found["rating>=4"], expected[:, 0], rtol=1e-5)
    assert ranker.score(past, mine, at={user: newest}).equals(found)
    for events, candidates, at, told in [
        (
            past,
            {"user_id": [1], "item_id": [77]},
            None,
            r"1 of 1 are of items .* does not know, such as \[77\]",
        ),
        (
            past,
            {"user_id": ["a"], "item_id": [7]},
            None,
            "user_id: histories have integers, candidates strings",
        ),
        (
            past,
            {"user_id": [1], "item_id": ["7"]},
            None,
            "item_id holds strings, the model's items are integers",
        ),
        (
            past.drop(columns="rating"),
            mine,
            None,
            "histories need the columns .*; rating missing, there are",
        ),
        (past.assign(rating="x"), mine, None, "'rating' must be numbers; got"),
        (past, mine, newest - 1, "not before a user's newest event; got"),
        (past, mine, {}, "at has no time for 1 users"),
    ]:
        with pytest.raises(ValueError, match=told):
            ranker.score(events, candidates, at=at)
    with pytest.warns(UserWarning, match="1 events are of items that the model does not know"):
        ranker.score(pandas.concat([past, past.head(1).assign(item_id=99)]), mine)
    assert ranker.score(past, {"user_id": [], "item_id": []}).num_rows == 0


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(tmp_path, capsys):
    likes(tmp_path, 30)
    settings = [*SMALL, f"data.path={tmp_path}/data", "optim.lr=1e-2", "train.patience=0"]
    whole = [*settings, f"train.run_dir={tmp_path}/whole", "train.max_epochs=4"]
    wanted = train_ranker(load(RankRunConfig, whole))
    parts = [*settings, f"train.run_dir={tmp_path}/parts"]
    train_ranker(load(RankRunConfig, [*parts, "train.max_epochs=2"]))
    again = [*parts, "train.max_epochs=4", "train.resume=auto"]
    found = train_ranker(load(RankRunConfig, again))
    assert "epoch 2, batch 0, step" in capsys.readouterr().out
    assert found["test"] == wanted["test"] and found["valid"] == wanted["valid"]
    assert found["timing"]["num_steps"] == wanted["timing"]["num_steps"]
    losses = [
        [
            (row["step"], row["loss"])
            for row in read_metrics(tmp_path / run)
            if row["kind"] == "train"
        ]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"encoder\.dropout was") as caught:
        train_ranker(load(RankRunConfig, [*again, "encoder.dropout=0.5"]))
    assert "warm_start" not in str(caught.value)


def stopped_at(step, settings):
    """A run that rank 1 is asked to stop in the middle of an epoch; what it then says."""
    own_step = RankLearner.step

    def counted(learner, epoch, index, number, *asked):
        if number == step and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return own_step(learner, epoch, index, number, *asked)

    RankLearner.step = counted
    try:
        train_ranker(load(RankRunConfig, settings))
    except Stopped as stopped:
        return str(stopped)
    return "it was not stopped"


def test_a_run_of_two_that_is_stopped_in_mid_epoch_goes_on_as_one(tmp_path):
    likes(tmp_path, 30)
    settings = [*SMALL, f"data.path={tmp_path}/data", "train.max_epochs=3", "encoder.dropout=0"]
    wanted = train_ranker(load(RankRunConfig, [*settings, f"train.run_dir={tmp_path}/whole"]))
    steps = wanted["timing"]["num_steps"]
    parts = [*settings, f"train.run_dir={tmp_path}/parts"]
    told = run_ranks(2, stopped_at, steps // 2, parts)
    assert all(
        re.match(r"stopped at step \d+, saved; the same command goes on", one) for one in told
    )
    found = train_ranker(load(RankRunConfig, [*parts, "train.resume=auto"]))
    assert found["timing"]["num_steps"] == steps
    for split in ("valid", "test"):
        assert found[split]["rating>=4"] == pytest.approx(wanted[split]["rating>=4"], rel=1e-4)


def test_a_task_of_one_label_is_told_before_training(tmp_path):
    likes(tmp_path, 10, 30)
    settings = [*SMALL, f"data.path={tmp_path}/data", f"train.run_dir={tmp_path}/run"]
    with pytest.raises(ValueError, match="all labels of the 30 validation events are the same"):
        train_ranker(load(RankRunConfig, [*settings, "ranker.tasks=[rating>=4,rating>=0]"]))
    assert not (tmp_path / "run").exists()


def test_an_event_without_a_label_is_no_example(tmp_path):
    """What has no rating adds nothing to the loss, and figures are those of the rest."""
    likes(tmp_path, 20, 30)
    table = pq.read_table(tmp_path / "likes.parquet").to_pandas()
    table["view"] = table["rating"]
    table.loc[::3, "rating"] = np.nan
    table.to_parquet(tmp_path / "holes.parquet")
    config = PrepareConfig(feature_columns=["rating", "view"], split="share", overwrite=True)
    prepare(config, tmp_path / "holes.parquet", tmp_path / "data")
    settings = [*SMALL, f"data.path={tmp_path}/data", "ranker.tasks=[rating>=4,view>=4]"]
    with distributed.process_group("cpu") as device:
        learner = RankLearner(load(RankRunConfig, settings), Dataset(tmp_path / "data"), device)
        learner.check_labels()
        scored = learner.windows.batch(0, 0)
        lacks = scored.labels[:, 0].isnan()
        assert 0 < int(lacks.sum()) < len(lacks) and not scored.labels[:, 1].isnan().any()
        logits = torch.zeros(len(lacks), 2, requires_grad=True)
        learner._loss(logits, scored).backward()
        assert (logits.grad[:, 0] == 0).tolist() == lacks.tolist() and logits.grad[:, 1].all()
        figures = learner.evaluate("test")
        assert figures["rating>=4"]["num_events"] < figures["view>=4"]["num_events"] == 20 * 3
        assert all(figures[task]["auc"] is not None for task in figures)
        assert math.isfinite(learner.step(0, 0, 0).loss)


def losses_and_figures(path, history):
    settings = [*SMALL, "encoder.dropout=0", f"ranker.history={history}", f"data.path={path}/data"]
    learner = RankLearner(
        load(RankRunConfig, settings), Dataset(path / "data"), torch.device("cpu")
    )
    losses = [learner.step(0, index, index).loss for index in range(4)]
    return losses, learner.evaluate("test")["rating>=4"]


@pytest.mark.parametrize("history", ["hstu", pytest.param("pooled", marks=pytest.mark.slow)])
def test_two_processes_train_and_measure_as_one(history, tmp_path):
    likes(tmp_path, 20, 30)
    ((losses, figures),) = run_ranks(1, losses_and_figures, tmp_path, history)
    for its_losses, its_figures in run_ranks(2, losses_and_figures, tmp_path, history):
        assert its_losses == pytest.approx(losses, rel=1e-5)
        assert its_figures == pytest.approx(figures, rel=1e-4)


def test_a_weight_that_is_not_finite_stops_before_a_row_changes(tmp_path):
    likes(tmp_path, 20, 30)
    settings = [*SMALL, f"data.path={tmp_path}/data"]
    with distributed.process_group("cpu") as device:
        learner = RankLearner(load(RankRunConfig, settings), Dataset(tmp_path / "data"), device)
        learner.step(0, 0, 0)
        before = [rows.clone() for rows, _ in local_shards(learner.model)]
        with torch.no_grad():
            learner.dense[0].fill_(math.nan)
        with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
            learner.step(0, 1, 1)
        for rows, (now, _) in zip(before, local_shards(learner.model), strict=True):
            assert torch.equal(rows, now)

"""Runs that are stopped and go on: nothing repeated, nothing left out, the same to the last bit."""

import json
import os
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hstu_rec import checkpoint, training
from hstu_rec.checkpoint import Saver
from hstu_rec.checkpoint.storage import StorageReader
from hstu_rec.config import RunConfig, load
from hstu_rec.learner import Learner
from hstu_rec.loss import LossConfig
from hstu_rec.signals import RETRY_CODE, Stopped
from hstu_rec.trainer import train
from hstu_rec.training import Training
from tests.datasets import write_dataset
from tests.ranks import run_ranks

NUM_EPOCHS = 20
SETTINGS = (
    "encoder.dim=8", "encoder.max_history_len=9", "encoder.dropout=0.3", "data.batch_users=8",
    "optim.schedule=cosine", "loss.num_negatives=12", "loss.use_seen_bias=true", "train.patience=0",
    "train.device=cpu", "train.log_every_steps=1", f"train.max_epochs={NUM_EPOCHS}",
    "train.eval_every_epochs=7", "train.resume=auto", "eval.with_baselines=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """77 users (10 steps an epoch, the last of 5) of 4 to 14 events, of 30 items."""
    random = np.random.default_rng(5)
    sequences = [random.integers(0, 30, n).tolist() for n in random.integers(4, 15, 77)]
    path = tmp_path_factory.mktemp("resume") / "data"
    write_dataset(path, sequences, num_items=30)
    return path


def train_once(data, folder, *settings):
    paths = (f"data.path={data}", f"train.run_dir={folder}")
    return train(load(RunConfig, [*SETTINGS, *paths, *settings]))


def train_until(stop_after, data, folder, *settings, stops_on=0):
    """Trains until rank `stops_on` gets a SIGTERM in a step; (epoch, batch, users) of the steps."""
    steps, whole = [], Learner.step

    def step_and_stop(learner, epoch, index, step, *rest):
        users, _, _ = learner.stream._dealt(epoch, index)
        steps.append((epoch, index, users.tolist()))
        done = whole(learner, epoch, index, step, *rest)
        if step == stop_after and dist.get_rank() == stops_on:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    Learner.step = step_and_stop
    try:
        train_once(data, folder, *settings)
    except Stopped as stopped:
        assert stopped.exit_code == RETRY_CODE and "train.resume=auto" in str(stopped)
    finally:
        Learner.step = whole
    return steps


def saved(path):
    """All tensors of a checkpoint, whole."""
    entries = StorageReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    checkpoint.load(path, state)
    return state


def assert_same(one, other):
    first, second = saved(one), saved(other)
    assert first.keys() == second.keys() and len(first) > 10
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def whole(data):
    """A run that nothing stopped, on one process, and its result."""
    folder = data.parent / "whole"
    return folder, train_once(data, folder)


def newest(folder):
    return max((folder / "checkpoints").glob("step_*"))


@pytest.mark.fault("R1")
def test_a_run_stopped_in_mid_epoch_ends_as_if_it_had_not_been(data, whole, tmp_path):
    folder, result = whole
    # Asked in the midst of a step, the run ends with the next.
    assert len(train_until(77, data, tmp_path / "run")) == 79
    assert newest(tmp_path / "run").name == "step_00000079"
    resumed = train_once(data, tmp_path / "run")
    assert newest(tmp_path / "run").name == newest(folder).name == f"step_{10 * NUM_EPOCHS:08d}"
    assert_same(newest(tmp_path / "run"), newest(folder))
    assert losses(tmp_path / "run") == losses(folder)
    assert resumed["test"] == result["test"]


@pytest.mark.fault("R9")
def test_a_run_stopped_while_it_measures_measures_again(data, whole, tmp_path, monkeypatch):
    folder, result = whole
    looked, look = [], Training.stop_if_asked

    def ask(training):
        looked.append(training.progress.step)
        if len(looked) in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        look(training)

    monkeypatch.setattr(Training, "stop_if_asked", ask)
    for _ in range(2):
        with pytest.raises(Stopped):
            train_once(data, tmp_path / "run")
    assert train_once(data, tmp_path / "run")["test"] == result["test"]
    # In the second validation, and in what is measured last.
    assert looked[1:3] == [140, 140] and looked[4:6] == [200, 200]
    assert_same(newest(tmp_path / "run"), newest(folder))
    for name in ("best", "last"):
        pointers = (one / "checkpoints" / name for one in (folder, tmp_path / "run"))
        assert len({pointer.read_text() for pointer in pointers}) == 1


@pytest.mark.fault("R2")
def test_two_stops_in_an_epoch_repeat_and_leave_out_no_user(data, tmp_path):
    steps = []
    for stop_after in (22, 26, 10**9):
        steps += train_until(stop_after, data, tmp_path / "run")
    assert [(epoch, index) for epoch, index, _ in steps] == [
        (epoch, index) for epoch in range(NUM_EPOCHS) for index in range(10)
    ]
    for epoch in range(NUM_EPOCHS):
        users = Counter(user for at, _, users in steps if at == epoch for user in users)
        assert users == dict.fromkeys(range(77), 1)


@pytest.mark.slow
def test_one_rank_that_is_asked_stops_all_and_they_go_on_to_the_last_bit(data):
    undisturbed, stopped = data.parent / "two", data.parent / "two_stopped"
    run_ranks(2, train_once, data, undisturbed)
    for rank, stop_after in enumerate((33, 70)):
        lengths = run_ranks(2, count_steps, stop_after, data, stopped, rank)
        assert len(set(lengths)) == 1
    run_ranks(2, train_once, data, stopped)
    assert losses(stopped) == losses(undisturbed)
    assert_same(newest(stopped), newest(undisturbed))


def saves_by_a_clock(data, folder):
    """Steps at which this rank saves; the clock of rank 1 goes 6000 times as fast."""
    steps, save = [], Saver.save
    faster = 6000 if dist.get_rank() == 1 else 1
    training.time = SimpleNamespace(monotonic=lambda: faster * time.monotonic())

    def noted(saver, step, *rest):
        steps.append(step)
        return save(saver, step, *rest)

    Saver.save = noted
    train_once(data, folder, "checkpoint.every_minutes=5", "train.max_epochs=6")
    return steps


def test_ranks_whose_clocks_differ_save_together(data, tmp_path):
    first, second = run_ranks(2, saves_by_a_clock, data, tmp_path / "run")
    # The one validation, at the end, is one of them.
    assert first == second and len(first) > 3 and first[-1] == 60


def count_steps(stop_after, data, folder, stops_on):
    return len(train_until(stop_after, data, folder, stops_on=stops_on))


# Dropout is drawn by each rank for its own users.
STILL = ("encoder.dropout=0",)


def stop_at(stop_after, data, folder, *settings):
    train_until(stop_after, data, folder, *STILL, *settings)


@pytest.mark.fault("R3")
@pytest.mark.slow
def test_a_run_goes_on_at_other_numbers_of_processes(data, tmp_path):
    run_ranks(2, stop_at, 99, data, tmp_path / "same")
    for world_size, stop_after in ((2, 33), (1, 66), (4, 99)):
        run_ranks(world_size, stop_at, stop_after, data, tmp_path / "other")
    expected, found = losses(tmp_path / "same"), losses(tmp_path / "other")
    assert list(found) == list(expected) == list(range(101))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.fault("R4")
def test_another_sharding_plan_loads_the_whole_table_and_its_state(data, tmp_path):
    folder = tmp_path / "run"
    run_ranks(2, stop_at, 33, data, folder, "table.sharding=row_wise")
    before = newest(folder)
    # Asked to stop at its first step, it saves what it has loaded and one step.
    kept = saved(before)
    run_ranks(3, save_again, data, folder, tmp_path / "again", "table.sharding=table_wise")
    (again,) = (tmp_path / "again").glob("step_*")
    loaded = saved(again)
    assert kept.keys() == loaded.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, loaded[name]), name
    assert any("embeddings.item.weight" in name and "fused" in name for name in kept)


def save_again(data, folder, root, *settings):
    """Loads the newest checkpoint of a run under another plan and saves it elsewhere."""

    def save(learner, epoch, index, step, *rest):
        checkpoint.save(root, step, learner.state(), {})
        raise KeyError("that is all")

    Learner.step = save
    with pytest.raises(KeyError):
        train_once(data, folder, *STILL, *settings)


CHANGES = {
    "loss.temperature=0.2": f"loss.temperature was {LossConfig().temperature} and is 0.2",
    "train.seed=2": "train.seed was 1 and is 2",
    "encoder.dim=16": "encoder.dim was 8 and is 16",
}


def refusal(data, folder, *settings):
    with pytest.raises(checkpoint.CheckpointError) as raised:
        train_once(data, folder, *settings)
    return str(raised.value)


@pytest.mark.fault("R1")
def test_a_run_is_not_gone_on_with_under_other_settings_or_data_unless_told(data, tmp_path, capsys):
    folder = tmp_path / "run"
    train_until(22, data, folder)
    config = (folder / "config.yaml").read_text()
    for setting, sentence in CHANGES.items():
        found = refusal(data, folder, setting)
        assert sentence in found and "train.resume_changed=true" in found
    random = np.random.default_rng(5)
    sequences = [random.integers(0, 30, n).tolist() for n in random.integers(4, 15, 78)]
    write_dataset(tmp_path / "other", sequences, num_items=30)
    other = f"data.path={tmp_path / 'other'}"
    assert "the data's users was 77 and is 78" in refusal(data, folder, other)
    # As many events, of the same users and times, of other items.
    again = np.random.default_rng(5)
    sequences = [again.integers(0, 30, n).tolist() for n in again.integers(4, 15, 77)]
    sequences[0][0] = (sequences[0][0] + 1) % 30
    write_dataset(tmp_path / "like", sequences, num_items=30)
    like = refusal(data, folder, f"data.path={tmp_path / 'like'}")
    assert "the data's events.arrow was" in like and "the data's users" not in like
    assert (folder / "config.yaml").read_text() == config
    capsys.readouterr()
    train_until(25, data, folder, other, "train.seed=2", "train.resume_changed=true")
    told = capsys.readouterr().out
    assert "changed since: train.seed was 1 and is 2" in told
    assert "epoch 2 begins again" in told


def test_settings_that_change_no_batch_are_free(data, tmp_path):
    train_until(12, data, tmp_path / "run")
    free = ("train.patience=3", "checkpoint.keep=1", "eval.ks=[10]", "name=other")
    assert len(train_until(15, data, tmp_path / "run", *free)) == 3


@pytest.mark.fault("R8")
def test_a_pointer_moves_only_when_what_it_names_is_durable(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = checkpoint.storage.StorageWriter.write_data

    def slowly(*arguments):
        assert may_write.wait(60)
        return write(*arguments)

    config = checkpoint.CheckpointConfig()
    state = {"table": torch.arange(6.0)}
    with checkpoint.Saver(tmp_path, config) as saver:
        saver.save(1, state, {"step": 1})
        saver.wait()
        monkeypatch.setattr(checkpoint.storage.StorageWriter, "write_data", slowly)
        saver.save(2, state, {"step": 2})
        state["table"] += 100  # training goes on meanwhile
        assert (tmp_path / "last").read_text() == "step_00000001\n"
        assert checkpoint.newest(tmp_path) == (tmp_path / "step_00000001", [])
        may_write.set()
    assert checkpoint.resolve(tmp_path, "last") == tmp_path / "step_00000002"
    assert torch.equal(saved(tmp_path / "step_00000002")["table"], torch.arange(6.0))

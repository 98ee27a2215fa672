"""Faults in numbers, injected on one of two ranks: a guarded step changes nothing on any."""

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hstu_rec import checkpoint, distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.guards import Asked
from hstu_rec.learner import Learner
from hstu_rec.trainer import evaluate_run, train
from tests.datasets import write_dataset
from tests.faults.not_finite import injected, trained
from tests.ranks import run_ranks

NUM_ITEMS = 40
KINDS = (".model.", ".dense.", ".fused.")
NOT_FINITE = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "too large to square": 1e30
}  # fmt: skip
FAST = "rowwise_adagrad, seen bias, calendar"
SETTINGS = {
    FAST: ["loss.use_seen_bias=true", "encoder.calendar=day"],
    "adagrad, table-wise": ["table.optimizer=adagrad", "table.sharding=table_wise"],
    "sgd, softmax, recomputed": [
        "table.optimizer=sgd",
        "encoder.attention=softmax",
        "train.recompute=true",
        "loss.negatives=all",
        "loss.num_negatives=1024",  # none is drawn
    ],
    "no clipping, weight decay, queries travel": [
        "optim.clip_norm=0",
        "optim.weight_decay=0.1",
        "loss.exchange=queries",
    ],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """32 users of 3 to 16 events."""
    random = np.random.default_rng(5)
    items = [random.integers(0, NUM_ITEMS, n).tolist() for n in random.integers(3, 17, 32)]
    folder = tmp_path_factory.mktemp("numbers") / "data"
    write_dataset(folder, items, num_items=NUM_ITEMS)
    return folder


def learner_of(path, settings):
    sizes = ["encoder.dim=8", "encoder.max_history_len=10", "data.batch_users=7"]
    options = [f"data.path={path}", *sizes, "loss.num_negatives=20", "train.device=cpu", *settings]
    return Learner(load(RunConfig, options), Dataset(path), torch.device("cpu"))


def hashes(learner):
    """SHA-256 of the rows, their optimizer's state, the dense weights and AdamW's state on this rank."""
    as_bytes = {name: value.detach().numpy().tobytes() for name, value in trained(learner).items()}
    return {name: hashlib.sha256(value).hexdigest() for name, value in as_bytes.items()}


def guarded_steps(path, settings, values):
    """(where, value, sentence, whether all is as before, kinds that a good step changes) of each fault."""
    learner, found = learner_of(path, settings), []
    learner.step(0, 0, 0)
    faults = [(where, value) for where in ("loss", "rows") for value in values]
    faults += [(index, math.nan) for index in range(len(learner.dense))]
    for where, value in faults:
        before = hashes(learner)
        with injected(learner, where, value, 1), pytest.raises(FloatingPointError) as raised:
            learner.step(0, 1, 1)
        is_same = hashes(learner) == before
        learner.step(0, 1, 1)
        after = hashes(learner)
        moved = {kind for kind in KINDS for n in before if kind in n and after[n] != before[n]}
        found.append((where, value, str(raised.value), is_same, moved))
    return found


def faults_on_two_ranks(path, settings):
    """`guarded_steps` of both ranks, fault by fault."""
    ranks = run_ranks(2, guarded_steps, path, settings, list(NOT_FINITE.values()))
    return list(zip(*ranks, strict=True))


@pytest.fixture(scope="module")
def faults(path):
    """Those of the quick settings."""
    return faults_on_two_ranks(path, SETTINGS[FAST])


def count(faults, settings, tries):
    """Counts the tries of both ranks."""
    # SGD's rows have no state.
    moving = set(KINDS[:2] if "table.optimizer=sgd" in settings else KINDS)
    for of_both in faults:
        assert set().union(*(one[-1] for one in of_both)) == moving
        for where, value, sentence, is_same, _ in of_both:
            is_loss = where == "loss" and abs(value) != 1e30
            what = f"the loss is {value}" if is_loss else "a gradient is not finite, of a loss of "
            told = "at step 1 (epoch 0, batch 1); nothing was changed by it" in sentence
            tries.count(sentence.startswith(what) and told and is_same)


@pytest.mark.fault("R12")
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any(faults, tries):
    count([one for one in faults if one[0][0] == "loss"], SETTINGS[FAST], tries)


@pytest.mark.fault("R13")
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(faults, tries):
    """Of the rows alone, and of each dense parameter alone."""
    count([one for one in faults if one[0][0] != "loss"], SETTINGS[FAST], tries)
    assert tries.num_tried > 2 * (len(NOT_FINITE) + 10)


@pytest.mark.slow
@pytest.mark.fault("R13")
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != FAST])
def test_so_it_is_with_other_optimizers_and_encoders(path, name, tries):
    faults = faults_on_two_ranks(path, SETTINGS[name])
    count([one for one in faults if one[0][0] != "loss"], SETTINGS[name], tries)


def skipping(path, is_late):
    """(steps told to be skipped, whether the end is that of a run without them, the sentence beyond the
    bound)."""
    often = ["guard.on_nonfinite=skip", "guard.max_skipped_steps=2"]
    plain, learner = learner_of(path, often), learner_of(path, often)
    learner.guard._is_late = is_late  # as on CUDA
    place, told = [(0, index, index) for index in range(4)], []
    for step in (0, 2):
        plain.step(*place[step])
    learner.step(*place[0])
    for where in ("rows", 0):
        with injected(learner, where, math.nan, 1):
            told.append(learner.step(*place[1]))
    told.append(learner.step(*place[2]))
    is_equal = hashes(learner) == hashes(plain)
    with injected(learner, "loss", math.nan, 1), pytest.raises(FloatingPointError) as raised:
        for _ in range(3):
            told.append(learner.step(*place[3]))
    return [one.skipped for one in told], is_equal, str(raised.value)


def late_sentence(path):
    """Whether a step whose gradient was not finite changed anything, and what the next one raised."""
    learner = learner_of(path, [])
    learner.guard._is_late = True
    learner.step(0, 0, 0)
    before = hashes(learner)
    with injected(learner, "rows", math.inf, 1):
        learner.step(0, 1, 1)
    is_same = hashes(learner) == before
    with pytest.raises(FloatingPointError) as raised:
        learner.step(0, 2, 2)
    return is_same, str(raised.value)


def waiting(path):
    """Whether rows stayed though they were given no zeros, and what the host raised within backward."""
    learner = learner_of(path, [])
    learner.guard._waits = True
    learner.guard.keep = lambda grad: grad if learner.guard.is_finite() else None
    learner.step(0, 0, 0)
    before = hashes(learner)
    with injected(learner, "rows", math.nan, 1), pytest.raises(FloatingPointError) as raised:
        learner.step(0, 1, 1)
    return hashes(learner) == before, str(raised.value)


def stops(path):
    """Whether four steps tell of a stop, of which rank 1 asks at the third."""
    learner = learner_of(path, [])
    is_asking = [distributed.rank() == 1 and index == 2 for index in range(4)]
    return [learner.step(0, i, i, Asked(stop=asks)).asked.stop for i, asks in enumerate(is_asking)]


def all_told(path):
    return {
        "at once": skipping(path, is_late=False),
        "a step later": skipping(path, is_late=True),
        "late": late_sentence(path),
        "waiting": waiting(path),
        "stops": stops(path),
    }


@pytest.fixture(scope="module")
def told(path):
    """`all_told` by rank."""
    return run_ranks(2, all_told, path)


@pytest.mark.fault("R12")
@pytest.mark.fault("R13")
@pytest.mark.parametrize("when", ["at once", "a step later"])
def test_skipped_steps_are_as_if_they_had_not_been_and_told_up_to_a_bound(told, when):
    for rank in told:
        skipped, is_equal, sentence = rank[when]
        assert is_equal
        expected = [(1,), (1,), ()] if when == "at once" else [(), (1,), (1,)]
        assert skipped == [*expected, (3,), (3,)]
        assert "the loss is nan at step 3 (epoch 0, batch 3)" in sentence
        assert "3 steps in a row were not finite, and guard.max_skipped_steps is 2" in sentence


@pytest.mark.fault("R13")
@pytest.mark.parametrize("host", ["late", "waiting"])
def test_a_host_that_reads_the_guard_later_or_waits_for_it_names_the_right_step(told, host):
    """A host waits for the rows of an optimizer that a gradient of 0 moves."""
    for rank in told:
        is_same, sentence = rank[host]
        assert is_same and "a gradient is not finite" in sentence
        assert "at step 1 (epoch 0, batch 1)" in sentence


def test_a_stop_that_one_rank_asks_for_is_known_to_all_at_the_same_step(told):
    assert [rank["stops"] for rank in told] == [[False, False, True, False]] * 2


def small_run(data: Path, folder: Path, *settings: str):
    """A run with dot products, which the normal recipe's cosine would keep from diverging."""
    sizes = ["encoder.dim=16", "encoder.max_history_len=12", "data.batch_users=32"]
    loss = ["loss.similarity=dot", "loss.temperature=1", "loss.num_negatives=50"]
    often = ["train.eval_every_epochs=1", "train.patience=0", "train.resume=auto"]
    paths = [f"data.path={data}", f"train.run_dir={folder}", "train.device=cpu"]
    return train(load(RunConfig, [*sizes, *loss, *often, *paths, *settings]))


def runs_until_it_diverges(data: Path, folder: Path):
    """(test metrics of a good run, of its best checkpoint after it went on and diverged; the sentence, as
    which the run then goes on)."""
    good = small_run(data, folder, "train.max_epochs=10", "optim.lr=0.01", "table.lr=0.1")
    best = checkpoint.resolve(folder / "checkpoints", "best")
    fast = ("optim.lr=1", "table.lr=10", "train.resume_changed=true")
    with pytest.raises(FloatingPointError) as raised:
        small_run(data, folder, "train.max_epochs=60", *fast)
    assert checkpoint.resolve(folder / "checkpoints", "best") == best
    kept = evaluate_run(folder, [])["test"]
    told = re.findall(r"train\.\w+=\S+", str(raised.value))
    assert told[1:] == [f"train.resume={best}", "train.resume_changed=true"]
    small_run(data, folder, *told, "train.max_epochs=11", "optim.lr=0.005", "table.lr=0.05")
    return good["test"], kept, str(raised.value)


@pytest.mark.fault("R14")
@pytest.mark.slow
def test_rates_a_hundred_times_too_high_raise_an_alarm_and_the_best_checkpoint_is_kept(tmp_path):
    random = np.random.default_rng(3)
    first = random.integers(0, 60, 160)
    # Items follow one another, most of the time.
    events = [(n + np.arange(14) + (random.random(14) < 0.2)) % 60 for n in first]
    write_dataset(tmp_path / "data", [one.tolist() for one in events], num_items=60)
    arguments = tmp_path / "data", tmp_path / "run"
    for good, again, sentence in run_ranks(2, runs_until_it_diverges, *arguments):
        assert sentence.startswith("training diverges: the loss is ")
        assert "lower optim.lr or table.lr, or" in sentence
        assert again == good

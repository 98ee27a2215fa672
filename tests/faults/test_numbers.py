"""Faults in numbers, injected on one of two ranks: a guarded step changes nothing on any."""

import hashlib
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from hstu_rec import checkpoint, distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.item_table import shards_of
from hstu_rec.learner import Learner
from hstu_rec.trainer import evaluate_run, train
from tests.datasets import write_dataset
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
    ],
    "no clipping, weight decay, queries travel": [
        "optim.clip_norm=0",
        "optim.weight_decay=0.1",
        "loss.exchange=queries",
    ],
}


@pytest.fixture
def path(tmp_path):
    """32 users of 3 to 16 events."""
    random = np.random.default_rng(5)
    items = [random.integers(0, NUM_ITEMS, n).tolist() for n in random.integers(3, 17, 32)]
    write_dataset(tmp_path / "data", items, num_items=NUM_ITEMS)
    return tmp_path / "data"


def learner_of(path, settings):
    sizes = ["encoder.dim=8", "encoder.max_history_len=10", "data.batch_users=7"]
    options = [f"data.path={path}", *sizes, "loss.num_negatives=20", "train.device=cpu", *settings]
    return Learner(load(RunConfig, options), Dataset(path), torch.device("cpu"))


def parts_of(name, value):
    """(name, tensor) of all that this rank holds of nested state, shards by their first row."""
    if isinstance(value, dict):
        for inner, one in value.items():
            yield from parts_of(f"{name}.{inner}", one)
    elif hasattr(value, "to_local") or hasattr(value, "local_shards"):
        yield from ((f"{name} {first}", rows) for rows, first in shards_of(value))
    else:
        yield name, value


def hashes(learner):
    """SHA-256 of the rows, their optimizer's state, the dense weights and AdamW's state on this rank."""
    parts = dict(parts_of("", learner.state()))
    as_bytes = {name: value.detach().numpy().tobytes() for name, value in parts.items()}
    return {name: hashlib.sha256(value).hexdigest() for name, value in as_bytes.items()}


@contextmanager
def injected(learner, where, value):
    """Puts `value` on rank 1 into the loss, or one element of a gradient: of the rows as they are used, on
    which no other gradient depends, or of a dense parameter."""
    is_here, model = distributed.rank() == 1, learner.inputs._model

    def damaged(grad):
        flat = grad.reshape(-1).clone()
        flat[0] = value
        return flat.view_as(grad) if is_here else grad

    def dense(gathered, *inputs):
        if where == "rows":
            gathered.register_hook(damaged)
        loss = whole(gathered, *inputs)
        return loss + value if where == "loss" and is_here else loss

    if isinstance(where, int):
        handle = learner.dense[where].register_hook(damaged)
        yield
        handle.remove()
    else:
        whole, model.dense = model.dense, dense
        yield
        model.dense = whole


def guarded_steps(path, settings, values):
    """(where, value, sentence, whether all is as before, kinds that a good step changes) of each fault."""
    learner, found = learner_of(path, settings), []
    learner.step(0, 0, 0)
    faults = [(where, value) for where in ("loss", "rows") for value in values]
    faults += [(index, math.nan) for index in range(len(learner.dense))]
    for where, value in faults:
        before = hashes(learner)
        with injected(learner, where, value), pytest.raises(FloatingPointError) as raised:
            learner.step(0, 1, 1)
        is_same = hashes(learner) == before
        learner.step(0, 1, 1)
        after = hashes(learner)
        moved = {kind for kind in KINDS for n in before if kind in n and after[n] != before[n]}
        found.append((where, value, str(raised.value), is_same, moved))
    return found


def try_faults(path, settings, tries, is_tried):
    """Counts the faults of both ranks that `is_tried` of where they are."""
    ranks = run_ranks(2, guarded_steps, path, settings, list(NOT_FINITE.values()))
    # SGD's rows have no state.
    moving = set(KINDS[:2] if "table.optimizer=sgd" in settings else KINDS)
    for of_both in zip(*ranks, strict=True):
        if not is_tried(of_both[0][0]):
            continue
        assert set().union(*(one[-1] for one in of_both)) == moving
        for where, value, sentence, is_same, _ in of_both:
            is_loss = where == "loss" and abs(value) != 1e30
            what = f"the loss is {value}" if is_loss else "a gradient is not finite, of a loss of "
            told = "at step 1 (epoch 0, batch 1); nothing was changed by it" in sentence
            tries.count(sentence.startswith(what) and told and is_same)


@pytest.mark.fault("R13")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(one, id=name, marks=[pytest.mark.slow] * (name != FAST))
        for name, one in SETTINGS.items()
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(path, settings, tries):
    """Of the rows alone, and of each dense parameter alone."""
    try_faults(path, settings, tries, lambda where: where != "loss")
    assert tries.num_tried > 2 * (len(NOT_FINITE) + 10)


@pytest.mark.fault("R12")
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any(path, tries):
    try_faults(path, [], tries, lambda where: where == "loss")


def skipping(path, settings, is_late):
    """(what bad steps tell, whether the end is that of a run without them, the sentence beyond the bound)."""
    often = ["guard.on_nonfinite=skip", "guard.max_skipped_steps=2", *settings]
    plain, learner = learner_of(path, often), learner_of(path, often)
    learner.guard._is_late = is_late  # as on CUDA
    place, told = [(0, index, index) for index in range(4)], []
    for step in (0, 2):
        plain.step(*place[step])
    learner.step(*place[0])
    for where in ("rows", 0):
        with injected(learner, where, math.nan):
            told.append(learner.step(*place[1]))
    told.append(learner.step(*place[2]))
    is_equal = hashes(learner) == hashes(plain)
    with injected(learner, "loss", math.nan), pytest.raises(FloatingPointError) as raised:
        for _ in range(3):
            told.append(learner.step(*place[3]))
    return [one.skipped for one in told], is_equal, str(raised.value)


@pytest.mark.fault("R12")
@pytest.mark.fault("R13")
@pytest.mark.parametrize("is_late", [False, True], ids=["told at once", "told a step later"])
def test_skipped_steps_are_as_if_they_had_not_been_and_told_up_to_a_bound(path, is_late):
    for skipped, is_equal, sentence in run_ranks(2, skipping, path, [], is_late):
        assert is_equal
        expected = [(), (1,), (1,)] if is_late else [(1,), (1,), ()]
        assert skipped == [*expected, (3,), (3,)]
        assert "the loss is nan at step 3 (epoch 0, batch 3)" in sentence
        assert "3 steps in a row were not finite, and guard.max_skipped_steps is 2" in sentence


def late_sentence(path):
    """What is raised a step after one whose gradient was not finite, and whether that changed anything."""
    learner = learner_of(path, [])
    learner.guard._is_late = True
    learner.step(0, 0, 0)
    before = hashes(learner)
    with injected(learner, "rows", math.inf):
        learner.step(0, 1, 1)
    is_same = hashes(learner) == before
    with pytest.raises(FloatingPointError) as raised:
        learner.step(0, 2, 2)
    return is_same, str(raised.value)


@pytest.mark.fault("R13")
def test_a_host_that_reads_the_guard_a_step_later_names_the_right_step(path):
    for is_same, sentence in run_ranks(2, late_sentence, path):
        assert is_same and "at step 1 (epoch 0, batch 1)" in sentence


def waiting(path):
    """The sentence of a host that waits within backward, and whether rows stayed: for Adam's."""
    learner = learner_of(path, [])
    learner.guard._waits = True
    learner.step(0, 0, 0)
    before = hashes(learner)
    learner.guard.keep = lambda grad: learner.guard.is_finite() and grad  # no zeros
    with injected(learner, "rows", math.nan), pytest.raises(FloatingPointError) as raised:
        learner.step(0, 1, 1)
    return hashes(learner) == before, str(raised.value)


@pytest.mark.fault("R13")
def test_rows_that_a_zero_gradient_would_move_are_guarded_by_the_host(path):
    for is_same, sentence in run_ranks(2, waiting, path):
        assert is_same and "at step 1 (epoch 0, batch 1)" in sentence


def stops(path):
    """is_stopping of four steps, of which rank 1 asks at the third."""
    learner = learner_of(path, [])
    is_asking = [distributed.rank() == 1 and index == 2 for index in range(4)]
    return [
        learner.step(0, i, i, is_stop_asked=asks).is_stopping for i, asks in enumerate(is_asking)
    ]


def test_a_stop_that_one_rank_asks_for_is_known_to_all_at_the_same_step(path):
    assert run_ranks(2, stops, path) == [[False, False, True, False]] * 2


def small_run(data: Path, folder: Path, *settings: str):
    """A run that dot products let diverge."""
    sizes = ["encoder.dim=16", "encoder.max_history_len=12", "data.batch_users=32"]
    loss = ["loss.similarity=dot", "loss.temperature=1", "loss.num_negatives=50"]
    often = ["train.eval_every_epochs=1", "train.patience=0", "train.resume=auto"]
    paths = [f"data.path={data}", f"train.run_dir={folder}", "train.device=cpu"]
    return train(load(RunConfig, [*sizes, *loss, *often, *paths, *settings]))


def diverging_run(data: Path, folder: Path):
    with pytest.raises(FloatingPointError) as raised:
        small_run(data, folder, "train.max_epochs=60", "optim.lr=0.1", "table.lr=10")
    return str(raised.value)


@pytest.mark.fault("R14")
def test_rates_a_hundred_times_too_high_raise_an_alarm_and_the_best_checkpoint_is_kept(tmp_path):
    random = np.random.default_rng(3)
    first = random.integers(0, 60, 160)
    # Items follow one another, most of the time.
    events = [(n + np.arange(14) + (random.random(14) < 0.2)) % 60 for n in first]
    write_dataset(tmp_path / "data", [one.tolist() for one in events], num_items=60)
    folder = tmp_path / "run"
    good = run_ranks(2, small_run, tmp_path / "data", folder, "train.max_epochs=10")[0]
    best = checkpoint.resolve(folder / "checkpoints", "best")
    for sentence in run_ranks(2, diverging_run, tmp_path / "data", folder):
        assert sentence.startswith("training diverges: the loss is ")
        assert "lower optim.lr or table.lr and go on from the best checkpoint" in sentence
    assert checkpoint.resolve(folder / "checkpoints", "best") == best
    again = run_ranks(1, evaluate_run, folder, [])[0]
    assert again["test"] == good["test"]

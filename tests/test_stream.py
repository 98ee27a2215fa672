"""Training batches: a function of (seed, epoch, step, rank), every user once, the ranks' work alike."""

import functools
import operator

import numpy as np
import pytest

from hstu_rec import distributed
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import DataConfig, TrainStream, deal
from tests.datasets import write_dataset

MAX_HISTORY_LEN = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 users of 3 to 39 events: 1 to 37 of them to train on; items of a user are 1000 u, 1000 u + 1, ..."""
    path = tmp_path_factory.mktemp("stream") / "data"
    lengths = np.random.default_rng(3).integers(3, 40, 60)
    items = [(1000 * user + np.arange(n)).tolist() for user, n in enumerate(lengths)]
    times = [(10**9 + 60 * np.arange(n)).tolist() for n in lengths]
    write_dataset(path, items, times, num_items=60_000)
    return Dataset(path)


def stream_of(dataset, seed=1, **settings):
    return TrainStream(dataset, DataConfig(**settings), MAX_HISTORY_LEN, seed)


def batches(stream, monkeypatch, world_size=1, epoch=0):
    """[step][rank] of an epoch."""
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    found = []
    for step in range(stream.num_steps(epoch)):
        ranks = []
        for rank in range(world_size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            ranks.append(stream.batch(epoch, step))
        found.append(ranks)
    return found


def targets(steps):
    """Sorted targets of each step, over its ranks."""
    return [sorted(np.concatenate([b.target_ids for b in ranks]).tolist()) for ranks in steps]


@pytest.mark.parametrize("settings", [{"batch_users": 7}, {"batch_users": 0, "batch_events": 40}])
def test_an_epoch_predicts_the_newest_training_events_of_every_user_once(
    dataset, monkeypatch, settings
):
    steps = batches(stream_of(dataset, **settings), monkeypatch)
    expected = []
    for user, end in enumerate(dataset.train_ends):
        expected += [1000 * user + place for place in range(max(1, end - MAX_HISTORY_LEN), end)]
    assert sorted(functools.reduce(operator.iadd, targets(steps), [])) == expected
    for (batch,) in steps:
        assert (batch.target_ids == batch.item_ids + 1).all()
        assert (batch.next_timestamps == batch.timestamps + 60).all()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(dataset, monkeypatch, world_size):
    stream = stream_of(dataset, batch_users=7)
    alone, shared = (batches(stream, monkeypatch, size) for size in (1, world_size))
    assert targets(shared) == targets(alone)
    for ranks, (whole,) in zip(shared, alone, strict=True):
        assert {b.num_targets_global for b in ranks} == {len(whole.target_ids)}


def test_a_batch_depends_on_seed_epoch_and_step_alone(dataset, monkeypatch):
    first, again, other = (
        targets(batches(stream_of(dataset, seed, batch_users=7), monkeypatch)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first != targets(batches(stream_of(dataset, batch_users=7), monkeypatch, epoch=1))


def test_batches_by_events_stay_within_the_limit(dataset, monkeypatch):
    steps = batches(stream_of(dataset, batch_users=0, batch_events=40), monkeypatch)
    assert max(ranks[0].num_targets_global for ranks in steps) <= 40
    assert len(steps) < len(dataset.train_ends) / 2


@pytest.mark.parametrize("num_hands", [1, 2, 5, 8])
def test_users_are_dealt_evenly_by_number_and_cost(num_hands):
    random = np.random.default_rng(num_hands)
    users, costs = random.permutation(128), np.minimum(random.geometric(0.15, 128), 50)
    hands = deal(users, costs, num_hands)
    cost_of = dict(zip(users.tolist(), costs.tolist(), strict=True))
    assert sorted(np.concatenate(hands).tolist()) == list(range(128))
    sizes = [len(hand) for hand in hands]
    assert max(sizes) - min(sizes) <= 1
    sums = [sum(cost_of[user] for user in hand.tolist()) for hand in hands]
    assert max(sums) - min(sums) <= costs.max()


def test_more_ranks_than_users_leave_empty_hands():
    hands = deal(np.array([4, 9]), np.array([1, 3]), 4)
    assert [hand.tolist() for hand in hands] == [[9], [4], [], []]

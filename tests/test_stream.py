"""Training batches: a function of (seed, epoch, step, rank), every user once, the ranks' work alike."""

import functools
import itertools
import operator

import numpy as np
import pytest

from hstu_rec import distributed
from hstu_rec.data import dataset as dataset_module
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stochastic_length import cut_lengths, kept_events, whole_share
from hstu_rec.data.stream import DataConfig, TrainStream, deal, eval_batches
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


def gathered_by_ranks(read, world_size, monkeypatch):
    """[rank] rows of the events' files that `read()` takes, each as often as it is taken."""
    rows = []
    take = dataset_module._take

    def counted(chunks, wanted):
        rows[-1].append(wanted)
        return take(chunks, wanted)

    monkeypatch.setattr(dataset_module, "_take", counted)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows.append([])
        read()
    return [np.concatenate(one) for one in rows]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"length_alpha": 1.2}])
def test_ranks_read_events_of_their_own_users_alone_and_together_all(
    dataset, monkeypatch, world_size, settings
):
    stream = stream_of(dataset, batch_users=7, **settings)

    def read():
        for step in range(stream.num_steps(0)):
            stream.batch(0, step)

    ranks = gathered_by_ranks(read, world_size, monkeypatch)
    # Items and timestamps of a row, once each: on one rank, and on no other.
    found, times = np.unique(np.concatenate(ranks), return_counts=True)
    assert (times == 2).all()
    expected = []
    for start, end in zip(dataset.starts, dataset.train_ends, strict=True):
        if end >= 2:
            expected += range(start + max(0, end - 1 - MAX_HISTORY_LEN), start + end)
    assert found.tolist() == expected
    shares = [len(rows) for rows in ranks]
    if not settings:  # cut histories are dealt by what is left of them, and read whole
        assert max(shares) - min(shares) < 0.2 * np.mean(shares)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_ranks_read_the_histories_of_their_own_queries_alone(dataset, monkeypatch, split):
    ranks = gathered_by_ranks(
        lambda: list(eval_batches(dataset, split, MAX_HISTORY_LEN, 9)), 3, monkeypatch
    )
    rows = [set(one.tolist()) for one in ranks]
    assert all(not one & other for one, other in itertools.combinations(rows, 2))
    limits = dataset.valid_ends if split == "valid" else dataset.lengths
    starts = dataset.starts
    assert set().union(*rows) == {
        row
        for start, limit in zip(starts, limits, strict=True)
        for row in range(start, start + limit)
    }


@pytest.mark.parametrize("num_hands", [1, 2, 5, 8, 64])
def test_users_are_dealt_so_that_no_rank_waits_long(num_hands):
    """Power-law lengths, in a cost of which 1,000 events are half linear, half quadratic."""
    random = np.random.default_rng(num_hands)
    lengths = np.minimum(20 * (random.pareto(1.2, 80 * num_hands) + 1), 4000).astype(np.int64)
    costs = lengths + lengths**2 / 1000
    hands = deal(costs, num_hands)
    assert sorted(np.concatenate(hands).tolist()) == list(range(len(lengths)))
    sums = np.array([costs[hand].sum() for hand in hands])
    # None is above the least by more than its own smallest history.
    assert (sums - [costs[hand].min() for hand in hands] <= sums.min() + 1e-6).all()
    assert sums.max() <= max(1.02 * sums.mean(), costs.max())


def test_more_ranks_than_users_leave_empty_hands():
    assert [hand.tolist() for hand in deal(np.array([1, 3]), 4)] == [[1], [0], [], []]


def test_the_imbalance_is_the_work_of_the_busiest_rank_over_the_mean(dataset, monkeypatch):
    def squares(lengths):
        return lengths.astype(float) ** 2

    stream = TrainStream(dataset, DataConfig(batch_users=9), MAX_HISTORY_LEN, 1, squares)
    for step, ranks in enumerate(batches(stream, monkeypatch, world_size=4)):
        work = [float((batch.offsets.diff() ** 2).sum()) for batch in ranks]
        expected = max(work) / (sum(work) / 4)
        assert stream.imbalance(0, step) == pytest.approx(expected)
        assert 1 <= expected < 4


SHORT = {"batch_users": 7, "length_alpha": 1.2}  # 12 ** .6 is 4.4 events


@pytest.mark.parametrize("choice", ["uniform", "newest"])
def test_a_cut_history_keeps_events_in_order_and_the_next_event_as_target(
    dataset, monkeypatch, choice
):
    stream = stream_of(dataset, length_choice=choice, **SHORT)
    num_whole = num_cut = 0
    for (batch,) in batches(stream, monkeypatch):
        assert batch.num_targets_global == len(batch.item_ids)
        for begin, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
            items = batch.item_ids[begin:end]
            user, place = int(items[0]) // 1000, items % 1000
            assert (items // 1000 == user).all() and (place.diff() > 0).all()
            assert (batch.target_ids[begin:end] == items + 1).all()
            seconds = batch.next_timestamps[begin:end] - batch.timestamps[begin:end]
            assert (seconds == 60).all()
            length = stream.positions[user]
            assert dataset.train_ends[user] - 1 - length <= place.min()
            assert len(items) in ({length} if length <= 4 else {4, length})
            num_whole += length > 4 and len(items) == length
            num_cut += len(items) < length
    assert num_cut > num_whole > 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_histories_are_cut_alike_on_any_number_of_ranks(dataset, monkeypatch, world_size):
    stream = stream_of(dataset, length_choice="newest", **SHORT)
    alone, shared = (batches(stream, monkeypatch, size) for size in (1, world_size))
    assert targets(alone) == targets(shared)
    assert targets(alone) != targets(batches(stream, monkeypatch, epoch=1))


def test_lengths_are_cut_as_often_as_published():
    lengths, longest, alpha = np.repeat([4, 5, 8, 12], 20_000), 12, 1.2
    kept = cut_lengths(lengths, longest, alpha, np.random.default_rng(0)).reshape(4, -1)
    assert (kept[0] == 4).all() and set(kept[1:].ravel()) == {4, 5, 8, 12}
    for length, found in zip([5, 8, 12], kept[1:], strict=True):
        assert (found == length).mean() == pytest.approx(12**1.2 / length**2, abs=0.02)
    # alpha of 2 cuts nothing.
    assert (whole_share(lengths, longest, 2.0) == 1).all()


@pytest.mark.parametrize(
    ("choice", "weights"), [("uniform", np.ones(4)), ("newest", np.arange(1.0, 5))]
)
def test_events_are_kept_in_proportion_to_their_weights(choice, weights):
    users = np.arange(30_000)
    lengths = np.full(len(users), 4)
    kept = kept_events(lengths, np.ones_like(users), users, 5, choice).reshape(-1, 4)
    assert (kept.sum(1) == 1).all()
    np.testing.assert_allclose(kept.mean(0), weights / weights.sum(), atol=0.01)
    # Of each user's own, whoever else is there.
    some = kept_events(lengths[7:9], np.ones(2, dtype=int), users[7:9], 5, choice)
    assert (some.reshape(-1, 4) == kept[7:9]).all()
    two = kept_events(lengths, np.full(len(users), 2), users, 5, choice).reshape(-1, 4)
    assert (two.sum(1) == 2).all() and (two | ~kept).all()  # drawn one after another


def test_the_mean_of_positions_is_that_of_epochs(dataset, monkeypatch):
    stream = stream_of(dataset, **SHORT)
    found = [
        sum(batch.num_targets_global for (batch,) in batches(stream, monkeypatch, epoch=epoch))
        for epoch in range(60)
    ]
    assert stream.num_positions == pytest.approx(np.mean(found), rel=0.02)
    assert stream.num_positions < 0.8 * stream_of(dataset, batch_users=7).num_positions


@pytest.mark.parametrize("alpha", [-1.0, 1.0, 2.1])
def test_an_alpha_that_cannot_be_is_refused(alpha):
    (problem,) = DataConfig(length_alpha=alpha).problems()
    assert problem == f"length_alpha must be in (1, 2], or 0 for off; got {alpha}"
    assert "no effect without length_alpha" in DataConfig(length_choice="newest").problems()[0]

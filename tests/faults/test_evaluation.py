"""Evaluation when memory is short, ranks are empty, and what a query must not know."""

import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hstu_rec import distributed, evaluator
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.data.stream import DataConfig, TrainStream, eval_batches
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.item_table import local_shards
from hstu_rec.learner import Learner
from hstu_rec.loss import LossConfig, SampledSoftmax
from hstu_rec.model import NextItemModel
from hstu_rec.portions import Portion, is_out_of_memory
from hstu_rec.ranking import ItemShard
from tests import oracles
from tests.datasets import write_dataset
from tests.ranks import run_ranks

NUM_ITEMS = 50
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": MemoryError(),
    "torch on CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


def make_learner(path, *changes):
    """A learner of random rows, and the dataset."""
    dataset = Dataset(path)
    small = ["encoder.dim=8", "encoder.max_history_len=6", "encoder.dropout=0", "table.init_std=1"]
    ranked = ["eval.batch_users=8", "eval.chunk_items=16", "eval.min_train_count=1"]
    config = load(RunConfig, [f"data.path={path}", "train.device=cpu", *small, *ranked, *changes])
    learner = Learner(config, dataset, torch.device("cpu"))
    learner.begin()
    return learner, dataset


@contextmanager
def short_of_memory(error, num_items, num_users):
    """Whatever scores more items or encodes more users at a time than these raises `error`."""
    vectors, queries = ItemShard.vectors, NextItemModel.queries

    def scarce_vectors(self, part):
        if isinstance(part, slice) and part.stop - part.start > num_items:
            raise error
        return vectors(self, part)

    def scarce_queries(self, history, batch, layout=None):
        if len(batch.offsets) - 1 > num_users:
            raise error
        return queries(self, history, batch, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ItemShard, "vectors", scarce_vectors)
        patch.setattr(NextItemModel, "queries", scarce_queries)
        patch.setattr(evaluator, "LEAST_CHUNK_ITEMS", 2)
        yield


def measured(learner, dataset, after_batch=lambda: None):
    """(metrics, what was warned of)."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = evaluator.evaluate(
            learner.model, dataset, "test", learner.config.eval, learner.device, after_batch
        )
    return found, [str(one.message) for one in told if "memory" in str(one.message)]


def measured_with_little_memory(path):
    """What a rank finds with much memory, and with little of each kind; the last rank has least."""
    distributed.start("cpu")
    learner, dataset = make_learner(path)
    calls = []
    found = {"plenty": (*measured(learner, dataset, lambda: calls.append(1)), len(calls))}
    for name, error in ERRORS.items():
        calls.clear()
        is_last = distributed.rank() == distributed.world_size() - 1
        with short_of_memory(error, 5 if is_last else 9, 3 if is_last else 8):
            told = measured(learner, dataset, lambda: calls.append(1))
        found[name] = (*told, len(calls))
    for name, limits in {"no item": (0, 8), "no user": (16, 0)}.items():
        is_last = distributed.rank() == distributed.world_size() - 1
        with short_of_memory(ERRORS["cuda"], *(limits if is_last else (16, 8))):
            try:
                found[name] = measured(learner, dataset)
            except MemoryError as error:
                found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """30 users of 3 to 9 events."""
    random = np.random.default_rng(4)
    sequences = [random.integers(0, NUM_ITEMS, n).tolist() for n in random.integers(3, 10, 30)]
    path = tmp_path_factory.mktemp("evaluation") / "data"
    write_dataset(path, sequences, num_items=NUM_ITEMS)
    return path


@pytest.mark.fault("R31")
@pytest.mark.parametrize("world_size", [1, 2])
def test_out_of_memory_means_smaller_portions_and_the_same_result(data, world_size, tries):
    ranks = run_ranks(world_size, measured_with_little_memory, data)
    expected, told, num_calls = ranks[0]["plenty"]
    assert not told and num_calls == (4 if world_size == 1 else 2)
    for rank, found in enumerate(ranks):
        for name in ERRORS:
            metrics, told, again = found[name]
            tries.count(metrics == expected and again == num_calls)
            chunk = [one for one in told if "chunk_items" in one]
            users = [one for one in told if "batch_users" in one]
            size = 4 if rank == world_size - 1 else 8
            assert len(chunk) == 1 and f"give eval.chunk_items={size}" in chunk[0]
            assert len(users) == (rank == 0) and all("eval.batch_users=2" in one for one in users)
        for name in ("no item", "no user"):
            assert "also for 1 at a time of eval.batch_users=8" in found[name]


@pytest.mark.fault("R31")
def test_other_errors_are_no_shortage_of_memory():
    assert all(is_out_of_memory(error) for error in ERRORS.values())
    portion, wrong = Portion("eval.chunk_items", 4), RuntimeError("shapes do not match")
    assert not is_out_of_memory(wrong) and not is_out_of_memory(ValueError("out of memory"))

    def fail(part):
        raise wrong

    with pytest.raises(RuntimeError, match="shapes"):
        list(portion.over(4, fail))
    assert portion.size == 4


SCARCE = """
import resource, sys, warnings
import torch
from hstu_rec.portions import Portion
from hstu_rec.ranking import ItemShard, Queries, rank_targets

torch.manual_seed(0)
rows, count = torch.randn(600_000, 64), 5
targets = torch.arange(count)
queries = Queries(torch.randn(count, 64), rows[:count], targets, targets[:0], torch.zeros(6).long(), targets)
shard = ItemShard(rows, 0, len(rows))
expected = rank_targets(queries, shard, Portion("eval.chunk_items", 50_000))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
free = 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (taken + free, taken + free))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    found = rank_targets(queries, shard, Portion("eval.chunk_items", len(rows)))
assert all(torch.equal(*pair) for pair in zip(found, expected))
print(told[0].message)
"""


@pytest.mark.fault("R31")
def test_where_the_system_gives_no_memory_chunks_get_smaller():
    done = subprocess.run(
        [sys.executable, "-c", SCARCE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "eval.chunk_items=600000 does not fit into memory; goes on with" in done.stdout


def train_and_rank(path):
    """(losses, metrics, [rows, queries, targets of this rank]) after two epochs."""
    distributed.start("cpu")
    learner, dataset = make_learner(path, "data.batch_users=2", "loss.num_negatives=12")
    losses = []
    for epoch in range(2):
        for index in range(learner.stream.num_steps(epoch)):
            losses.append(learner.step(epoch, index, len(losses)).loss)
    found = evaluator.evaluate(learner.model, dataset, "test", learner.config.eval, learner.device)
    mine = []
    for batch in eval_batches(dataset, "test", 6, 100):
        with torch.no_grad():
            vectors, _ = learner.model.eval()(batch.history)
        mine += [vectors.numpy(), batch.history.target_ids.numpy()]
    shards = [
        (torch.nn.functional.normalize(rows).numpy(), at)
        for rows, at in local_shards(learner.model)
    ]
    return losses, found, mine, shards


@pytest.mark.fault("R21")
@pytest.mark.fault("R22")
def test_five_users_on_four_ranks_are_trained_on_and_ranked_exactly(tmp_path):
    random = np.random.default_rng(2)
    sequences = [random.integers(0, NUM_ITEMS, n).tolist() for n in (4, 9, 5, 3, 7)]
    write_dataset(tmp_path / "data", sequences, num_items=NUM_ITEMS)
    # Batches of 2, 2 and 1 users (one of the five has a single training event): ranks without any.
    (alone,) = run_ranks(1, train_and_rank, tmp_path / "data")
    ranks = run_ranks(4, train_and_rank, tmp_path / "data")
    for losses, found, _, _ in ranks:
        np.testing.assert_allclose(losses, alone[0], rtol=1e-4)
        assert found == ranks[0][1]
    vectors, targets = (
        np.concatenate([mine[which] for _, _, mine, _ in ranks]) for which in (0, 1)
    )
    items = np.zeros((NUM_ITEMS, 8), np.float32)
    for rows, first in [shard for *_, shards in ranks for shard in shards]:
        items[first : first + len(rows)] = rows
    expected = oracles.ranks(items, vectors, targets, [sequence[:-1] for sequence in sequences])
    assert targets.tolist() == [sequence[-1] for sequence in sequences]
    for part, of_ranks in zip(("seen_allowed", "seen_masked"), expected, strict=True):
        found = ranks[0][1]
        assert found[part] == pytest.approx(
            oracles.metrics(of_ranks, [1, 5, 10, 20, 50]), rel=1e-12
        )
    assert [len(mine[1]) for _, _, mine, _ in ranks] == [2, 1, 1, 1]


OPTIONS = st.fixed_dictionaries(
    {
        "attention": st.sampled_from(["silu", "softmax"]),
        "use_gate": st.booleans(),
        "use_position_bias": st.booleans(),
        "use_position_embedding": st.booleans(),
        "window": st.sampled_from([0, 0, 3]),
        "query_time": st.sampled_from(["own", "next"]),
        "ffn_dim": st.sampled_from([0, 8]),
        "calendar": st.sampled_from(["none", "day"]),
    }
)


@pytest.mark.fault("R35")
@pytest.mark.parametrize("kernel", ["grouped", "triton"])
def test_whatever_the_future_is_the_past_is_the_same_to_the_last_bit(kernel):
    @settings(max_examples=60 if kernel == "grouped" else 6)
    @given(OPTIONS, st.lists(st.integers(0, 9), min_size=1, max_size=4), st.data())
    def hold(options, lengths, data):
        if options["calendar"] != "none":
            options = options | {"calendar_end": 10**7}
        config = EncoderConfig(dim=8, max_history_len=9, attention_kernel=kernel, **options)
        torch.manual_seed(data.draw(st.integers(0, 2**20), "seed"))
        encoder = HSTUEncoder(config).eval()
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.5)  # biases begin too small to be seen
        cuts = [data.draw(st.integers(0, length), "events kept") for length in lengths]
        past = torch.cat([torch.arange(n) < cut for n, cut in zip(lengths, cuts, strict=True)])
        offsets, total = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)

        def drawn():
            times = torch.randint(0, 10**7, (2, total))
            return torch.randn(total, 8), *times

        before, others = drawn(), drawn()
        after = [
            torch.where(past if one.ndim == 1 else past[:, None], one, other)
            for one, other in zip(before, others, strict=True)
        ]
        with torch.no_grad():
            outputs = [encoder(one[0], offsets, *one[1:]) for one in (before, after)]
        assert torch.equal(outputs[0][past], outputs[1][past])
        assert past.all() or not torch.equal(*outputs)

    hold()


class Rows(nn.Module):
    """The catalogue's rows, on one process."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, ids):
        return self.rows[ids]


SEGMENTS = ("training", "validation", "test")
# Seconds of each; a user's events of a segment are in it.
SEGMENT_S, BEGIN_S = 10**6, 10**9


def drawn_segment(random, which, count):
    """(items, rising times) of a user's events in a segment."""
    times = np.sort(random.choice(SEGMENT_S, count, replace=False)) + BEGIN_S + which * SEGMENT_S
    return random.integers(0, NUM_ITEMS, count), times


def written(folder, users, split):
    """The dataset that prepare makes of users' segments."""
    rows = [
        (user, int(item), int(time))
        for user, segments in enumerate(users)
        for items, times in segments
        for item, time in zip(items, times, strict=True)
    ]
    columns = zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True)
    folder.mkdir()
    pq.write_table(pa.table(dict(columns)), folder / "events.parquet")
    ends = [str(BEGIN_S + which * SEGMENT_S) for which in (1, 2)]
    times = {"valid_time": ends[0], "test_time": ends[1]} if split == "time" else {}
    config = PrepareConfig(split=split, min_user_events=1, time_unit="s", **times)
    prepare(config, folder / "events.parquet", folder / "data")
    return Dataset(folder / "data")


def tensors(batch):
    return [batch.item_ids, batch.timestamps, batch.next_timestamps, batch.offsets]


def trained_on(dataset):
    """All tensors of an epoch."""
    stream = TrainStream(dataset, DataConfig(batch_users=3), 5, seed=1)
    batches = [stream.batch(0, step) for step in range(stream.num_steps(0))]
    return [one for batch in batches for one in [*tensors(batch), batch.target_ids]]


def asked(dataset, split, query_time):
    """What the model makes of a split's queries, and what it is given but for the target."""
    torch.manual_seed(0)
    config = EncoderConfig(
        dim=8,
        max_history_len=5,
        query_time=query_time,
        calendar="day",
        calendar_begin=BEGIN_S,
        calendar_end=BEGIN_S + 3 * SEGMENT_S,
    )
    table = Rows(torch.randn(NUM_ITEMS, 8))
    model = NextItemModel(table, HSTUEncoder(config), SampledSoftmax(LossConfig())).eval()
    for parameter in model.encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    (batch,) = eval_batches(dataset, split, 5, 100)
    with torch.no_grad():
        vectors, _ = model(batch.history)
    history = batch.history
    given = [history.item_ids, history.timestamps, history.offsets, batch.seen_ids]
    return [vectors, *given], history.target_ids


@pytest.mark.fault("R35")
@pytest.mark.parametrize("split", ["leave_one_out", "time"])
@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**20), st.sampled_from(["own", "next"]))
def test_from_the_events_to_the_query_no_target_and_nothing_after_it_is_known(
    split, seed, query_time
):
    random = np.random.default_rng(seed)
    most = 2 if split == "leave_one_out" else 4
    users = [
        [drawn_segment(random, w, int(random.integers(1, 9 if w == 0 else most))) for w in range(3)]
        for _ in range(6)
    ]
    # One user has every item in training, so that items keep their numbers.
    users.append([(np.arange(NUM_ITEMS), BEGIN_S + np.arange(NUM_ITEMS)), *users[0][1:]])
    with tempfile.TemporaryDirectory() as folder:
        before = written(Path(folder) / "before", users, split)
        for which in (1, 2):
            changed = [
                [
                    drawn_segment(random, w, len(items)) if w >= which else (items, times)
                    for w, (items, times) in enumerate(segments)
                ]
                for segments in users
            ]
            if query_time == "next":  # the time of the event to predict is known
                for old, new in zip(users, changed, strict=True):
                    new[which][1][0] = old[which][1][0]
                    new[which] = new[which][0], np.maximum.accumulate(new[which][1])
            after = written(Path(folder) / f"after {which}", changed, split)
            assert all(map(torch.equal, trained_on(before), trained_on(after)))
            name = "valid" if which == 1 else "test"
            known, targets = asked(before, name, query_time)
            known_after, other_targets = asked(after, name, query_time)
            assert all(map(torch.equal, known, known_after))
            assert not torch.equal(targets, other_targets)

"""Steps on batches filled up to a graph's sizes are those of the batches themselves.

On a GPU as graphs; elsewhere on copies of fixed size, with the kernels in Triton's interpreter.
"""

import pytest
import torch

from hstu_rec import distributed, graphs, learner, softmax
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.evaluator import evaluate
from hstu_rec.item_table import local_shards
from hstu_rec.learner import Learner
from tests.datasets import write_dataset

NUM_ITEMS, NUM_STEPS, NUM_USERS = 30, 3, 4
SETTINGS = {
    "all": ["loss.negatives=all"],
    "all, seen bias": ["loss.negatives=all", "loss.use_seen_bias=true"],
    "uniform": ["loss.negatives=uniform", "loss.num_negatives=20"],
    "mixed, logQ, dot": [
        "loss.negatives=mixed",
        "loss.num_negatives=20",
        "loss.use_logq=true",
        "loss.similarity=dot",
        "loss.temperature=1",
    ],
    "in_batch, calendar": [
        "loss.negatives=in_batch",
        "encoder.calendar=day",
        "encoder.query_time=next",
    ],
}


@pytest.fixture
def small(monkeypatch):
    """Sizes that several small batches share, the kernels everywhere."""
    for name, size in (("EVENTS", 32), ("USERS", 8), ("MIN_DUMMIES", 8), ("SEEN_PAIRS", 32)):
        monkeypatch.setattr(graphs, name, size)
    monkeypatch.setattr(learner, "check_graphs", lambda *_: None)
    monkeypatch.setattr(softmax, "fuses", lambda _hopper, _dtype, _width, has_seen: not has_seen)


def options_of(path, settings):
    sizes = [
        "encoder.dim=8",
        "encoder.num_layers=1",
        "encoder.max_history_len=9",
        "encoder.dropout=0",
    ]
    options = [f"data.path={path}", *sizes, f"data.batch_users={NUM_USERS}"]
    return [*options, "encoder.attention_kernel=triton", *settings]


def steps(path, settings):
    """(losses, dense parameters, item rows) after some steps."""
    with distributed.process_group() as device:
        trained = Learner(load(RunConfig, options_of(path, settings)), Dataset(path), device)
        trained.begin()
        losses = [trained.step(0, at, at).loss for at in range(NUM_STEPS)]
        rows = local_shards(trained.model)[0][0]
        return losses, [p.detach().clone() for p in trained.dense], rows.clone()


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(4)
    lengths = torch.randint(3, 14, (NUM_STEPS * NUM_USERS,)).tolist()
    sequences = [torch.randint(0, NUM_ITEMS, (n,)).tolist() for n in lengths]
    write_dataset(tmp_path / "data", sequences, num_items=NUM_ITEMS)
    return tmp_path / "data"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_filled_batches_train_as_their_own(path, settings):
    plain, filled = (
        steps(path, [*settings, f"train.cuda_graphs={is_filled}"]) for is_filled in (False, True)
    )
    torch.testing.assert_close(filled[0], plain[0], rtol=1e-5, atol=1e-5)
    for got, want in zip(filled[1], plain[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(filled[2], plain[2], rtol=1e-4, atol=1e-5)
    assert plain[0][0] != plain[0][-1]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("negatives", ["all", "uniform"])
def test_a_step_is_the_same_when_its_graph_is_made_and_when_it_is_replayed(path, negatives):
    """Dropout too, and evaluation between does no harm."""
    still = ["table.lr=1e-30", "optim.lr=1e-30", "optim.weight_decay=0", "encoder.dropout=0.5"]
    settings = [f"loss.negatives={negatives}", "train.cuda_graphs=true", *still]
    config = load(RunConfig, options_of(path, settings))
    with distributed.process_group() as device:
        trained = Learner(config, Dataset(path), device)
        trained.begin()
        first = [trained.step(0, at, at).loss for at in range(NUM_STEPS)]
        metrics = evaluate(trained.model, trained.stream.dataset, "test", config.eval, device)
        trained.model.train()
        again = [trained.step(0, at, at).loss for at in range(NUM_STEPS)]
    assert again == pytest.approx(first, rel=1e-6)
    assert len(set(first)) == NUM_STEPS and "seen_allowed" in metrics


@pytest.mark.usefixtures("small")
def test_what_a_graph_cannot_hold_is_refused(path, monkeypatch):
    settings = ["loss.negatives=all", "loss.use_seen_bias=true", "train.cuda_graphs=true"]
    config = load(RunConfig, options_of(path, settings))
    monkeypatch.setitem(graphs.CHUNK_LOGITS, "cuda", 1000)
    with distributed.process_group() as device:
        trained = Learner(config, Dataset(path), device)
        with pytest.raises(ValueError, match=r"holds all logits at once, \d+ here of at most 1000"):
            trained.step(0, 0, 0)


@pytest.mark.usefixtures("small")
def test_batches_of_too_many_sizes_are_said_and_train_on(path, monkeypatch):
    settings = ["loss.negatives=uniform", "loss.num_negatives=20"]
    plain = steps(path, settings)[0]
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    monkeypatch.setattr(graphs, "EVENTS", 1)
    with pytest.warns(UserWarning, match="run without a graph"):
        found = steps(path, [*settings, "train.cuda_graphs=true"])[0]
    assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs")
def test_graphs_without_a_gpu_are_refused(path):
    config = load(RunConfig, options_of(path, ["train.cuda_graphs=true"]))
    with distributed.process_group("cpu") as device, pytest.raises(ValueError, match="on cpu with"):
        Learner(config, Dataset(path), device)


@pytest.mark.parametrize("num_ranges", [0, 1, 1000, 20_440])
def test_seen_pairs_are_filled_up_in_order_with_those_of_dummies(num_ranges):
    num_events, size = 5000, 5000 + graphs.MIN_DUMMIES
    first = torch.randint(0, num_events - 60, (num_ranges,))
    ends = first + torch.randint(1, 60, (num_ranges,))
    seen = torch.stack([first, ends, torch.randint(0, NUM_ITEMS, (num_ranges,)).sort().values])
    negatives = softmax.Negatives(torch.arange(NUM_ITEMS), largest_part=NUM_ITEMS, seen=seen)
    filled = graphs.filled_negatives(negatives, num_events, size)
    first, ends, places = filled.seen
    assert int((ends - first).sum()) == filled.num_seen > int((seen[1] - seen[0]).sum())
    assert (places.diff() >= 0).all() and filled.seen.is_contiguous()
    added = len(places) - num_ranges
    assert torch.equal(filled.seen[:, added:], seen)
    is_pair = ends[:added] > first[:added]
    assert (first[:added][is_pair] == num_events).all() and ends[:added].max() <= size


def test_few_sizes_are_filled_up_to():
    sizes = [graphs._up(size, 64) for size in range(1, 10_000)]
    assert all(0 <= up - size < max(64, size / 4) for size, up in enumerate(sizes, 1))
    assert len(set(sizes)) < 45

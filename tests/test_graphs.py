"""Steps on batches filled up to a graph's sizes are those of the batches themselves.

On a GPU as graphs; elsewhere on copies of fixed size, with the kernels in Triton's interpreter.
"""

import pytest
import torch

from hstu_rec import distributed, graphs, learner, softmax
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
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
    monkeypatch.setattr(learner, "_check_graphs", lambda *_: None)
    monkeypatch.setattr(softmax, "fuses", lambda _hopper, _dtype, _width, has_seen: not has_seen)


def steps(path, settings):
    """(losses, dense parameters, item rows) after some steps."""
    sizes = [
        "encoder.dim=8",
        "encoder.num_layers=1",
        "encoder.max_history_len=9",
        "encoder.dropout=0",
    ]
    options = [f"data.path={path}", *sizes, f"data.batch_users={NUM_USERS}"]
    options += ["encoder.attention_kernel=triton", *settings]
    with distributed.process_group() as device:
        trained = Learner(load(RunConfig, options), Dataset(path), device)
        trained.begin()
        losses = [trained.step(0, at, at) for at in range(NUM_STEPS)]
        rows = local_shards(trained.model)[0][0]
        return losses, [p.detach().clone() for p in trained.dense], rows.clone()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_filled_batches_train_as_their_own(tmp_path, settings):
    torch.manual_seed(4)
    lengths = torch.randint(3, 14, (NUM_STEPS * NUM_USERS,)).tolist()
    sequences = [torch.randint(0, NUM_ITEMS, (n,)).tolist() for n in lengths]
    write_dataset(tmp_path / "data", sequences, num_items=NUM_ITEMS)
    plain, filled = (
        steps(tmp_path / "data", [*settings, f"train.cuda_graphs={is_filled}"])
        for is_filled in (False, True)
    )
    torch.testing.assert_close(filled[0], plain[0], rtol=1e-5, atol=1e-5)
    for got, want in zip(filled[1], plain[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(filled[2], plain[2], rtol=1e-4, atol=1e-5)
    assert plain[0][0] != plain[0][-1]

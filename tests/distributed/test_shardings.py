"""Training, ranking and checkpoints do not depend on where rows are."""

import numpy as np
import pytest
import torch

from hstu_rec import checkpoint, distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.evaluator import evaluate
from hstu_rec.item_table import local_shards
from hstu_rec.learner import Learner
from tests.datasets import write_dataset
from tests.ranks import run_ranks


def make_learner(path, sharding):
    settings = ["encoder.dim=8", "encoder.max_history_len=8", "encoder.dropout=0"]
    settings += ["loss.num_negatives=20", "data.batch_users=10", "train.device=cpu"]
    config = load(RunConfig, [f"data.path={path}", f"table.sharding={sharding}", *settings])
    return Learner(config, Dataset(path), torch.device("cpu"))


def shards(learner):
    return [(rows.clone().numpy(), first) for rows, first in local_shards(learner.model)]


def train_and_reload(path, sharding):
    """(losses, metrics, rows before and after a checkpoint)."""
    learner = make_learner(path / "data", sharding)
    losses = [learner.step(0, index, index).loss for index in range(3)]
    root = path / f"{sharding}-{distributed.world_size()}"
    saved = checkpoint.save(root, 3, learner.state(), {})
    other = make_learner(path / "data", sharding)
    checkpoint.load(saved, other.state())
    metrics = evaluate(other.model, other.stream.dataset, "test", other.config.eval, other.device)
    return losses, metrics["seen_masked"], shards(learner), shards(other)


def whole(parts):
    return np.concatenate([rows for rows, _ in sorted(parts, key=lambda part: part[1])])


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_rows_of_two_processes_are_those_of_one(sharding, tmp_path):
    random = np.random.default_rng(2)
    sequences = [random.integers(0, 40, random.integers(4, 12)).tolist() for _ in range(30)]
    write_dataset(tmp_path / "data", sequences, num_items=40)
    ((losses, metrics, rows, _),) = run_ranks(1, train_and_reload, tmp_path, sharding)
    found = run_ranks(2, train_and_reload, tmp_path, sharding)
    for its_losses, its_metrics, trained, loaded in found:
        assert its_losses == pytest.approx(losses, rel=1e-5)
        assert its_metrics == pytest.approx(metrics)
        assert len(trained) == len(loaded)
        for (before, first), (after, first_after) in zip(trained, loaded, strict=True):
            assert first == first_after and np.array_equal(before, after)
    everyone = [part for one in found for part in one[2]]
    np.testing.assert_allclose(whole(everyone), whole(rows), rtol=1e-4, atol=1e-6)

"""Sharded training against an unsharded plain-torch model: the same losses, the same weights."""

import numpy as np
import pytest
import torch
from torch import nn

from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import TrainStream
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.item_table import local_shards
from hstu_rec.loss import NegativeSampler, SampledSoftmax
from hstu_rec.model import NextItemModel
from hstu_rec.trainer import Learner
from tests.datasets import write_dataset
from tests.ranks import run_ranks

NUM_STEPS = 8
SETTINGS = {
    "uniform": ["loss.negatives=uniform", "loss.num_negatives=20"],
    "all": ["loss.negatives=all"],
    "all, with ranks without users": ["loss.negatives=all", "data.batch_users=2"],
    "in_batch": ["loss.negatives=in_batch", "loss.use_logq=true"],
}


def make_config(path, settings):
    return load(
        RunConfig,
        [
            f"data.path={path}",
            *([] if any("batch_users" in s for s in settings) else ["data.batch_users=7"]),
            "encoder.dim=8",
            "encoder.max_history_len=10",
            "encoder.dropout=0",
            "encoder.query_time=next",
            "train.device=cpu",
            *settings,
        ],
    )


def make_data(path):
    """Users with 0 to 14 training events, of 40 items."""
    random = np.random.default_rng(5)
    lengths = [3, 4, *random.integers(3, 17, 30)]
    items = [random.integers(0, 40, n).tolist() for n in lengths]
    times = [np.sort(random.integers(10**9, 10**9 + 10**6, n)).tolist() for n in lengths]
    write_dataset(path, items, times, num_items=40)


def train_sharded(path, settings):
    """(losses, item table, encoder, initial table, initial encoder) as one of several ranks sees them."""
    config = make_config(path, settings)
    learner = Learner(config, Dataset(path), torch.device("cpu"))
    encoder = {name: value.clone() for name, value in learner.encoder.state_dict().items()}
    table = [(rows.clone().numpy(), first) for rows, first in local_shards(learner.model)]
    losses, step = [], 0
    for epoch in range(9):
        for index in range(learner.stream.num_steps(epoch)):
            if step < NUM_STEPS:
                losses.append(float(learner.step(epoch, index, step)))
                step += 1
    final = [(rows.numpy(), first) for rows, first in local_shards(learner.model)]
    as_numpy = {name: value.numpy() for name, value in encoder.items()}
    trained = {name: value.numpy() for name, value in learner.encoder.state_dict().items()}
    return losses, table, final, as_numpy, trained


class PlainTable(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, ids):
        return self.rows[ids]


def train_plainly(path, settings, rows, encoder_state):
    """The same steps on whole batches, with row-wise Adagrad written out."""
    config, dataset = make_config(path, settings), Dataset(path)
    table, encoder = PlainTable(torch.from_numpy(rows)), HSTUEncoder(config.encoder)
    encoder.load_state_dict({name: torch.from_numpy(v) for name, v in encoder_state.items()})
    model = NextItemModel(table, encoder, SampledSoftmax(config.loss))
    stream = TrainStream(dataset, config.data, config.encoder.max_history_len, config.train.seed)
    sampler = NegativeSampler(config.loss, 40, dataset.train_counts, config.train.seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0)
    moment, losses, step = torch.zeros(40, 1), [], 0
    for epoch in range(9):
        for index in range(stream.num_steps(epoch)):
            if step == NUM_STEPS:
                continue
            batch = stream.batch(epoch, index)
            (loss,) = model(batch, sampler.draw(step, batch.target_ids))
            loss = loss / batch.num_targets_global
            loss.backward()
            nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                gradient = table.rows.grad
                moment += gradient.square().mean(1, keepdim=True)
                table.rows -= config.table.lr * gradient / (moment.sqrt() + config.table.eps)
                table.rows.grad = None
            losses.append(float(loss.detach()))
            step += 1
    return losses, table.rows.detach().numpy(), encoder.state_dict()


def whole_table(results, part):
    shards = sorted(((first, rows) for r in results for rows, first in r[part]), key=lambda s: s[0])
    return np.concatenate([rows for _, rows in shards])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_losses_and_weights_equal_the_unsharded_model(tmp_path, world_size, settings):
    path = tmp_path / "data"
    make_data(path)
    results = run_ranks(world_size, train_sharded, path, settings)
    losses, rows, encoder = train_plainly(path, settings, whole_table(results, 1), results[0][3])
    for result in results:
        np.testing.assert_allclose(result[0], losses, rtol=0, atol=1e-5)
        for name, value in encoder.items():
            np.testing.assert_allclose(result[4][name], value.numpy(), atol=2e-5, err_msg=name)
    np.testing.assert_allclose(whole_table(results, 2), rows, atol=1e-5)
    assert abs(losses[0] - losses[-1]) > 1e-3


def initial_rows(path, seed):
    """The untrained item table's rows on this rank, and their first item."""
    config = make_config(path, [f"train.seed={seed}"])
    learner = Learner(config, Dataset(path), torch.device("cpu"))
    return [[(rows.numpy(), first) for rows, first in local_shards(learner.model)]]


def test_the_first_rows_depend_on_the_seed_and_not_on_the_ranks(tmp_path):
    path = tmp_path / "data"
    make_data(path)
    one, other = (whole_table(run_ranks(1, initial_rows, path, seed), 0) for seed in (1, 2))
    np.testing.assert_array_equal(whole_table(run_ranks(3, initial_rows, path, 1), 0), one)
    assert not np.isclose(one, other).any()
    assert 0.015 < one.std() < 0.025

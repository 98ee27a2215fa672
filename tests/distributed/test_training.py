"""Sharded training against an unsharded plain-torch model: the same losses, the same weights."""

import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hstu_rec import distributed, item_table, softmax
from hstu_rec.co_occurrence import count_pairs, item_vectors
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import TrainStream
from hstu_rec.item_table import local_shards
from hstu_rec.learner import Learner, resolved
from hstu_rec.negatives import NegativeSampler
from tests.datasets import write_dataset
from tests.ranks import run_ranks

NUM_STEPS = 8
NUM_ITEMS = 40
SETTINGS = {
    "uniform": ["loss.negatives=uniform", "loss.num_negatives=20"],
    "all": ["loss.negatives=all"],
    "all, with ranks without users and dot products": [
        "loss.negatives=all",
        "loss.similarity=dot",
        "data.batch_users=2",
    ],
    "in_batch": ["loss.negatives=in_batch", "loss.use_logq=true"],
    "mixed, dot, warm-up, table-wise": [
        "loss.negatives=mixed",
        "loss.num_negatives=20",
        "loss.use_logq=true",
        "loss.similarity=dot",
        "loss.temperature=1",
        "optim.warmup_steps=3",
        "table.sharding=table_wise",
    ],
    "all, calendar, rows of co-occurrence": [
        "loss.negatives=all",
        "encoder.calendar=day",
        "table.init=co_occurrence",
    ],
    "all, seen bias, rare ranks without users": [
        "loss.negatives=all",
        "loss.use_seen_bias=true",
        "data.batch_users=2",
    ],
    "mixed, seen bias": [
        "loss.negatives=mixed",
        "loss.num_negatives=30",
        "loss.use_logq=true",
        "loss.use_seen_bias=true",
        "optim.weight_decay=0.1",
    ],
    "in_batch, seen bias, dot": [
        "loss.negatives=in_batch",
        "loss.use_seen_bias=true",
        "loss.similarity=dot",
        "loss.temperature=1",
    ],
    "log-uniform, queries travel": [
        "loss.negatives=log_uniform",
        "loss.num_negatives=20",
        "loss.use_logq=true",
        "loss.exchange=queries",
    ],
    "uniform, seen bias, queries travel, ranks without users": [
        "loss.negatives=uniform",
        "loss.num_negatives=3",
        "loss.use_seen_bias=true",
        "loss.exchange=queries",
        "data.batch_users=2",
    ],
    "frequency, sgd, cosine": [
        "loss.negatives=frequency",
        "loss.num_negatives=20",
        "table.optimizer=sgd",
        "optim.schedule=cosine",
        "train.max_epochs=2",
    ],
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
    """Users with 1 to 14 training events; the last item is in none."""
    random = np.random.default_rng(5)
    lengths = [3, 4, *random.integers(3, 17, 30)]
    items = [random.integers(0, NUM_ITEMS - 1, n).tolist() for n in lengths]
    times = [np.sort(random.integers(10**9, 10**9 + 10**6, n)).tolist() for n in lengths]
    write_dataset(path, items, times, num_items=NUM_ITEMS)


def dense_state(learner):
    """The encoder's tensors, and the loss's."""
    return learner.encoder.state_dict() | learner.loss.state_dict()


def train_sharded(path, settings):
    """(losses, item table, encoder, initial table, initial encoder) as one of several ranks sees them."""
    config = make_config(path, settings)
    learner = Learner(config, Dataset(path), torch.device("cpu"))
    learner.begin()
    encoder = {name: value.clone() for name, value in dense_state(learner).items()}
    table = [(rows.clone().numpy(), first) for rows, first in local_shards(learner.model)]
    losses, step = [], 0
    for epoch in range(9):
        for index in range(learner.stream.num_steps(epoch)):
            if step < NUM_STEPS:
                losses.append(learner.step(epoch, index, step).loss)
                step += 1
    final = [(rows.numpy(), first) for rows, first in local_shards(learner.model)]
    as_numpy = {name: value.numpy() for name, value in encoder.items()}
    trained = {name: value.numpy() for name, value in dense_state(learner).items()}
    return losses, table, final, as_numpy, trained


def plain_encoder(weights, x, times, next_times, config):
    """HSTU on padded histories: x [B, L, D] (events first), times int64 [B, L]; arXiv 2402.17152, 3.2."""
    num_users, length, dim = x.shape
    steps = torch.arange(length)
    distance = (steps[:, None] - steps).clamp(0, config.max_history_len - 1)
    elapsed = (next_times[:, :, None] - times[:, None, :]).abs().clamp(min=1)
    bucket = (elapsed.double().log() / 0.301).floor().long().clamp(max=128)
    for name, when in (("calendar", times), ("next_calendar", next_times)):
        embedding = weights.get(f"{name}.embedding")
        if embedding is not None:
            day = (when - config.calendar_begin).div(86_400).floor().long()
            x = x + embedding[day.clamp(0, len(embedding) - 1)]
    for layer in range(config.num_layers):
        w = {n.removeprefix(f"layers.{layer}."): v for n, v in weights.items() if f".{layer}." in n}
        normed = F.layer_norm(x, (dim,), w["input_norm.weight"], w["input_norm.bias"])
        v, q, k, u = F.silu(normed @ w["project.weight"].T).chunk(4, dim=-1)
        q, k, v = (
            part.view(num_users, length, config.num_heads, -1).transpose(1, 2) for part in (q, k, v)
        )
        bias = w["position_bias"][0][distance] + w["time_bias"][0][bucket]
        attention = F.silu(q @ k.transpose(2, 3) + bias[:, None]) / config.max_history_len
        mixed = (attention.tril() @ v).transpose(1, 2).reshape(x.shape)
        mixed = F.layer_norm(mixed, (dim,), w["attention_norm.weight"], w["attention_norm.bias"])
        x = x + (mixed * u) @ w["output.weight"].T + w["output.bias"]
    return x


def is_seen(batch):
    """float64 [T, N]: 1 where the item is in the history of the position."""
    seen = torch.zeros(len(batch.item_ids), NUM_ITEMS, dtype=torch.float64)
    for begin, end in pairwise(batch.offsets.tolist()):
        for position in range(begin, end):
            seen[position, batch.item_ids[begin : position + 1]] = 1
    return seen


def plain_loss(rows, weights, batch, config, log_weights, log_q):
    """Mean loss with every logit written out. log_weights [N]: -inf for items that are no candidate."""
    lengths = batch.offsets.diff()
    is_event = torch.arange(int(lengths.max())) < lengths[:, None]
    items, times, next_times = (
        torch.zeros(is_event.shape, dtype=torch.int64).masked_scatter(is_event, part)
        for part in (batch.item_ids, batch.timestamps, batch.next_timestamps)
    )
    x = plain_encoder(weights, rows[items], times, next_times, config.encoder)[is_event]
    if config.loss.similarity == "cosine":
        x, rows = F.normalize(x, dim=1), F.normalize(rows, dim=1)
    scores = x @ rows.T / config.loss.temperature
    if config.loss.use_seen_bias:
        scores = scores + 10 * torch.tanh(weights["seen_weight"] / 10) * is_seen(batch)
    target = batch.target_ids[:, None]
    own = scores.gather(1, target) - log_q[target]
    others = (scores + log_weights).scatter(1, target, -torch.inf)
    return (torch.cat([own, others], dim=1).logsumexp(1) - own[:, 0]).sum() / len(target)


def log_uniform(counts):
    """float64 [N]: Zipf's law by rank in frequency, in which items that occur equally often share."""
    ranks = torch.empty(NUM_ITEMS, dtype=torch.float64)
    ranks[counts.argsort(descending=True)] = torch.arange(NUM_ITEMS, dtype=torch.float64)
    of_rank = ((ranks + 2) / (ranks + 1)).log() / math.log(NUM_ITEMS + 1)
    return torch.stack([of_rank[counts == count].mean() for count in counts])


def candidates(config, dataset, batch, step):
    """(log of the times each item is a candidate less its logQ [N], logQ [N]) of a step."""
    loss = config.loss
    log_q = torch.zeros(NUM_ITEMS)
    if loss.negatives == "all":
        return torch.zeros(NUM_ITEMS), log_q
    counts = torch.from_numpy(np.asarray(dataset.train_counts)).double()
    powers = counts**loss.frequency_power
    by_power = powers / powers.sum()
    probability = {
        "in_batch": counts / counts.sum(),
        "uniform": torch.full((NUM_ITEMS,), 1 / NUM_ITEMS),
        "frequency": by_power,
        "mixed": (1 / NUM_ITEMS + by_power) / 2,
        "log_uniform": log_uniform(counts),
    }[loss.negatives]
    if loss.use_logq:
        log_q = probability.clamp(min=1e-12).log().float()
    if loss.negatives == "in_batch":
        return torch.bincount(batch.target_ids, minlength=NUM_ITEMS).log() - log_q, log_q
    drawn = NegativeSampler(loss, dataset, config.train.seed).draw(step, batch)
    weights = torch.full((NUM_ITEMS,), -torch.inf)
    weights[drawn.ids] = drawn.log_weights
    times_drawn = (weights + log_q).exp()  # whole numbers that add up to what was asked for
    torch.testing.assert_close(times_drawn, times_drawn.round(), atol=1e-4, rtol=0)
    assert round(float(times_drawn.sum())) == loss.num_negatives
    return weights, log_q


def plain_rate(config, step, steps_an_epoch):
    """The learning rates' factor: linear warm-up, then constant or half a cosine to 0 at the last step."""
    if step < config.optim.warmup_steps:
        return (step + 1) / config.optim.warmup_steps
    if config.optim.schedule == "constant":
        return 1.0
    return (1 + np.cos(np.pi * step / (config.train.max_epochs * steps_an_epoch - 1))) / 2


def train_plainly(path, settings, rows, encoder_state):
    """The same steps on whole batches; encoder, loss and optimizers written out in plain torch, float64."""
    dataset = Dataset(path)
    config = resolved(make_config(path, settings), dataset)
    rows = torch.from_numpy(rows).double().requires_grad_()
    weights = {n: torch.from_numpy(v).double().requires_grad_() for n, v in encoder_state.items()}
    stream = TrainStream(dataset, config.data, config.encoder.max_history_len, config.train.seed)
    of_encoder = [weight for name, weight in weights.items() if name != "seen_weight"]
    optimizer = torch.optim.AdamW(
        [{"params": of_encoder, "weight_decay": config.optim.weight_decay}], betas=(0.9, 0.98)
    )
    if "seen_weight" in weights:
        optimizer.add_param_group({"params": [weights["seen_weight"]], "weight_decay": 0})
    moment, losses, step = torch.zeros(NUM_ITEMS, 1, dtype=torch.float64), [], 0
    for epoch in range(9):
        for index in range(stream.num_steps(epoch)):
            if step == NUM_STEPS:
                continue
            batch = stream.batch(epoch, index)
            loss = plain_loss(
                rows, weights, batch, config, *candidates(config, dataset, batch, step)
            )
            loss.backward()
            nn.utils.clip_grad_norm_(weights.values(), 1.0)
            factor = plain_rate(config, step, stream.num_steps(0))
            for group, multiple in zip(optimizer.param_groups, (1, 10), strict=False):
                group["lr"] = 1e-3 * factor * multiple
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                moment += rows.grad.square().mean(1, keepdim=True)
                is_sgd = config.table.optimizer == "sgd"
                divisor = 1 if is_sgd else moment.sqrt() + config.table.eps
                rows -= config.table.lr * factor * rows.grad / divisor
                rows.grad = None
            losses.append(float(loss.detach()))
            step += 1
    return losses, rows.detach().numpy(), {n: v.detach() for n, v in weights.items()}


def whole_table(results, part):
    shards = sorted(((first, rows) for r in results for rows, first in r[part]), key=lambda s: s[0])
    return np.concatenate([rows for _, rows in shards])


def assert_trains_as_the_plain_model(path, world_size, settings, train=train_sharded):
    """Losses, rows and weights of `train` on that many ranks; returns the losses."""
    results = run_ranks(world_size, train, path, settings)
    losses, rows, encoder = train_plainly(path, settings, whole_table(results, 1), results[0][3])
    for result in results:
        np.testing.assert_allclose(result[0], losses, rtol=0, atol=1e-5)
        for name, value in encoder.items():
            np.testing.assert_allclose(result[4][name], value.numpy(), atol=2e-5, err_msg=name)
    np.testing.assert_allclose(whole_table(results, 2), rows, atol=1e-5)
    return losses


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_losses_and_weights_equal_the_unsharded_model(tmp_path, world_size, settings):
    path = tmp_path / "data"
    make_data(path)
    losses = assert_trains_as_the_plain_model(path, world_size, settings)
    assert abs(losses[0] - losses[-1]) > 1e-3


def train_as_a_gpu_does(path, settings):
    """`train_sharded` with the kernels, in Triton's interpreter, and ids in many bags."""
    os.environ["TRITON_INTERPRET"] = "1"
    item_table.NUM_BAGS["cpu"] = 7
    softmax.fuses = lambda _is_hopper, _dtype, _width, has_seen: not has_seen
    return train_sharded(path, ["encoder.attention_kernel=triton", *settings])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["all, with ranks without users and dot products", "in_batch"])
def test_the_kernels_train_as_the_unsharded_model(tmp_path, world_size, name):
    path, settings = tmp_path / "data", SETTINGS[name]
    make_data(path)
    assert_trains_as_the_plain_model(path, world_size, settings, train_as_a_gpu_does)


def test_bfloat16_trains_as_float32_does_but_for_rounding(tmp_path):
    path, settings = tmp_path / "data", ["loss.negatives=all"]
    make_data(path)
    exact, rounded = (
        run_ranks(1, train_sharded, path, [*settings, f"train.precision={precision}"])[0]
        for precision in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(rounded[0], exact[0], rtol=0, atol=0.02)
    assert rounded[0] != exact[0]
    for name, value in exact[4].items():
        moved, other = (result[4][name] - exact[3][name] for result in (exact, rounded))
        assert value.dtype == rounded[4][name].dtype == np.float32
        # Adam's steps are as long for rounded gradients, and most go the same way.
        assert (
            np.sign(moved[moved != 0]).dot(np.sign(other[moved != 0])) > 0.5 * (moved != 0).sum()
        ), name


def initial_rows(path, seed, settings=()):
    """The untrained item table's rows on this rank, and their first item."""
    item_table.INIT_BLOCK_ROWS = 7  # several blocks, none of which ends with a rank's rows
    config = make_config(path, [f"train.seed={seed}", *settings])
    learner = Learner(config, Dataset(path), torch.device("cpu"))
    learner.begin()
    return [[(rows.numpy(), first) for rows, first in local_shards(learner.model)]]


def test_the_first_rows_depend_on_the_seed_and_not_on_the_ranks(tmp_path):
    path = tmp_path / "data"
    make_data(path)
    one, other = (whole_table(run_ranks(1, initial_rows, path, seed), 0) for seed in (1, 2))
    np.testing.assert_array_equal(whole_table(run_ranks(3, initial_rows, path, 1), 0), one)
    assert not np.isclose(one, other).any()
    assert 0.015 < one.std() < 0.025


@pytest.mark.parametrize(
    "sharding", ["row_wise", pytest.param("table_wise", marks=pytest.mark.slow)]
)
def test_rows_of_co_occurrence_are_on_every_rank_what_process_0_made(tmp_path, sharding):
    path = tmp_path / "data"
    make_data(path)
    settings = ["table.init=co_occurrence", "table.init_norm=0.7", f"table.sharding={sharding}"]
    rows = whole_table(run_ranks(3, initial_rows, path, 1, settings), 0)
    vectors = 0.7 * item_vectors(count_pairs(Dataset(path)), 8, 1).numpy()
    occurs = vectors.any(1)
    # Processes may sum in another order, by their numbers of threads.
    np.testing.assert_allclose(rows[occurs], vectors[occurs], atol=1e-5)
    normal = whole_table(run_ranks(1, initial_rows, path, 1), 0)
    np.testing.assert_array_equal(rows[~occurs], normal[~occurs])
    assert 0 < occurs.sum() < NUM_ITEMS


def step_after_damage(path, settings):
    """(the guard's sentence, rows before, rows after) of a step whose encoder is NaN on rank 0 only."""
    learner = Learner(make_config(path, settings), Dataset(path), torch.device("cpu"))
    learner.step(0, 0, 0)
    if distributed.rank() == 0:
        with torch.no_grad():
            learner.dense[0].fill_(math.nan)
    before = [rows.clone().numpy() for rows, _ in local_shards(learner.model)]
    with pytest.raises(FloatingPointError) as raised:
        learner.step(0, 1, 1)
    return str(raised.value), before, [rows.numpy() for rows, _ in local_shards(learner.model)]


@pytest.mark.fault("R12")
@pytest.mark.parametrize("settings", [SETTINGS["uniform"], SETTINGS["all"]], ids=["uniform", "all"])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_a_row_changes(tmp_path, settings):
    path = tmp_path / "data"
    make_data(path)
    for sentence, before, after in run_ranks(2, step_after_damage, path, settings):
        assert "the loss is nan at step 1 (epoch 0, batch 1); nothing was changed by it" in sentence
        np.testing.assert_equal(after, before)


def losses_of_two_steps(path, settings):
    config = make_config(path, [*settings, "data.batch_users=4"])
    learner = Learner(config, Dataset(path), torch.device("cpu"))
    return [learner.step(0, index, index).loss for index in range(2)]


def refusal(path, settings):
    with pytest.raises(ValueError) as raised:
        losses_of_two_steps(path, settings)
    return str(raised.value)


@pytest.mark.parametrize("negatives", ["all", pytest.param("uniform", marks=pytest.mark.slow)])
def test_more_ranks_than_items_need_one_owner(tmp_path, negatives):
    path, settings = tmp_path / "data", [f"loss.negatives={negatives}"]
    write_dataset(path, [[0, 1, 0, 1, 1]] * 8, num_items=2)
    for sentence in run_ranks(3, refusal, path, settings):
        assert sentence.startswith("2 items cannot be spread over 3 ranks")
        assert "table.sharding=table_wise" in sentence
    alone = run_ranks(1, losses_of_two_steps, path, settings)[0]
    for losses in run_ranks(3, losses_of_two_steps, path, [*settings, "table.sharding=table_wise"]):
        np.testing.assert_allclose(losses, alone, atol=1e-5)

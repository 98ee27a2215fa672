"""The chunked loss against the formula in float64, with gradients by autograd."""

import math
from dataclasses import replace

import pytest
import torch

from hstu_rec import loss as loss_module
from hstu_rec import softmax
from hstu_rec.loss import MAX_SEEN_BIAS, LossConfig, SampledSoftmax
from hstu_rec.softmax import Negatives

NUM_ITEMS, NUM_POSITIONS, DIM = 70, 23, 8


def formula(config, encoded, targets, target_ids, rows, negatives, bias=0.0):
    """-log softmax of every position over its target and the negatives other than it, one by one."""
    ranges = [] if negatives.seen is None else negatives.seen.T.tolist()
    pairs = {(p, place) for first, end, place in ranges for p in range(first, end)}
    unit = torch.nn.functional.normalize if config.similarity == "cosine" else torch.clone
    query, target, candidates = unit(encoded) / config.temperature, unit(targets), unit(rows)
    own = (query * target).sum(1)
    if negatives.target_log_q is not None:
        own = own - negatives.target_log_q
    if negatives.is_target_seen is not None:
        own = own + bias * negatives.is_target_seen
    total = 0
    for p in range(len(query)):
        logits = candidates @ query[p]
        if negatives.log_weights is not None:
            logits = logits + negatives.log_weights
        is_seen = torch.tensor([(p, r) in pairs for r in range(len(rows))])
        logits = logits + bias * is_seen
        others = logits[negatives.ids != target_ids[p]]
        total = total + torch.logsumexp(torch.cat([own[p : p + 1], others]), 0) - own[p]
    return total


def random_ranges():
    """int64 [3, F] as in Negatives: two ranges of positions, some of them touching, for half of the items."""
    bounds = torch.randint(0, NUM_POSITIONS + 1, (NUM_ITEMS, 4)).sort(1).values
    place = torch.arange(NUM_ITEMS)[::2]
    ranges = torch.cat([torch.cat([bounds[::2, at : at + 2], place[:, None]], 1) for at in (0, 2)])
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    return ranges[ranges[:, 2].argsort(stable=True)].T


@pytest.mark.parametrize("seen_weight", [None, 0.0, 3.0, -12.0])
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(
    ("similarity", "temperature"),
    # On either side of what needs no maximum: 0.0226 and 0.0225, with seen bias 0.0292 and 0.0290.
    [("cosine", t) for t in (0.05, 0.0292, 0.0290, 0.0226, 0.0225)] + [("dot", 1.0), ("dot", 0.1)],
)
@pytest.mark.parametrize(
    ("chunk", "tile"), [(2**22, 2**19), (7 * NUM_ITEMS, 1), (1, 1), (2**22, 5 * NUM_ITEMS)]
)
def test_chunks_and_tiles_equal_the_formula(
    monkeypatch, chunk, tile, similarity, temperature, with_weights, seen_weight
):
    monkeypatch.setitem(softmax.CHUNK_LOGITS, "cpu", chunk)
    monkeypatch.setitem(softmax.TILE_LOGITS, "cpu", tile)
    torch.manual_seed(0)
    ids = torch.arange(NUM_ITEMS) * 2
    # Between those of an item that is always drawn and of one that hardly ever is.
    rare = math.log(loss_module.MIN_PROBABILITY)
    weights, log_q = torch.rand(NUM_ITEMS) * -rare, torch.rand(NUM_POSITIONS) * rare
    weights[0], log_q[0] = -rare, rare
    negatives = Negatives(ids, weights, log_q) if with_weights else Negatives(ids)
    # About half of the targets are among the negatives.
    target_ids = torch.randint(0, 2 * NUM_ITEMS, (NUM_POSITIONS,))
    config = LossConfig(
        similarity=similarity, temperature=temperature, use_seen_bias=seen_weight is not None
    )
    if config.use_seen_bias:
        seen = random_ranges()
        is_target_seen = torch.rand(NUM_POSITIONS) < 0.3
        negatives = replace(negatives, seen=seen, is_target_seen=is_target_seen)
    shapes = (NUM_POSITIONS, NUM_POSITIONS, NUM_ITEMS)
    encoded, targets, rows = (torch.randn(n, DIM, requires_grad=True) for n in shapes)
    leaves, loss = [encoded, targets, rows], SampledSoftmax(config)
    if seen_weight is not None:
        loss.seen_weight.data.fill_(seen_weight)
        leaves.append(loss.seen_weight)
    mine = loss(encoded, targets, target_ids, rows, negatives)
    mine.backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    bias = MAX_SEEN_BIAS * torch.tanh(exact[3] / MAX_SEEN_BIAS) if config.use_seen_bias else 0.0
    expected = formula(config, exact[0], exact[1], target_ids, exact[2], negatives, bias)
    expected.backward()
    torch.testing.assert_close(mine.double(), expected, rtol=2e-6, atol=1e-5)
    for got, want in zip(leaves, exact, strict=True):
        assert want.grad.abs().max() > 0
        scale = want.grad.abs().max()
        # The seen bias has one gradient, what is left of sums over all positions.
        atol = 5e-6 if want.ndim else 2e-5
        torch.testing.assert_close(got.grad.double() / scale, want.grad / scale, rtol=0, atol=atol)


@pytest.mark.parametrize(("num_positions", "num_candidates"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_score_is_no_loss(num_positions, num_candidates):
    shapes = (num_positions, num_positions, num_candidates)
    encoded, targets, rows = (torch.randn(n, DIM, requires_grad=True) for n in shapes)
    negatives = Negatives(torch.arange(num_candidates))
    ids = torch.arange(num_positions)
    loss = SampledSoftmax(LossConfig())(encoded, targets, ids, rows, negatives)
    loss.backward()
    assert loss == 0
    assert all(not x.grad.any() for x in (encoded, targets, rows))

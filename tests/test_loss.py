"""The chunked loss against the formula in float64, with gradients by autograd."""

import math

import pytest
import torch

from hstu_rec import loss as loss_module
from hstu_rec.loss import LossConfig, Negatives, SampledSoftmax

NUM_ITEMS, NUM_POSITIONS, DIM = 70, 23, 8


def formula(config, encoded, targets, target_ids, rows, negatives):
    """-log softmax of every position over its target and the negatives other than it, one by one."""
    unit = torch.nn.functional.normalize if config.similarity == "cosine" else torch.clone
    query, target, candidates = unit(encoded) / config.temperature, unit(targets), unit(rows)
    own = (query * target).sum(1)
    if negatives.target_log_q is not None:
        own = own - negatives.target_log_q
    total = 0
    for p in range(len(query)):
        logits = candidates @ query[p]
        if negatives.log_weights is not None:
            logits = logits + negatives.log_weights
        others = logits[negatives.ids != target_ids[p]]
        total = total + torch.logsumexp(torch.cat([own[p : p + 1], others]), 0) - own[p]
    return total


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(
    ("similarity", "temperature"),
    # 0.0226 and 0.0225: on either side of what needs no maximum.
    [("cosine", 0.05), ("cosine", 0.0226), ("cosine", 0.0225), ("dot", 1.0), ("dot", 0.1)],
)
@pytest.mark.parametrize(
    ("chunk", "tile"), [(2**22, 2**19), (7 * NUM_ITEMS, 1), (1, 1), (2**22, 5 * NUM_ITEMS)]
)
def test_chunks_and_tiles_equal_the_formula(
    monkeypatch, chunk, tile, similarity, temperature, with_weights
):
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", chunk)
    monkeypatch.setitem(loss_module.TILE_LOGITS, "cpu", tile)
    torch.manual_seed(0)
    ids = torch.arange(NUM_ITEMS) * 2
    # Between those of an item that is always drawn and of one that hardly ever is.
    rare = math.log(loss_module.MIN_PROBABILITY)
    weights, log_q = torch.rand(NUM_ITEMS) * -rare, torch.rand(NUM_POSITIONS) * rare
    weights[0], log_q[0] = -rare, rare
    negatives = Negatives(ids, weights, log_q) if with_weights else Negatives(ids)
    # About half of the targets are among the negatives.
    target_ids = torch.randint(0, 2 * NUM_ITEMS, (NUM_POSITIONS,))
    config = LossConfig(similarity=similarity, temperature=temperature)
    shapes = (NUM_POSITIONS, NUM_POSITIONS, NUM_ITEMS)
    encoded, targets, rows = (torch.randn(n, DIM, requires_grad=True) for n in shapes)
    mine = SampledSoftmax(config)(encoded, targets, target_ids, rows, negatives)
    mine.backward()
    exact = [x.detach().double().requires_grad_() for x in (encoded, targets, rows)]
    expected = formula(config, exact[0], exact[1], target_ids, exact[2], negatives)
    expected.backward()
    torch.testing.assert_close(mine.double(), expected, rtol=2e-6, atol=1e-5)
    for got, want in zip((encoded, targets, rows), exact, strict=True):
        assert want.grad.abs().max() > 0
        scale = want.grad.abs().max()
        torch.testing.assert_close(got.grad.double() / scale, want.grad / scale, rtol=0, atol=5e-6)


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

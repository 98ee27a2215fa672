"""Counting in the kernel against exact ranks: on a GPU as compiled, elsewhere in Triton's interpreter."""

import numpy as np
import pytest
import torch

from hstu_rec import ranking
from hstu_rec.ops import triton_counts
from hstu_rec.portions import Portion
from hstu_rec.ranking import Queries, rank_targets
from hstu_rec.scores import ItemShard, certain_bounds
from tests import oracles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The kernel, also where no GPU is, and several programs."""
    monkeypatch.setattr(ranking, "_fuses", lambda vectors: True)
    monkeypatch.setattr(triton_counts, "NUM_PROGRAMS", 4)
    if DEVICE.type == "cpu":
        # The interpreter sums products of float16 in float16; as float32 they are the same numbers.
        in_half = triton_counts.halves
        monkeypatch.setattr(
            triton_counts, "halves", lambda *x: tuple(part.float() for part in in_half(*x))
        )


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranks_of(items, vectors, targets, seen, chunk_items):
    targets = torch.as_tensor(targets)
    ids = torch.tensor([item for history in seen for item in history], dtype=torch.int64)
    offsets = torch.tensor([0, *map(len, seen)]).cumsum(0)
    queries = Queries(
        *(
            t.to(DEVICE)
            for t in (vectors, items[targets], targets, ids, offsets, torch.zeros_like(targets))
        )
    )
    shard = ItemShard(items.to(DEVICE), 0, len(items))
    found = rank_targets(queries, shard, Portion("eval.chunk_items", chunk_items))
    return tuple(ranks.tolist() for ranks in found)


def expected(items, vectors, targets, seen):
    return oracles.ranks(items.numpy(), vectors.numpy(), np.asarray(targets), seen, 0.0, None)


def not_in_tiles(monkeypatch):
    def refuse(*_):
        raise AssertionError("the kernel should have decided")

    monkeypatch.setattr(ranking, "_count_in_tiles", refuse)


@pytest.mark.parametrize("chunk_items", [50, 128, 1000])
@pytest.mark.parametrize("dim", [1, 33, 64, 128, 200])
def test_the_kernel_ranks_exactly(monkeypatch, dim, chunk_items):
    not_in_tiles(monkeypatch)
    items, vectors = normal(300, dim), normal(140, dim, seed=1)
    targets, seen = range(140), [list(range(q % 7, 300, 11)) for q in range(140)]
    assert ranks_of(items, vectors, targets, seen, chunk_items) == expected(
        items, vectors, targets, seen
    )


def test_scores_within_the_rounding_of_halves_are_decided_exactly(monkeypatch):
    not_in_tiles(monkeypatch)
    items = normal(1, 33).repeat(120, 1)
    place = torch.arange(120)
    items[place, place % 33] *= 1 + 2.0**-23 * (place % 3 - 1)
    vectors, targets = normal(6, 33, seed=1), [0, 1, 2, 60, 61, 119]
    seen = [list(range(0, 120, step)) for step in (1, 2, 3, 5, 7, 11)]
    assert ranks_of(items, vectors, targets, seen, 64) == expected(items, vectors, targets, seen)


def test_more_near_items_than_there_is_room_for_are_counted_otherwise(monkeypatch):
    monkeypatch.setattr(triton_counts, "MAX_NEAR", 5)
    items = normal(1, 16).repeat(60, 1)
    items[30:] = normal(30, 16, seed=2)
    vectors, seen = normal(40, 16, seed=1), [[]] * 40
    assert ranks_of(items, vectors, range(40), seen, 25) == expected(
        items, vectors, range(40), seen
    )


@pytest.mark.parametrize(
    ("query_scale", "item_scale"), [(1e20, 1e20), (1e-20, 1e-22), (1e30, 1e-30), (0.0, 1.0)]
)
def test_numbers_beyond_what_halves_hold_are_counted_otherwise(query_scale, item_scale):
    items, vectors = normal(50, 8) * item_scale, normal(10, 8, seed=1) * query_scale
    seen = [[]] * 10
    assert ranks_of(items, vectors, range(10), seen, 20) == expected(
        items, vectors, range(10), seen
    )


@pytest.mark.parametrize("width", [1, 64, 128, 256])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_halves_leave_out_no_more_than_is_claimed(width, scale):
    queries, items = normal(64, width) * scale, normal(512, width, seed=1) * scale
    items[::7] *= 1e-6
    norms = [torch.linalg.vector_norm(x.double(), dim=1) for x in (queries, items)]
    scales = triton_counts.scale_of(norms[0])[:, None], triton_counts.scale_of(norms[1].max())
    (q_high, q_low), (x_high, x_low) = (
        [part.double() for part in triton_counts.halves(x, by)]
        for x, by in zip((queries, items), scales, strict=True)
    )
    assert (q_high.norm(dim=1) <= 257).all()
    kept = q_low @ x_high.T + q_high @ x_low.T + q_high @ x_high.T
    exact = (queries.double() * scales[0]) @ (items.double() * scales[1]).T
    share = (kept - exact).abs() / (norms[0][:, None] * scales[0] * norms[1].max() * scales[1])
    assert 0 < share.max() <= 4 * 2.0**-22 < triton_counts.rounding(width)


@pytest.mark.skipif(
    DEVICE.type == "cpu", reason="the interpreter has no tensor cores, whose sums are tested"
)
@pytest.mark.parametrize("width", [1, 16, 33, 64, 128, 256])
@pytest.mark.parametrize("kind", ["normal", "alternating", "one large"])
def test_no_sum_of_tensor_cores_is_further_from_the_exact_one_than_is_claimed(width, kind):
    queries, items = (
        (normal(128, width).abs() + 0.5).cuda(),
        (normal(256, width, seed=1).abs() + 0.5).cuda(),
    )
    if kind == "alternating":
        items[:, ::2] *= -1
    if kind == "one large":
        items[:, 0] *= 2.0**10
    norms = [torch.linalg.vector_norm(x.double(), dim=1) for x in (queries, items)]
    scales = triton_counts.scale_of(norms[0]), triton_counts.scale_of(norms[1].max())
    halves = [
        triton_counts.halves(queries, scales[0][:, None]), triton_counts.halves(items, scales[1])
    ]  # fmt: skip
    exact = (queries.double() @ items.double().T) * scales[0][:, None] * scales[1]
    reach = norms[0] * norms[1].max() * scales[0] * scales[1]
    margin = (triton_counts.rounding(width) * reach)[:, None]
    own = torch.full((128,), -1, dtype=torch.int32, device=DEVICE)
    for item in range(0, 256, 5):
        # A bound just beyond what rounding may do to this item's score.
        one = [half[item : item + 1] for half in halves[1]]
        for low, high, expected in (
            (-torch.inf, exact - margin, 1),
            (-torch.inf, exact + margin, 0),
        ):
            bound = high[:, item].float()
            found = triton_counts.count_scores(
                halves[0], one, torch.full_like(bound, low), bound, own
            )
            assert (found.num_above == expected).all()


def test_few_scores_are_too_near_to_decide():
    """So that it is the kernel's counts that the other tests hold."""
    items, vectors = normal(3000, 64), normal(20, 64, seed=1)
    exact = (vectors.double() * items[:20].double()).sum(1)
    reach = (
        torch.linalg.vector_norm(vectors.double(), dim=1)
        * torch.linalg.vector_norm(items.double(), dim=1).max()
    )
    low, high = certain_bounds(exact, reach, triton_counts.rounding(64))
    scores = vectors.double() @ items.double().T
    near = (scores >= low[:, None]) & (scores <= high[:, None])
    assert near.sum(1).max() < 10

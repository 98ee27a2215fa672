"""The best items, found by float32 products, are those of a plain float64 loop, ties and near ties too."""

import numpy as np
import pytest
import torch

from hstu_rec import scores
from hstu_rec.loss import LossConfig, SampledSoftmax
from hstu_rec.scores import Catalogue, ItemShard, Seen, best_items, exact_scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def catalogue_of(rows, similarity="dot"):
    loss = SampledSoftmax(LossConfig(similarity=similarity))
    shard = ItemShard(rows, 0, len(rows), loss.item_vectors)
    return Catalogue.of(shard), loss.item_vectors(rows)


def by_loop(queries, vectors, num_best, seen):
    """(score, item) by query: the best first, of equal scores the lower item."""
    found = []
    for place, query in enumerate(queries):
        pairs = query.expand(len(vectors), -1)
        values = exact_scores(pairs, vectors).cpu().numpy().copy()
        values[seen.items[seen.owners == place].unique().cpu()] += seen.added
        order = np.lexsort((np.arange(len(values)), -values))[:num_best]
        found.append([(values[item], item) for item in order if values[item] > -np.inf])
    return found


def as_pairs(best, items):
    return [
        [(float(s), int(i)) for s, i in zip(row, ids, strict=True) if s > -np.inf]
        for row, ids in zip(best, items, strict=True)
    ]


def rows_of(kind, num_items, dim, generator):
    rows = torch.randn(num_items, dim, generator=generator).to(DEVICE)
    if kind == "near":  # far closer than float32 tells apart
        rows = rows[:1] + rows * 1e-7
    elif kind == "equal":
        rows = rows[:1].expand(num_items, -1).clone()
    elif kind == "few":
        rows = rows[torch.randint(0, 5, (num_items,), generator=generator).to(DEVICE)]
    elif kind == "zero":
        rows[::2] = 0
    elif kind == "small":
        rows *= 1e-25
    elif kind == "of all sizes":
        rows *= 10.0 ** torch.randint(-12, 13, (num_items, 1), generator=generator).to(DEVICE)
    return rows


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(
    "kind", ["normal", "near", "equal", "few", "zero", "small", "of all sizes"]
)
@pytest.mark.parametrize("num_queries", [7, 13])  # fewer and more than numbers in a vector
@pytest.mark.parametrize("added", [-np.inf, 0.3, -10.0])
def test_the_best_items_are_those_of_a_plain_loop(
    monkeypatch, similarity, kind, added, num_queries
):
    monkeypatch.setattr(scores, "CHUNK_ITEMS", (64, 64))
    generator = torch.Generator().manual_seed(3)
    rows = rows_of(kind, 333, 12, generator)
    catalogue, vectors = catalogue_of(rows, similarity)
    queries = torch.randn(num_queries, 12, generator=generator).to(DEVICE)
    seen = Seen(
        torch.randint(0, num_queries, (200,), generator=generator).to(DEVICE),
        torch.randint(0, 333, (200,), generator=generator).to(DEVICE),
        added,
    )
    for num_best in (1, 10, 70, 400):
        found = as_pairs(*best_items(queries, catalogue, num_best, seen))
        assert found == by_loop(queries, vectors, num_best, seen)


def test_what_is_not_finite_is_refused():
    rows = torch.ones(20, 4)
    none = torch.zeros(0, dtype=torch.int64)
    catalogue, _ = catalogue_of(rows)
    with pytest.raises(FloatingPointError, match="queries are not finite"):
        best_items(torch.full((1, 4), torch.nan), catalogue, 3, Seen(none, none, 0.0))
    rows[7, 2] = torch.inf
    with pytest.raises(FloatingPointError, match="rows of items hold NaN, infinity"):
        catalogue_of(rows)

"""The ranking model: no look at what came afterwards, cached scores, exact figures, a rule learned."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hstu_rec.config import load
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.features import EventFeatures, Feature, Task, features_of
from hstu_rec.ranker.model import PooledHistory, RankBatch, RankingModel, head_of
from hstu_rec.ranker.scoring import binary_metrics, grouped_auc

DIM = 16


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(30, DIM))

    def forward(self, ids):
        return self.rows[ids]


def made_model(kind):
    torch.manual_seed(0)
    encoder = HSTUEncoder(EncoderConfig(dim=DIM, max_history_len=16, num_layers=2))
    history = encoder if kind == "hstu" else PooledHistory(DIM, 0.2)
    context = EventFeatures([Feature("price", 0, 5.0, 2.0)], DIM)
    outcomes = EventFeatures([Feature("rating", 6), Feature("seconds", 0, 9.0, 9.0)], DIM)
    for weight in [*context.parameters(), *outcomes.parameters()]:
        nn.init.normal_(weight)
    return RankingModel(Rows(), history, context, outcomes, head_of(DIM, 8, 2, 0.2)).eval()


def made_batch(lengths=(5, 0, 8, 1)):
    count = sum(lengths)
    generator = torch.Generator().manual_seed(1)
    return RankBatch(
        item_ids=torch.randint(0, 30, (count,), generator=generator),
        timestamps=torch.randint(0, 10**6, (count,), generator=generator).sort().values,
        offsets=torch.tensor([0, *itertools.accumulate(lengths)]),
        context={"price": torch.rand(count, generator=generator) * 10},
        outcomes={
            "rating": torch.randint(0, 6, (count,), generator=generator).float(),
            "seconds": torch.rand(count, generator=generator) * 20,
        },
    )


@pytest.mark.parametrize("kind", ["hstu", "pooled"])
def test_an_event_is_predicted_from_what_was_known_before_it(kind):
    model, batch = made_model(kind), made_batch()
    before = model(batch)
    changed = {name: values.clone() for name, values in batch.outcomes.items()}
    changed["rating"][7] = (changed["rating"][7] + 1) % 6  # event 2 of user 2
    changed["seconds"][7] += 5
    after = model(replace(batch, outcomes=changed))
    is_same = (before == after).all(dim=1)
    assert is_same.tolist() == [True] * 8 + [False] * 5 + [True]
    # What was shown counts at once, and what it costs.
    for name in ("item_ids", "price"):
        given = batch.item_ids if name == "item_ids" else batch.context["price"]
        other = given.clone()
        other[7] = other[7] + 1 if name == "price" else (other[7] + 1) % 30
        new = {"item_ids": other} if name == "item_ids" else {"context": {"price": other}}
        is_same = (model(replace(batch, **new)) == before).all(dim=1)
        assert is_same.tolist() == [True] * 7 + [False] * 6 + [True]


@pytest.mark.parametrize("kind", ["hstu", "pooled"])
def test_a_candidate_is_scored_as_the_next_event_would_be(kind):
    model, batch = made_model(kind), made_batch((5, 0, 7, 1))
    history = model.encode_history(batch)
    counts, at = torch.tensor([2, 1, 3, 0]), torch.tensor([2, 3, 4, 5]) * 10**6
    items, price = torch.tensor([3, 29, 0, 7, 7, 12]), torch.linspace(1, 9, 6)
    found = model.score_candidates(items, counts, history, at, {"price": price})
    assert found.shape == (6, 2)
    owners = torch.repeat_interleave(torch.arange(4), counts).tolist()
    for place, user in enumerate(owners):
        part = slice(*batch.offsets[user : user + 2].tolist())
        one = RankBatch(
            item_ids=torch.cat([batch.item_ids[part], items[place, None]]),
            timestamps=torch.cat([batch.timestamps[part], at[user, None]]),
            offsets=torch.tensor([0, part.stop - part.start + 1]),
            context={"price": torch.cat([batch.context["price"][part], price[place, None]])},
            # Of what comes of it nothing is known, and nothing is looked at.
            outcomes={
                name: torch.cat([values[part], torch.tensor([5.0])])
                for name, values in batch.outcomes.items()
            },
        )
        torch.testing.assert_close(found[place], model(one)[-1].sigmoid(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["hstu", "pooled"])
def test_wrong_candidates_are_told_by_both_histories(kind):
    model, batch = made_model(kind), made_batch((5, 2))
    history = model.encode_history(batch)
    items, at = torch.tensor([1, 2]), torch.tensor([10**6, 10**6])
    context = {"price": torch.ones(2)}
    for counts, told in [([1, 2], "tells of 3 candidates in all; got 2"), ([3, -1], "got -1")]:
        with pytest.raises(ValueError, match=told):
            model.score_candidates(items, torch.tensor(counts), history, at, context)
    with pytest.raises(ValueError, match=r"at must be int64 \[2\]"):
        model.score_candidates(items, torch.tensor([1, 1]), history, at[:1], context)
    if kind == "hstu":
        with pytest.raises(ValueError, match="has 8 events; candidates come after 7 at most"):
            model.encode_history(made_batch((8,)))
    model.train()
    with pytest.raises(ValueError, match="score_candidates is for serving"):
        model.score_candidates(items, torch.tensor([1, 1]), history, at, context)
    with pytest.raises(ValueError, match="encode_history is for serving"):
        model.encode_history(batch)


def test_features_are_told_what_they_may_be():
    features = EventFeatures([Feature("rating", 6), Feature("price", 0, 1.0, 4.0)], DIM)
    rows = torch.zeros(2, DIM)
    rating, price = torch.tensor([0.0, 5.0]), torch.tensor([1.0, 3.0])
    found = features({"rating": rating, "price": price}, rows)
    expected = features.vectors[0][[0, 5]] + torch.tensor([[0.0], [0.5]]) * features.vectors[1]
    torch.testing.assert_close(found, expected)
    for values, told in [
        ({"rating": rating}, "feature 'price' is missing; got rating"),
        (
            {"rating": rating[:1], "price": price},
            r"'rating' must be \[2\], a value an event; got \[1\]",
        ),
        (
            {"rating": rating + 1, "price": price},
            r"categories 0\.\.5; got 1 other values, .* \[6\.0\]",
        ),
        ({"rating": rating + 0.5, "price": price}, r"got 2 other values"),
        ({"rating": rating * math.nan, "price": price}, r"got 2 other values"),
        ({"rating": rating - 1, "price": price}, r"\[-1\.0\]"),
    ]:
        with pytest.raises(ValueError, match=told):
            features(values, rows)


def test_an_event_without_a_value_has_a_vector_of_its_own():
    features = EventFeatures(
        [Feature("rating", 6, has_missing=True), Feature("price", 0, 1.0, 4.0, has_missing=True)],
        DIM,
    )
    given = {"rating": torch.tensor([math.nan, 5.0]), "price": torch.tensor([3.0, math.nan])}
    found = features(given, torch.zeros(2, DIM))
    rating, price = features.vectors
    torch.testing.assert_close(found[0], rating[6] + 0.5 * price[0])
    torch.testing.assert_close(found[1], rating[5] + price[1])
    found.sum().backward()
    assert rating.grad is not None and price.grad is not None
    assert rating.grad.isfinite().all() and price.grad[1].tolist() == [1.0] * DIM
    with pytest.raises(ValueError, match=r"categories 0\.\.5; got 1 other values, .* \[6\.0\]"):
        features(given | {"rating": torch.tensor([math.nan, 6.0])}, torch.zeros(2, DIM))
    with pytest.raises(ValueError, match="'price' must be numbers; got NaN or infinity"):
        features(given | {"price": torch.tensor([math.nan, math.inf])}, torch.zeros(2, DIM))


def test_columns_and_tasks_are_held_against_the_dataset():
    stars = {"min": 1.0, "max": 5.0, "mean": 3.0, "deviation": 1.5, "is_whole": True}
    facts = {"stars": stars, "kind": {"values": ["buy", "view"]}}
    assert features_of(["stars", "kind"], ["stars"], facts) == [
        Feature("stars", 6),
        Feature("kind", 2),
    ]
    assert features_of(["stars"], [], facts) == [Feature("stars", 0, 3.0, 1.5)]
    holes = facts | {"stars": stars | {"num_missing": 7}}
    assert features_of(["stars"], ["stars"], holes) == [Feature("stars", 6, has_missing=True)]
    labels = Task.of("stars>=4").labels(torch.tensor([math.nan, 5.0, 1.0]), 4.0)
    assert labels[0].isnan() and labels[1:].tolist() == [1, 0]
    with pytest.raises(ValueError, match="'stars' is from 1 to 5, with fractions; categories are"):
        features_of(["stars"], ["stars"], facts | {"stars": stars | {"is_whole": False}})
    for names, categories, told in [
        (["star"], [], "no feature 'star' .*has stars, kind.*feature_columns=.star"),
        (["stars"], ["kind"], "ranker.categories kind is none of the columns that are used: stars"),
    ]:
        with pytest.raises(ValueError, match=told):
            features_of(names, categories, facts)
    task = Task.of(" stars >= 4.5")
    assert (task.column, task.limit(facts)) == ("stars", 4.5)
    assert Task.of("kind==view").limit(facts) == 1
    labels = task.labels(torch.tensor([4.0, 4.5, 5.0]), 4.5)
    assert labels.tolist() == [0, 1, 1]
    assert Task.of("p==0.1").labels(torch.tensor([0.1]), 0.1).tolist() == [1]  # as float32 holds it
    for text, told in [
        ("kind==look", "compare it by == with one of buy, view"),
        ("kind>=view", "holds texts"),
        ("stars>=many", "'stars' holds numbers"),
    ]:
        with pytest.raises(ValueError, match=told):
            Task.of(text).limit(facts)
    for settings, told in [
        (["ranker.tasks=[rating]"], "tasks must be like rating>=4 or action==like; got 'rating'"),
        (["ranker.tasks=[]"], "tasks must be at least one"),
        (["ranker.context=[rating]"], "context must be known before an event; got rating"),
        (
            ["encoder.max_history_len=51"],
            "must be even and at least 4, two tokens an event; got 51",
        ),
        (["encoder.window=5"], "encoder.window must be even, two tokens an event; got 5"),
        (["encoder.query_time=next"], "query_time must be own"),
        (["table.init=co_occurrence"], "no effect on a ranker"),
        (["encoder.calendar=day"], "encoder.calendar must be none"),
        (
            ["ranker.history=pooled", "encoder.num_layers=9"],
            "num_layers has no effect with ranker.history=pooled",
        ),
    ]:
        with pytest.raises(ValueError, match=told):
            load(RankRunConfig, settings)


def slow_auc(scores, truth):
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, is_one in zip(scores, truth, strict=True)
        for b, is_other in zip(scores, truth, strict=True)
        if is_one and not is_other
    ]
    return sum(pairs) / len(pairs) if pairs else math.nan


def test_figures_are_those_of_the_slow_formulas():
    random = np.random.default_rng(0)
    scores = random.integers(1, 20, 300) / 20  # with ties
    truth = (random.random(300) < scores).astype(float)
    users = random.integers(0, 25, 300) * 7
    users[:4], truth[:4] = 999, 1.0  # a user of one label
    found = binary_metrics(*(torch.from_numpy(one) for one in (scores, truth, users)))
    assert found["auc"] == pytest.approx(slow_auc(scores, truth), abs=1e-12)
    own = [(slow_auc(scores[users == u], truth[users == u]), (users == u).sum()) for u in {*users}]
    both = [(auc, size) for auc, size in own if not math.isnan(auc)]
    expected = sum(auc * size for auc, size in both) / sum(size for _, size in both)
    assert found["gauc"] == pytest.approx(expected, abs=1e-12)
    assert (found["num_gauc_users"], found["num_users"]) == (len(both), len(own))
    share = truth.mean()
    entropy = -np.mean(np.log(np.where(truth == 1, scores, 1 - scores)))
    of_mean = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert found["ne"] == pytest.approx(entropy / of_mean, abs=1e-12)
    by_owner, sizes = grouped_auc(scores, truth, users)
    for auc, size, user in zip(by_owner, sizes, sorted({*users}), strict=True):
        mine = users == user
        np.testing.assert_allclose(auc, slow_auc(scores[mine], truth[mine]), atol=1e-12)
        assert size == mine.sum()


def test_figures_without_a_meaning_are_none():
    one = torch.ones(3)
    found = binary_metrics(one * 0.4, one, torch.arange(3))
    assert [found[name] for name in ("auc", "ne", "gauc")] == [None] * 3
    found = binary_metrics(one * 0.5, torch.tensor([0.0, 1.0, 1.0]), torch.arange(3))
    assert found["auc"] == 0.5 and found["gauc"] is None
    with pytest.raises(FloatingPointError, match=r"probabilities are outside 0\.\.1"):
        binary_metrics(one * math.nan, one, torch.arange(3))
    with pytest.raises(ValueError, match="metrics of no event at all"):
        binary_metrics(one[:0], one[:0], torch.arange(0))

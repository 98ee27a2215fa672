"""Events in which counts decide: their process, their best results, and what attention keeps of a count."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apps import make_events
from hstu_rec.config import load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.intensity import (
    CountingConfig,
    DirichletConfig,
    best_counting_recall,
    best_recall,
    counting_events,
    dirichlet_events,
    dirichlet_histories,
    next_probabilities,
)
from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.encoder import EncoderConfig, HSTUEncoder
from hstu_rec.ops import jagged_attention


def columns(events: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, items, times = (np.array(column.to_pylist()) for column in events.columns)
    return users, items, times


@pytest.mark.parametrize(("alpha", "discount"), [(3.0, 0.0), (40.0, 0.0), (8.0, 0.4)])
def test_new_items_are_as_many_as_theory_says(alpha: float, discount: float) -> None:
    config = DirichletConfig(
        num_users=6000, alpha=alpha, discount=discount, shortest=60, longest=60, zipf_exponent=0.5
    )
    made = dirichlet_histories(config)
    distinct = np.array([len(set(row)) for row in made.items.tolist()])
    expected = 0.0
    for n in range(60):  # E[K after n + 1] by the chance of a new item
        expected += (alpha + discount * expected) / (n + alpha)
    assert distinct.mean() == pytest.approx(expected, rel=0.01)
    if discount == 0:
        variance = sum(alpha * n / (n + alpha) ** 2 for n in range(60))
        assert distinct.var() == pytest.approx(variance, rel=0.06)


def test_the_next_item_comes_with_the_probabilities_of_the_formula() -> None:
    config = DirichletConfig(
        num_users=40_000, num_items=6, initial_share=1.0, alpha=2.0, discount=0.3,
        shortest=3, longest=3,
    )  # fmt: skip
    made = dirichlet_histories(config)
    first, second, third = made.items.T
    popular = made.popularity.argmax()
    np.testing.assert_allclose(
        np.bincount(first, minlength=6) / len(first), made.popularity, atol=0.01
    )
    for history in ([popular, popular], [popular, (popular + 1) % 6]):
        rows = (first == history[0]) & (second == history[1])
        counts = np.bincount(history, minlength=6).astype(float)
        expected = next_probabilities(counts, made.popularity, config)
        assert expected.sum() == pytest.approx(1)
        told = np.bincount(third[rows], minlength=6) / rows.sum()
        np.testing.assert_allclose(told, expected, atol=4 * np.sqrt(0.25 / rows.sum()))


def test_items_are_born_as_users_arrive_and_lengths_are_spread_evenly_in_the_logarithm() -> None:
    config = DirichletConfig(zipf_exponent=0.0)
    made = dirichlet_histories(config)
    is_event = np.arange(config.longest) < made.lengths[:, None]
    assert ((made.items >= 0) == is_event).all()
    assert (made.items < made.born[:, None])[is_event].all()
    assert made.born[0] == 120 and made.born[-1] == 299 and (np.diff(made.born) >= 0).all()
    assert made.items.max() >= 295
    assert (made.lengths.min(), made.lengths.max()) == (4, 100)
    assert np.median(made.lengths) == pytest.approx(np.sqrt(4 * 101), rel=0.1)


def test_events_are_the_histories_under_own_ids_in_time_order() -> None:
    config = DirichletConfig(num_users=300)
    made, (users, items, times) = dirichlet_histories(config), columns(dirichlet_events(config))
    expected = [
        [f"i{item:07d}" for item in row[:length]]
        for row, length in zip(made.items.tolist(), made.lengths, strict=True)
    ]
    cuts = np.flatnonzero(users[1:] != users[:-1]) + 1
    assert [part.tolist() for part in np.split(items, cuts)] == expected
    assert (np.diff(times)[users[1:] == users[:-1]] > 0).all()


@pytest.mark.parametrize("make", ["dirichlet", "counting"])
def test_the_same_seed_makes_the_same_events(make: str) -> None:
    one, same, other = (
        dirichlet_events(DirichletConfig(num_users=50, seed=seed))
        if make == "dirichlet"
        else counting_events(CountingConfig(num_users=50, seed=seed))
        for seed in (1, 1, 2)
    )
    assert one.equals(same) and not one.equals(other)
    assert one.schema.types == [pa.string(), pa.string(), pa.int64()]


def test_a_hundred_thousand_events_take_a_second() -> None:
    began = time.process_time()
    assert len(dirichlet_events(DirichletConfig())) > 100_000
    assert time.process_time() - began < 1.0


def test_nothing_beats_knowing_the_counts_and_that_is_what_last_events_give() -> None:
    config = DirichletConfig(num_users=4000, alpha=30.0, zipf_exponent=1.5)
    best = best_recall(config, 10)
    assert best["counts"] > best["shares"] > best["popularity"]
    made, hits = dirichlet_histories(config), 0
    for items, length, born in zip(made.items, made.lengths, made.born, strict=True):
        counts = np.bincount(items[: length - 1], minlength=born).astype(float)
        chances = next_probabilities(counts, made.popularity[:born], config)
        hits += items[length - 1] in np.argpartition(chances, -10)[-10:]
    assert hits / config.num_users == pytest.approx(best["counts"], abs=0.03)


@pytest.mark.parametrize("has_query", [False, True])
def test_a_count_alone_decides_the_answer(has_query: bool, tmp_path: Path) -> None:
    config = CountingConfig(num_users=1000, has_query=has_query)
    users, items, _ = columns(counting_events(config))
    markers = []
    for part in np.split(items, np.flatnonzero(users[1:] != users[:-1]) + 1):
        *history, answer = part.tolist()
        markers.append(history.count("marker"))
        assert history.count("filler") == 2 * markers[-1]
        assert len(history) == 3 * markers[-1] + has_query
        assert not has_query or history[-1] == "query"
        assert answer.startswith("high" if markers[-1] > config.threshold else "low")
    assert set(markers) == set(range(1, 13))
    pq.write_table(counting_events(config), tmp_path / "events.parquet")
    split = PrepareConfig(split="time", valid_time="2020-02-01", test_time="2020-06-01")
    stats = prepare(split, tmp_path / "events.parquet", tmp_path / "data")
    assert (stats["valid_targets"], stats["test_targets"]) == (200, 200)
    data = Dataset(tmp_path / "data")
    has_answer = data.valid_ends < data.lengths
    targets = data.gather(np.arange(1000)[has_answer], data.lengths[has_answer] - 1,
                          data.lengths[has_answer])[0]  # fmt: skip
    names = np.array(data.item_ids.to_pylist())[targets]
    assert np.char.startswith(names, "high").sum() + np.char.startswith(names, "low").sum() == 200


def test_the_best_of_the_counting_events_is_a_group_of_answers() -> None:
    assert best_counting_recall(CountingConfig(), 10) == {"counts": 1.0, "shares": 0.5}
    known = best_counting_recall(CountingConfig(has_query=True), 10)
    assert known == {"counts": 1.0, "shares": 0.625}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (DirichletConfig(alpha=0.0), "alpha must be above 0; got 0.0"),
        (DirichletConfig(discount=1.0), r"discount must be in \[0, 1\); got 1.0"),
        (DirichletConfig(longest=200), "num_items \\* initial_share must be above longest"),
        (DirichletConfig(shortest=2), "need 3 <= shortest <= longest; got 2 and 100"),
    ],
)
def test_a_process_that_cannot_be_is_refused(config: DirichletConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dirichlet_histories(config)


def test_the_app_writes_what_prepare_reads_and_tells_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.parquet"
    make_events.main(["dirichlet", str(path), "num_users=200"])
    config = load(DirichletConfig, ["num_users=200"])
    assert f"counts {best_recall(config, 10)['counts']:.4f}, shares" in capsys.readouterr().out
    assert prepare(PrepareConfig(), path, tmp_path / "data")["users"] == 200
    with pytest.raises(ValueError, match="already there; remove it, or give another file"):
        make_events.main(["counting", str(path)])
    with pytest.raises(ValueError, match=r"give catalogue or dirichlet or counting, OUT.parquet"):
        make_events.main(["poisson", str(path)])


@pytest.mark.parametrize("times", [2, 7])
@pytest.mark.parametrize("length", [1, 5, 63])
def test_repeating_a_history_leaves_softmax_attention_and_multiplies_silu_attention(
    times: int, length: int
) -> None:
    """At the last event, without biases: softmax(h h ... h) = softmax(h), silu(h h ... h) = times * silu(h).

    scale must not depend on the history: the n of silu(Q K^T) / n is max_history_len.
    """
    torch.manual_seed(3)
    q, k, v = (torch.randn(length, 2, 4, dtype=torch.float64) for _ in range(3))
    for kind, factor in (("softmax", 1), ("silu", times)):
        once = jagged_attention(q, k, v, torch.tensor([0, length]), kind=kind, scale=0.1)
        again = jagged_attention(
            *(x.repeat(times, 1, 1) for x in (q, k, v)),
            torch.tensor([0, times * length]),
            kind=kind,
            scale=0.1,
        )
        torch.testing.assert_close(again[-1], factor * once[-1], rtol=1e-12, atol=1e-13)


def test_the_norm_after_attention_takes_the_count_away_but_for_its_eps() -> None:
    """layer_norm(times * a) = layer_norm(a) where the variance of a is far above eps = 1e-5."""
    torch.manual_seed(4)
    history = torch.randn(6, 16, dtype=torch.float64)
    encoder = HSTUEncoder(
        EncoderConfig(dim=16, num_layers=1, use_position_bias=False, use_time_bias=False)
    )
    encoder = encoder.double().eval()
    (layer,) = encoder.layers

    def change(weight_scale: float) -> float:
        """How far the last query moves when the history is repeated four times."""
        torch.nn.init.normal_(layer.project.weight, std=weight_scale)
        once = encoder(history, torch.tensor([0, 6]))[-1]
        four = encoder(history.repeat(4, 1), torch.tensor([0, 24]))[-1]
        return float(((four - once).norm() / (once - history[-1]).norm()).detach())

    assert change(0.02) > 1.0
    assert change(2.0) < 1e-3

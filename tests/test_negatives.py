"""Negatives: how likely each item is, what logQ says of it, and that no array grows with the catalogue."""

import tracemalloc
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch

from hstu_rec import negatives as negatives_module
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.loss import LossConfig
from hstu_rec.negatives import NegativeSampler

COUNTS = np.array([3, 0, 16, 81, 3, 256, 0, 1, 3, 16])
DRAWN = ["uniform", "frequency", "log_uniform", "mixed"]


@dataclass
class Items:
    """A catalogue of known counts."""

    train_counts: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.train_counts)

    @cached_property
    def items_by_count(self) -> np.ndarray:
        return np.argsort(self.train_counts, kind="stable")


def batch_of(targets):
    ids = torch.as_tensor(targets, dtype=torch.int64)
    return SequenceBatch(ids, ids, ids, torch.tensor([0, len(ids)]), ids, len(ids))


def probabilities(kind, power):
    """float64 [N] by definition: one item after another."""
    num_items = len(COUNTS)
    uniform = np.full(num_items, 1 / num_items)
    frequency = np.where(COUNTS > 0, COUNTS.astype(float) ** power, 0)
    frequency /= frequency.sum()
    of_rank = np.log((np.arange(num_items) + 2) / (np.arange(num_items) + 1))
    of_rank /= np.log(num_items + 1)
    order = np.argsort(-COUNTS, kind="stable")
    zipf = np.empty(num_items)
    zipf[order] = of_rank
    shared = np.array([zipf[count == COUNTS].mean() for count in COUNTS])
    return {
        "uniform": uniform,
        "frequency": frequency,
        "mixed": (uniform + frequency) / 2,
        "log_uniform": shared,
        "in_batch": COUNTS / COUNTS.sum(),
    }[kind]


def sampler_of(kind, num_negatives=100_000, power=0.5, seed=3):
    config = LossConfig(
        negatives=kind, num_negatives=num_negatives, frequency_power=power, use_logq=True
    )
    return NegativeSampler(config, Items(COUNTS), seed)


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_items_are_drawn_as_often_as_their_probability_says(kind, power):
    expected = probabilities(kind, power)
    drawn = sampler_of(kind, power=power).draw(7, batch_of([0, 5]))
    times = torch.zeros(len(COUNTS), dtype=torch.float64)
    log_q = torch.from_numpy(expected[drawn.ids]).log()
    times[drawn.ids] = (drawn.log_weights.double() + log_q).exp()
    assert times.sum() == pytest.approx(100_000, rel=1e-4)
    # Five deviations of a share.
    deviation = np.sqrt(expected * (1 - expected) / 100_000)
    assert (np.abs(times.numpy() / 100_000 - expected) <= 5 * deviation + 1e-9).all()


@pytest.mark.parametrize("kind", [*DRAWN, "in_batch"])
@pytest.mark.filterwarnings("ignore:loss.negatives=in_batch")
def test_logq_is_the_log_of_the_probability_of_targets_and_candidates(kind):
    sampler = sampler_of(kind, num_negatives=50)
    batch = batch_of(range(len(COUNTS)))
    expected = np.log(np.maximum(probabilities(kind, 0.5), 1e-12))
    found = sampler.draw(0, batch)
    np.testing.assert_allclose(found.target_log_q.numpy(), expected, rtol=1e-6)
    times = (found.log_weights.double().numpy() + expected[found.ids.numpy()]).astype(float)
    times = np.exp(times)
    np.testing.assert_allclose(times, times.round(), atol=1e-4)
    assert times.sum() == pytest.approx(len(COUNTS) if kind == "in_batch" else 50, rel=1e-5)


@pytest.mark.parametrize("kind", DRAWN)
def test_negatives_are_a_function_of_seed_and_step(kind):
    def ids(seed, step):
        return sampler_of(kind, num_negatives=6, seed=seed).draw(step, batch_of([1])).ids.tolist()

    assert ids(3, 5) == ids(3, 5)
    assert any(ids(3, step) != ids(3, 5) for step in range(6, 10))
    assert any(ids(seed, 5) != ids(3, 5) for seed in range(4, 8))


def test_in_batch_negatives_alone_are_warned_of_with_the_reason():
    with pytest.warns(UserWarning, match="never pushed away.*use_logq=true"):
        sampler_of("in_batch")


@pytest.mark.parametrize("kind", ["frequency", "mixed"])
def test_frequencies_of_nothing_are_refused(kind):
    config = LossConfig(negatives=kind)
    sampler = NegativeSampler(config, Items(np.zeros(5, dtype=np.int64)), 1)
    with pytest.raises(ValueError, match="how often they occur in training, and none does"):
        sampler.draw(0, batch_of([1]))


@pytest.mark.parametrize("kind", DRAWN)
def test_memory_does_not_grow_with_the_catalogue(monkeypatch, kind):
    monkeypatch.setattr(negatives_module, "CHUNK_ITEMS", 2**14)
    items = Items(np.random.default_rng(0).geometric(0.1, 2_000_000))
    assert len(items.items_by_count) == items.num_items
    config = LossConfig(negatives=kind, num_negatives=1000, use_logq=True)
    tracemalloc.start()
    NegativeSampler(config, items, 1).draw(0, batch_of(range(500)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # bytes; a byte an item

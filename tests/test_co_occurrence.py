"""First rows from co-occurrence, against a dense float64 decomposition."""

import numpy as np

from hstu_rec.co_occurrence import CONTEXT_POWER, WINDOW, count_pairs, item_vectors
from hstu_rec.data.dataset import Dataset
from tests.datasets import write_dataset

NUM_ITEMS = 30


def make_data(path):
    """Users of a few events; items 27 to 29 occur with nothing."""
    random = np.random.default_rng(3)
    items = [(27 * random.random(n) ** 2).astype(int).tolist() for n in random.integers(3, 12, 50)]
    items += [[27, 27, 28, 29]]
    write_dataset(path, items, [list(range(len(one))) for one in items], num_items=NUM_ITEMS)
    return [one[:-2] for one in items]


def dense_information(sequences):
    """float64 [N, N]: positive pointwise mutual information, by its definition."""
    counts = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for items in sequences:
        for i, left in enumerate(items):
            for gap, right in enumerate(items[i + 1 : i + 1 + WINDOW], 1):
                if left != right:
                    counts[left, right] += 2.0 ** (1 - gap)
                    counts[right, left] += 2.0 ** (1 - gap)
    total = counts.sum(1)
    context = total**CONTEXT_POWER / (total**CONTEXT_POWER).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.log(counts / total[:, None] / context), neginf=0).clip(0)


def test_rows_are_the_best_of_their_width(tmp_path):
    left, values, _ = np.linalg.svd(dense_information(make_data(tmp_path / "data")))
    vectors = item_vectors(count_pairs(Dataset(tmp_path / "data")), 5, seed=1).numpy()
    # A decomposition is known up to signs, its Gram matrix is not.
    expected = (left[:, :5] * values[:5]) @ left[:, :5].T
    scale = np.sqrt(np.diag(expected).clip(0))
    expected /= scale[vectors.any(1)].mean() ** 2
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)


def test_items_without_company_are_zero_and_the_mean_norm_is_one(tmp_path):
    make_data(tmp_path / "data")
    # More dimensions than the catalogue has.
    vectors = item_vectors(count_pairs(Dataset(tmp_path / "data")), 40, seed=1).numpy()
    norms = np.linalg.norm(vectors, axis=1)
    assert vectors.shape == (NUM_ITEMS, 40) and not vectors[:, NUM_ITEMS:].any()
    np.testing.assert_array_equal(norms[27:], 0)
    np.testing.assert_allclose(norms[norms > 0].mean(), 1, rtol=1e-5)


def test_without_any_pair_all_rows_are_zero(tmp_path):
    write_dataset(tmp_path / "data", [[0, 1, 2], [1, 2, 0]], [[1, 2, 3], [1, 2, 3]], num_items=3)
    vectors = item_vectors(count_pairs(Dataset(tmp_path / "data")), 4, seed=1)
    assert vectors.shape == (3, 4) and not vectors.any()

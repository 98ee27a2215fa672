"""Exact ranking at 1 to 4 ranks: equal integers everywhere, equal to the slow formula; errors together."""

from itertools import product

import numpy as np
import pytest
import torch

from hstu_rec import distributed
from hstu_rec.baselines import baseline_metrics
from hstu_rec.data.dataset import Dataset
from hstu_rec.metrics import rank_metrics
from hstu_rec.portions import Portion
from hstu_rec.ranking import Queries, rank_targets
from hstu_rec.scores import ItemShard
from tests import oracles
from tests.datasets import write_dataset
from tests.ranks import run_ranks

KS = [1, 5, 20]
DIM = 19
CHUNKS = (1, 6, 1000)
SEEN_SCORES = (0.0, -0.7)
# name: (items, queries); with 5 items on 4 ranks the last rank owns no row.
SIZES = {
    "ordinary": (83, 17),
    "duplicates": (40, 13),
    "near ties": (61, 9),
    "all equal": (37, 6),
    "five users": (50, 5),
    "five items": (5, 11),
    "one item": (1, 3),
}


def make_case(name):
    """(items [N, DIM], query vectors [Q, DIM], target ids [Q], seen lists), the same on every rank."""
    num_items, num_queries = SIZES[name]
    random = np.random.default_rng(list(SIZES).index(name))
    items = random.standard_normal((num_items, DIM), dtype=np.float32)
    if name == "duplicates":
        items = items[random.integers(0, 6, num_items)]
    if name in ("near ties", "all equal"):
        items[:] = items[0]
    if name == "near ties":
        items *= 1 + np.float32(2.0**-23) * random.integers(-1, 2, items.shape).astype(np.float32)
    vectors = random.standard_normal((num_queries, DIM), dtype=np.float32)
    targets = random.integers(0, num_items, num_queries)
    seen = [random.integers(0, num_items, random.integers(0, 12)).tolist() for _ in targets]
    return items, vectors, targets, seen


def jagged(lists):
    flat = torch.tensor([item for items in lists for item in items], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(items) for items in lists)], dtype=torch.int64).cumsum(0)
    return flat, offsets


def my_part(case, bounds):
    """This rank's queries, bounds[r] .. bounds[r + 1], and its rows, in blocks as TorchRec cuts them."""
    items, vectors, targets, seen = case
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = slice(bounds[rank], bounds[rank + 1])
    block = -(-len(items) // world_size)
    first = min(rank * block, len(items))
    seen_ids, offsets = jagged(seen[mine])
    queries = Queries(
        torch.from_numpy(vectors[mine]),
        torch.from_numpy(items[targets[mine]]),
        torch.from_numpy(targets[mine]),
        seen_ids,
        offsets,
        offsets.diff() // 2,
    )
    return queries, ItemShard(torch.from_numpy(items[first : first + block]), first, len(items))


def query_bounds(num_queries):
    """Even, all on the first rank, all on the last rank."""
    world_size = distributed.world_size()
    even = np.linspace(0, num_queries, world_size + 1).astype(int).tolist()
    return even, [0, *[num_queries] * world_size], [*[0] * world_size, num_queries]


def chunk_of(num_items):
    return Portion("eval.chunk_items", num_items)


def error_of(queries, shard):
    try:
        rank_targets(queries, shard, chunk_of(6))
    except (FloatingPointError, ValueError) as error:
        return type(error).__name__
    return "none"


def errors_on_one_rank():
    """{what is wrong on the last rank alone: the error on this rank}"""
    found = {}
    bounds = query_bounds(SIZES["ordinary"][1])[0]
    is_last = distributed.rank() == distributed.world_size() - 1
    for fault in ("query", "target", "row", "target id", "seen id"):
        queries, shard = my_part(make_case("ordinary"), bounds)
        if is_last:
            if fault == "query":
                queries.vectors[0, 0] = torch.nan
            if fault == "target":
                queries.target_vectors[0, 0] = torch.inf
            if fault == "row":
                shard.rows[-1, -1] = torch.nan
            if fault == "target id":
                queries.target_ids[0] = shard.num_items
            if fault == "seen id":
                queries.seen_ids[-1] = -1
        found[fault] = error_of(queries, shard)
    return found


def rank_everything(dataset_path):
    """Everything that one process of a group finds out, as plain values."""
    parts, metrics = {}, {}
    for name in SIZES:
        case = make_case(name)
        for way, bounds in enumerate(query_bounds(len(case[1]))):
            queries, shard = my_part(case, bounds)
            for chunk_items, seen_score in product(CHUNKS, SEEN_SCORES):
                allowed, masked = rank_targets(queries, shard, chunk_of(chunk_items), seen_score)
                assert allowed.dtype == masked.dtype == torch.int64
                parts[name, way, chunk_items, seen_score] = allowed.tolist(), masked.tolist()
            masked = torch.tensor(parts[name, way, 1000, 0.0][1], dtype=torch.int64)
            metrics[name, way] = rank_metrics(masked, KS)
    empty, shard = my_part(make_case("ordinary"), [0] * (distributed.world_size() + 1))
    return {
        "parts": parts,
        "metrics": metrics,
        "rows": [len(my_part(make_case(name), [0] * 9)[1].rows) for name in SIZES],
        "no queries": [ranks.tolist() for ranks in rank_targets(empty, shard, chunk_of(6))],
        "errors": errors_on_one_rank(),
        "baselines": baseline_metrics(Dataset(dataset_path), "test", KS, with_groups=True),
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 9, 6).tolist() for _ in range(5)]
    return write_dataset(tmp_path_factory.mktemp("five_users") / "data", sequences)


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def found(request, dataset):
    return run_ranks(request.param, rank_everything, dataset.path)


@pytest.mark.fault("R22")
def test_ranks_equal_the_slow_formula_for_any_ranks_shards_and_chunks(found):
    for name in SIZES:
        for seen_score in SEEN_SCORES:
            case = make_case(name)
            expected = oracles.ranks(*case, seen_score, [len(seen) // 2 for seen in case[3]])
            for way, chunk_items in product(range(3), CHUNKS):
                key = (name, way, chunk_items, seen_score)
                by_rank = [result["parts"][key] for result in found]
                for which in range(2):
                    together = [value for part in by_rank for value in part[which]]
                    assert together == expected[which], key


@pytest.mark.fault("R21")
def test_a_rank_without_rows_takes_part(found):
    rows = np.array([result["rows"] for result in found])
    assert rows.sum(0).tolist() == [num_items for num_items, _ in SIZES.values()]
    assert (rows == 0).any() == (len(found) > 1)


@pytest.mark.fault("R23")
def test_a_table_of_equal_rows_is_never_a_hit(found):
    for chunk_items in CHUNKS:
        by_rank = [result["parts"]["all equal", 0, chunk_items, 0.0][0] for result in found]
        assert [rank for part in by_rank for rank in part] == [36] * 6


@pytest.mark.fault("R22")
def test_metrics_are_equal_to_the_last_bit_on_all_ranks_and_for_any_division(found):
    for name in SIZES:
        masked = oracles.ranks(*make_case(name))[1]
        expected = rank_metrics(torch.tensor(masked), KS)
        assert expected == pytest.approx(oracles.metrics(masked, KS), rel=1e-12)
        for result in found:
            for way in range(3):
                assert result["metrics"][name, way] == expected


@pytest.mark.fault("R21")
def test_no_query_on_any_rank_is_no_hang(found):
    assert all(result["no queries"] == [[], []] for result in found)


def test_what_is_wrong_on_one_rank_raises_on_all(found):
    expected = {
        "query": "FloatingPointError",
        "target": "FloatingPointError",
        "row": "FloatingPointError",
        "target id": "ValueError",
        "seen id": "ValueError",
    }
    assert [result["errors"] for result in found] == [expected] * len(found)


@pytest.mark.fault("R21")
def test_baselines_of_five_users_do_not_depend_on_the_number_of_ranks(found, dataset):
    expected = baseline_metrics(dataset, "test", KS, with_groups=True)
    assert [result["baselines"] for result in found] == [expected] * len(found)

"""Exact ranks in one process: the definition, rounding, ties, bad values; metrics."""

import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_rec import distributed, evaluator, ranking
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import check_frequent, eval_batches
from hstu_rec.evaluator import EvalConfig
from hstu_rec.item_table import local_shards
from hstu_rec.learner import Learner
from hstu_rec.metrics import rank_metrics
from hstu_rec.portions import Portion
from hstu_rec.ranking import Queries, rank_targets
from hstu_rec.scores import ItemShard
from tests import oracles
from tests.datasets import write_dataset


def jagged(lists):
    flat = torch.tensor([item for items in lists for item in items], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(items) for items in lists)], dtype=torch.int64).cumsum(0)
    return flat, offsets


def make_queries(items, vectors, targets, seen=None, num_recent=None):
    targets = torch.as_tensor(targets, dtype=torch.int64)
    seen_ids, offsets = jagged(seen or [[]] * len(targets))
    recent = offsets.diff() if num_recent is None else torch.tensor(num_recent, dtype=torch.int64)
    return Queries(vectors, items[targets], targets, seen_ids, offsets, recent)


def chunk_of(num_items):
    return Portion("eval.chunk_items", num_items)


def ranks_of(items, vectors, targets, seen=None, chunk_items=7, seen_score=0.0, num_recent=None):
    queries = make_queries(items, vectors, targets, seen, num_recent)
    shard = ItemShard(items, 0, len(items))
    allowed, masked = rank_targets(queries, shard, chunk_of(chunk_items), seen_score)
    return allowed.tolist(), masked.tolist()


def oracle(items, vectors, targets, seen=None, seen_score=0.0, num_recent=None):
    seen = seen or [[]] * len(targets)
    bias = seen_score, num_recent
    return oracles.ranks(items.numpy(), vectors.numpy(), np.asarray(targets), seen, *bias)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_the_best_item_has_rank_0_and_the_worst_the_last():
    items = torch.tensor([[1.0], [4.0], [2.0], [3.0]])
    assert ranks_of(items, torch.ones(4, 1), [0, 1, 2, 3])[0] == [3, 0, 2, 1]


@pytest.mark.fault("R23")
def test_ties_are_never_hits():
    items = torch.tensor([[1.0], [2.0], [2.0], [2.0]])
    assert ranks_of(items, torch.ones(4, 1), [0, 1, 2, 3])[0] == [3, 2, 2, 2]


@pytest.mark.fault("R23")
@pytest.mark.parametrize("dim", [1, 5, 64])
@pytest.mark.parametrize("chunk_items", [1, 8, 1000])
def test_a_table_of_equal_rows_ranks_every_target_last(dim, chunk_items):
    items = normal(1, dim).expand(60, dim).contiguous()
    allowed, masked = ranks_of(
        items, normal(9, dim, seed=1), range(9), [[0, 1, 2]] * 9, chunk_items
    )
    assert allowed == [59] * 9
    assert masked == [57] * 3 + [56] * 6


def test_the_target_is_never_masked_and_repeats_of_a_seen_item_count_once():
    items = torch.tensor([[5.0], [4.0], [3.0], [2.0]])
    seen = [[1, 1, 1, 2], [2, 2], [3, 3], []]
    assert ranks_of(items, torch.ones(4, 1), [2, 2, 2, 2], seen) == ([2, 2, 2, 2], [1, 2, 2, 2])


@pytest.mark.parametrize("chunk_items", [1, 13, 500])
@pytest.mark.parametrize("max_numbers", [1, 2**20])
def test_scores_within_rounding_are_decided_exactly(monkeypatch, chunk_items, max_numbers):
    monkeypatch.setattr(ranking, "MAX_EXACT_NUMBERS", {"cpu": max_numbers})
    monkeypatch.setattr(ranking, "TILE", {"cpu": (4, 24)})
    dim, num_items = 33, 120
    items = normal(1, dim).repeat(num_items, 1)
    place = torch.arange(num_items)
    items[place, place % dim] *= 1 + 2.0**-23 * (place % 3 - 1)
    vectors = normal(6, dim, seed=1)
    targets = [0, 1, 2, 60, 61, 119]
    seen = [list(range(0, 120, step)) for step in (1, 2, 3, 5, 7, 11)]
    coarse = vectors @ items.T
    float32_ranks = (coarse >= coarse[range(6), targets][:, None]).sum(1) - 1
    expected = oracle(items, vectors, targets, seen)
    assert float32_ranks.tolist() != expected[0], "float32 alone should get this wrong"
    assert ranks_of(items, vectors, targets, seen, chunk_items) == expected


@pytest.mark.parametrize(
    ("query_scale", "item_scale"), [(1e20, 1e20), (1e-20, 1e-22), (1e30, 1e-30)]
)
def test_products_that_overflow_or_vanish_in_float32_are_ranked_exactly(query_scale, item_scale):
    items, vectors = normal(50, 8, scale=item_scale), normal(10, 8, seed=1, scale=query_scale)
    assert ranks_of(items, vectors, range(10)) == oracle(items, vectors, range(10))


def test_a_float32_sum_that_overflows_on_its_way_to_a_small_score_is_not_a_hit():
    items = torch.tensor([[1.0, 0, 0, 0], [3e38, 3e38, -3e38, -3e38], [-3e38, -3e38, 3e38, 3e38]])
    assert ranks_of(items, torch.ones(1, 4), [0])[0] == [0]


@pytest.mark.fault("R22")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_equal_the_slow_formula(data):
    num_items = data.draw(st.integers(1, 25), "items")
    num_queries = data.draw(st.integers(1, 6), "queries")
    dim = data.draw(st.sampled_from([1, 2, 3, 7, 16]), "dim")
    # Few distinct values make ties and near-ties; the rest is any float32.
    number = st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 1.0 + 2.0**-23, 0.1]),
        st.floats(-(2.0**63), 2.0**63, width=32),
    )

    def rows(count):
        size = count * dim
        return torch.tensor(data.draw(st.lists(number, min_size=size, max_size=size))).view(-1, dim)

    items, vectors = rows(num_items), rows(num_queries)
    item = st.integers(0, num_items - 1)
    targets = data.draw(st.lists(item, min_size=num_queries, max_size=num_queries))
    seen = [data.draw(st.lists(item, max_size=8)) for _ in targets]
    chunk_items = data.draw(st.integers(1, 30))
    seen_score = data.draw(st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-50, 50)))
    recent = [data.draw(st.integers(0, len(history))) for history in seen]
    assert ranks_of(items, vectors, targets, seen, chunk_items, seen_score, recent) == oracle(
        items, vectors, targets, seen, seen_score, recent
    )


def test_neither_tf32_nor_autocast_changes_a_rank():
    items, vectors = normal(3000, 32), normal(20, 32, seed=1)
    expected = ranks_of(items, vectors, range(20), chunk_items=1000)
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ranks_of(items, vectors, range(20), chunk_items=1000) == expected
        assert products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["vectors", "target_vectors", "shard"])
def test_values_that_are_not_finite_are_an_error(bad, where):
    items, vectors = normal(20, 4), normal(3, 4, seed=1)
    queries = make_queries(items, vectors, [0, 1, 2])
    shard = ItemShard(items.clone(), 0, 20)
    (shard.rows if where == "shard" else getattr(queries, where))[-1, 2] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        rank_targets(queries, shard, chunk_of(7))


@pytest.mark.parametrize("bad", [-1, 20, 2**40])
@pytest.mark.parametrize("is_target", [True, False])
def test_ids_outside_the_catalogue_are_an_error_that_names_them(bad, is_target):
    items, ids = normal(20, 4), torch.tensor([bad if is_target else 3])
    seen, offsets = jagged([[1, 2 if is_target else bad]])
    queries = Queries(items[:1], items[:1], ids, seen, offsets, offsets.diff())
    with pytest.raises(ValueError, match=rf"outside the catalogue 0\.\.19.*\[{bad}\]"):
        rank_targets(queries, ItemShard(items, 0, 20), chunk_of(7))


def test_the_seen_score_is_added_to_seen_items_and_to_a_seen_target():
    items = torch.tensor([[5.0], [4.0], [3.0], [2.0]])
    seen = [[0, 1], [0, 2], [3, 3]]
    queries = [2, 2, 2]
    assert ranks_of(items, torch.ones(3, 1), queries, seen) == ([2, 2, 2], [0, 1, 2])
    # 5 and 4 fall below 3; 5 falls below 4 as the target falls to 1; 2 rises past 3.
    assert ranks_of(items, torch.ones(3, 1), queries, seen, seen_score=-3.0) == (
        [0, 3, 2],
        [0, 2, 2],
    )
    assert ranks_of(items, torch.ones(3, 1), queries, seen, seen_score=1.5)[0] == [2, 1, 3]


def test_a_seen_score_that_is_not_finite_is_an_error():
    items = normal(20, 4)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        ranks_of(items, items[:2], [0, 1], seen_score=float("nan"))


@pytest.mark.fault("R21")
def test_no_query_and_no_row_give_no_rank_and_no_count():
    items = normal(20, 4)
    assert ranks_of(items, torch.zeros(0, 4), []) == ([], [])
    queries = make_queries(items, normal(2, 4, seed=1), [4, 5], [[1], [2]])
    allowed, masked = rank_targets(queries, ItemShard(items[:0], 20, 20), chunk_of(7))
    assert allowed.tolist() == masked.tolist() == [0, 0]


def evaluated(folder, settings):
    """(what evaluate finds of a model with a seen bias of -1.7, slow ranks allowed and masked, sequences)."""
    random = np.random.default_rng(4)
    lengths = random.integers(3, 15, 30)
    sequences = [(20 * random.random(n) ** 3).astype(int).tolist() for n in lengths]
    dataset = write_dataset(folder / "data", sequences, num_items=20)
    small = ["encoder.dim=8", "encoder.max_history_len=4", "loss.use_seen_bias=true"]
    settings = [*settings, f"data.path={folder / 'data'}", "loss.temperature=0.3"]
    config = load(RunConfig, [*small, *settings, "table.init_std=1"])
    with distributed.process_group("cpu") as device:
        learner = Learner(config, dataset, device)
        with torch.no_grad():
            learner.loss.seen_weight.fill_(-1.7)
        found = evaluator.evaluate(learner.model, dataset, "test", config.eval, device)
        batch = next(eval_batches(dataset, "test", 4, 1000))
        with torch.no_grad():
            queries, _ = learner.model.eval()(batch.history)
        ((rows, _),) = local_shards(learner.model)
        items = torch.nn.functional.normalize(rows).numpy()
    histories = [sequence[:-1] for sequence in sequences]
    allowed, masked = oracles.ranks(
        items,
        queries.numpy(),
        batch.history.target_ids.numpy(),
        histories,
        0.3 * 10 * np.tanh(-1.7 / 10),
        [min(len(history), 4) for history in histories],
    )
    return found, allowed, masked, sequences


@pytest.mark.fault("R23")
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_model_of_equal_rows_has_a_recall_of_0(tmp_path, similarity):
    sequences = [[item, item + 1, item + 2, item + 3] for item in range(30)]
    dataset = write_dataset(tmp_path / "data", sequences, num_items=33)
    settings = [f"data.path={tmp_path / 'data'}", f"loss.similarity={similarity}"]
    config = load(RunConfig, ["encoder.dim=8", "eval.ks=[1,10,28]", *settings])
    with distributed.process_group("cpu") as device:
        learner = Learner(config, dataset, device)
        ((rows, _),) = local_shards(learner.model)
        rows.copy_(torch.randn(8).expand_as(rows))
        found = evaluator.evaluate(learner.model, dataset, "test", config.eval, device)
    # Masked, three of the 33 items are no candidates: the rank is 29.
    for part, rank in (("seen_masked", 29), ("seen_allowed", 32)):
        assert found[part] == pytest.approx(oracles.metrics([rank], config.eval.ks))
        assert found[part]["recall@10"] == found[part]["recall@28"] == 0


def test_what_is_called_after_a_batch_may_end_the_evaluation(tmp_path):
    dataset = write_dataset(tmp_path / "data", [[0, 1, 2, 3]] * 5)
    config = load(RunConfig, [f"data.path={tmp_path / 'data'}", "eval.batch_users=2"])
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with distributed.process_group("cpu") as device:
        learner = Learner(config, dataset, device)
        learner.model.train()
        with pytest.raises(KeyboardInterrupt):
            evaluator.evaluate(learner.model, dataset, "test", config.eval, device, stop)
        assert learner.model.training and len(calls) == 2
        evaluator.evaluate(
            learner.model, dataset, "test", config.eval, device, lambda: calls.append(1)
        )
    assert len(calls) == 2 + 3


def test_a_long_ranking_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    dataset = write_dataset(tmp_path / "data", [[0, 1, 2, 3]] * 7)
    config = load(RunConfig, [f"data.path={tmp_path / 'data'}", "eval.batch_users=2"])
    with distributed.process_group("cpu") as device:
        learner = Learner(config, dataset, device)
        evaluator.evaluate(learner.model, dataset, "valid", config.eval, device)
        assert "ranking" not in capsys.readouterr().err
        monkeypatch.setattr(evaluator, "BAR_AFTER_S", 0.05)
        evaluator.evaluate(
            learner.model, dataset, "valid", config.eval, device, lambda: time.sleep(0.04)
        )
    assert "ranking, valid: 100%" in capsys.readouterr().err


def test_the_learned_seen_bias_is_added_to_what_the_encoder_is_given_of_the_history(tmp_path):
    found, allowed, masked, sequences = evaluated(tmp_path, [])
    for part, ranks in (("seen_allowed", allowed), ("seen_masked", masked)):
        assert found[part] == pytest.approx(oracles.metrics(ranks, EvalConfig().ks), rel=1e-12)
    assert found["seen_allowed"] != found["seen_masked"]
    is_repeated = [sequence[-1] in sequence[:-1] for sequence in sequences]
    assert 0 < found["num_repeated_targets"] == sum(is_repeated) < found["num_users"] == 30
    assert "frequent" not in found


def test_figures_over_frequent_targets_leave_the_others_out(tmp_path):
    found, allowed, masked, sequences = evaluated(tmp_path, ["eval.min_train_count=10"])
    trained = [item for sequence in sequences for item in sequence[:-2]]
    is_frequent = [trained.count(sequence[-1]) >= 10 for sequence in sequences]
    assert 5 < found["frequent"]["num_users"] == sum(is_frequent) < 25
    for part, ranks in (("seen_allowed", allowed), ("seen_masked", masked)):
        chosen = [rank for rank, is_in in zip(ranks, is_frequent, strict=True) if is_in]
        expected = oracles.metrics(chosen, EvalConfig().ks)
        assert found["frequent"][part] == pytest.approx(expected, rel=1e-12)
        assert found[part] == pytest.approx(oracles.metrics(ranks, EvalConfig().ks), rel=1e-12)


def test_a_count_that_no_target_reaches_is_refused(tmp_path):
    path = tmp_path / "data"
    write_dataset(path, [[0, 0, 0, 1, 0], [1, 2, 3, 1, 1]], num_items=4)
    check_frequent(Dataset(path), 1)
    with pytest.raises(ValueError, match=r"=2: no valid target .*, the most frequent 1 times"):
        check_frequent(Dataset(path), 2)


def test_metrics_of_known_ranks_are_these_fractions():
    result = rank_metrics(torch.tensor([0, 1, 5, 2, 100]), [3, 1, 6])
    assert result == {
        "recall@1": 1 / 5,
        "ndcg@1": 1 / 5,
        "recall@3": 3 / 5,
        "ndcg@3": pytest.approx((1 + 1 / np.log2(3) + 1 / 2) / 5, rel=1e-15),
        "recall@6": 4 / 5,
        "ndcg@6": pytest.approx((1 + 1 / np.log2(3) + 1 / 2 + 1 / np.log2(7)) / 5, rel=1e-15),
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 3 + 1 / 101) / 5, rel=1e-15),
    }


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200), st.randoms())
def test_metrics_equal_the_written_out_formulas_and_do_not_depend_on_order(ranks, random):
    result = rank_metrics(torch.tensor(ranks), [1, 10, 50])
    assert result == pytest.approx(oracles.metrics(ranks, [1, 10, 50]), rel=1e-12)
    random.shuffle(ranks)
    assert rank_metrics(torch.tensor(ranks), [1, 10, 50]) == result


def test_metrics_of_no_query_are_an_error():
    with pytest.raises(ValueError, match="no query"):
        rank_metrics(torch.zeros(0, dtype=torch.int64), [10])


def test_eval_settings_load_and_all_their_problems_are_told_at_once():
    assert load(EvalConfig, ["ks=[2,7]", "batch_users=3"]) == EvalConfig(ks=[2, 7], batch_users=3)
    problems = EvalConfig(ks=[5, 5], batch_users=0, chunk_items=-1).problems()
    assert [problem.split()[0] for problem in problems] == ["batch_users", "chunk_items", "ks"]
    assert "min_train_count" in EvalConfig(min_train_count=-1).problems()[0]
    assert EvalConfig(ks=[]).problems() and EvalConfig(ks=[0, 1]).problems()
    assert not EvalConfig().problems()


def group_of(value, least):
    return [place for place, begin in enumerate(least) if value >= begin][-1]


def test_figures_by_length_and_by_frequency_equal_those_of_each_group_alone(tmp_path):
    found, allowed, masked, sequences = evaluated(tmp_path, [])
    trained = Counter(item for sequence in sequences for item in sequence[:-2])
    values = {
        "history_length": [len(sequence) - 1 for sequence in sequences],
        "target_train_count": [trained[sequence[-1]] for sequence in sequences],
    }
    spans = {"history_length": (1, 6, 11, 21, 51), "target_train_count": (0, 1, 5, 20, 100, 1000)}
    names = {
        "history_length": ["1-5", "6-10", "11-20", "21-50", "51+"],
        "target_train_count": ["0", "1-4", "5-19", "20-99", "100-999", "1000+"],
    }
    assert found["groups"].keys() == values.keys()
    for grouping, of_users in values.items():
        assert [*found["groups"][grouping]] == names[grouping]
        num_filled = 0
        for place, group in enumerate(found["groups"][grouping].values()):
            here = [u for u, v in enumerate(of_users) if group_of(v, spans[grouping]) == place]
            assert group.pop("num_users") == len(here)
            num_filled += bool(here)
            for part, ranks in (("seen_masked", masked), ("seen_allowed", allowed)):
                if here:
                    expected = oracles.metrics([ranks[user] for user in here], [10])
                    del expected["mrr"]
                    assert group.pop(part) == pytest.approx(expected, rel=1e-12)
            assert not group
        assert num_filled > 1


def test_without_groups_and_in_validation_there_are_none(tmp_path):
    assert "groups" not in evaluated(tmp_path, ["eval.with_groups=false"])[0]
    with distributed.process_group("cpu") as device:
        dataset = Dataset(tmp_path / "data")
        learner = Learner(load(RunConfig, ["encoder.dim=8"]), dataset, device)
        assert "groups" not in evaluator.evaluate(
            learner.model, dataset, "valid", EvalConfig(), device
        )

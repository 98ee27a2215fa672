"""Lists of test users over sharded tables, by 1 to 3 processes: the slow formula; coverage and novelty."""

import math

import numpy as np
import pytest
import torch

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.stream import eval_batches
from hstu_rec.hosts import RankError
from hstu_rec.item_table import local_shards
from hstu_rec.learner import Learner
from hstu_rec.top_lists import TopLists, beyond_accuracy, examples, top_lists
from tests.datasets import write_dataset
from tests.ranks import run_ranks

NUM_ITEMS = 37
SETTINGS = ["encoder.dim=8", "encoder.max_history_len=5", "eval.batch_users=4", "table.init_std=1"]
NUM_LISTED = (1000, 7, 1)


def list_items(path, device="cpu"):
    """(lists by the number of users asked for, lists of a table of equal rows, the table, the query of each
    test user, what is said of a row that is not finite)."""
    dataset = Dataset(path)
    with distributed.process_group(device) as device:
        config = load(RunConfig, [*SETTINGS, f"data.path={path}"])
        learner = Learner(config, dataset, device)
        shards = local_shards(learner.model)
        lists = {}
        for count in NUM_LISTED:
            settings = load(RunConfig, [*SETTINGS, f"eval.num_listed_users={count}"]).eval
            found = top_lists(learner.model, dataset, settings, device)
            lists[count] = found.users.tolist(), found.items.tolist()
        assert learner.model.training
        (batch,) = eval_batches(dataset, "test", 5, 1000)
        with torch.no_grad():
            vectors, _ = learner.model.eval()(batch.history.to(device))
        table = [rows for rows, _ in shards] or [torch.zeros(0, 8)]
        both = table[0].clone(), vectors
        table, vectors = map(distributed.all_gather_rows, both)
        for rows, _ in shards:
            rows.fill_(1.0)
        equal = top_lists(learner.model, dataset, config.eval, device)
        if distributed.rank() == distributed.world_size() - 1:
            shards[0][0][-1, 0] = torch.nan
        with pytest.raises(RankError) as caught:
            top_lists(learner.model, dataset, config.eval, device)
        equal = equal.users.tolist(), equal.items.tolist()
        return lists, equal, table.cpu().numpy(), vectors.cpu().numpy(), str(caught.value)


def slow_lists(table, vectors, histories):
    """Ten best items, seen ones left out, of equal scores the lower first."""
    items = table / np.linalg.norm(table, axis=1, keepdims=True)
    found = []
    for vector, history in zip(vectors.astype(float), histories, strict=True):
        scores = items.astype(float) @ vector
        order = sorted(set(range(len(items))) - set(history), key=lambda i: (-scores[i], i))[:10]
        found.append(order + [-1] * (10 - len(order)))
    return found


@pytest.fixture(scope="module")
def sequences():
    random = np.random.default_rng(3)
    found = [random.integers(0, NUM_ITEMS, n).tolist() for n in random.integers(2, 12, 26)]
    # One who has seen all but four, and one who has seen all.
    return [*found, [*range(NUM_ITEMS - 4)], [*range(NUM_ITEMS), 0]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, sequences):
    return write_dataset(tmp_path_factory.mktemp("lists") / "data", sequences, num_items=NUM_ITEMS)


@pytest.fixture(scope="module", params=[1, 3])
def by_rank(request, dataset):
    if request.param == 1:
        return [list_items(dataset.path, "auto")]  # of a GPU where there is one
    return run_ranks(request.param, list_items, dataset.path)


def test_lists_equal_the_slow_formula_on_every_rank(by_rank, sequences):
    users = [user for user, one in enumerate(sequences) if len(one) >= 3]
    _, _, table, vectors, _ = by_rank[0]
    expected = slow_lists(table, vectors, [sequences[user][:-1] for user in users])
    for found, *_, error in by_rank:
        assert found[1000] == (users, expected)
        chosen = [place * len(users) // 7 for place in range(7)]
        assert found[7] == ([users[at] for at in chosen], [expected[at] for at in chosen])
        assert found[1] == ([users[0]], [expected[0]])
        assert "NaN" in error
    assert expected[-1] == [-1] * 10 and expected[-2][5:] == [-1] * 5
    assert len({item for one in expected for item in one}) > 20


def test_of_equal_scores_the_lower_item_comes_first_whoever_holds_it(by_rank, sequences):
    users = [user for user, one in enumerate(sequences) if len(one) >= 3]
    lists = by_rank[-1][1]
    for user, found in zip(*lists, strict=True):
        rest = sorted(set(range(NUM_ITEMS)) - set(sequences[user][:-1]))[:10]
        assert [item for item in found if item >= 0] == rest
    assert lists[0] == users


def test_coverage_and_novelty_are_their_definitions(dataset, sequences):
    trained = [item for one in sequences for item in (one[:-2] if len(one) >= 3 else one)]
    users = np.array([user for user, one in enumerate(sequences) if len(one) >= 3])[[0, 3, 5]]
    lists = np.full((3, 10), -1)
    lists[0, :3], lists[1, :2] = [4, 5, 36], [5, 0]
    told = beyond_accuracy(TopLists(users, lists), dataset)

    def bits(item):
        return -math.log2(max(trained.count(item), 1) / len(trained))

    # The third user, to whom nothing is recommended, has no novelty.
    mean = ((bits(4) + bits(5) + bits(36)) / 3 + (bits(5) + bits(0)) / 2) / 2
    assert told["novelty"] == pytest.approx(mean, rel=1e-12)
    targets = [sequences[user][-1] for user in users]
    assert told["target_novelty"] == pytest.approx(sum(map(bits, targets)) / 3, rel=1e-12)
    assert (told["num_items"], told["coverage"], told["num_users"]) == (4, 4 / NUM_ITEMS, 3)


def test_examples_show_the_newest_events_the_target_and_the_list_in_own_ids(tmp_path):
    names = [f"i{item:02d}" for item in range(9)]
    dataset = write_dataset(
        tmp_path / "data", [[0, 1, 2, 3, 4, 5, 6, 7], [3, 2, 1]], None, 9, names
    )
    lists = np.full((2, 10), -1)
    lists[0, :6], lists[1, :1] = [8, 7, 1, 2, 3, 4], [5]
    first, second = examples(TopLists(np.array([0, 1]), lists), dataset, 5)
    assert first["user"] == 0 and first["num_events"] == 7
    assert [item["item_id"] for item in first["history"]] == names[2:7]
    assert first["target"] == {"item_id": "i07"}
    assert [item["item_id"] for item in first["recommended"]] == ["i08", "i07", "i01", "i02", "i03"]
    assert [item["item_id"] for item in second["history"]] == ["i03", "i02"]
    assert (first["place"], first["is_repeat"]) == (2, False)
    assert (second["place"], second["is_repeat"]) == (None, False)
    assert second["recommended"] == [{"item_id": "i05"}]
    assert examples(TopLists(np.array([0, 1]), lists), dataset, 1) == [first]
    longer = write_dataset(tmp_path / "longer", [[1, 2, 3, 4, 5, 6, 7, 8, 1]], None, 9, names)
    lists[0] = [0, 2, 3, 4, 5, 6, 7, 8, 1, -1]  # beyond what is shown, in both
    (only,) = examples(TopLists(np.array([0]), lists), longer, 5)
    assert (only["place"], only["is_repeat"]) == (9, True)

"""Rows of other runs and of published figures in a run's own table."""

import json

import pytest

from hstu_rec.comparison import rows_beside
from tests.shared_models import train_run, write_data

FACTS = {"users": 5, "item_map_hash": "abc", "prepare_s": 1.0}
PUBLISHED = """
mine:
  - {model: A|B, recall@10: 0.1, ndcg@10: 0.05, seen_items: masked, query_time: false, source: a paper}
  - {model: A|B, recall@10: 0.2, seen_items: allowed, query_time: false, source: a paper}
  - {model: C, recall@10: 0.3, seen_items: masked, query_time: true, source: another}
"""


def write_run(folder, **changes):
    folder.mkdir()
    protocol = {"use_query_time": False, "data": {**FACTS, "prepare_s": 7.0, **changes}}
    result = {"protocol": protocol, "test": {"seen_masked": {"recall@10": 0.4}}}
    (folder / "result.json").write_text(json.dumps(result))


def test_published_figures_of_the_data_and_protocol_are_rows(tmp_path):
    (tmp_path / "p.yaml").write_text(PUBLISHED)
    rows = rows_beside([str(tmp_path / "p.yaml")], "data/mine", FACTS, False)
    both = {"seen_masked": {"recall@10": 0.1, "ndcg@10": 0.05}, "seen_allowed": {"recall@10": 0.2}}
    assert rows == {"A/B (a paper)": both}
    other = rows_beside([str(tmp_path / "p.yaml")], "data/mine", FACTS, True)
    assert other == {"C (another)": {"seen_masked": {"recall@10": 0.3}}}


def test_a_run_of_the_same_data_is_a_row_and_another_is_refused(tmp_path):
    write_run(tmp_path / "former")
    rows = rows_beside([str(tmp_path / "former")], "data/mine", FACTS, False)
    assert rows == {"run former": {"seen_masked": {"recall@10": 0.4}}}
    write_run(tmp_path / "other", item_map_hash="x")
    with pytest.raises(ValueError, match=r"other was measured with other data \(item_map_hash\)"):
        rows_beside([str(tmp_path / "other")], "data/mine", FACTS, False)
    with pytest.raises(ValueError, match="former was measured with another use of the query time"):
        rows_beside([str(tmp_path / "former")], "data/mine", FACTS, True)
    with pytest.raises(ValueError, match="former twice"):
        rows_beside([str(tmp_path / "former")] * 2, "data/mine", FACTS, False)


def test_what_gives_no_row_is_told(tmp_path):
    (tmp_path / "p.yaml").write_text(PUBLISHED)
    with pytest.raises(ValueError, match=r"no figure of a data set 'beauty' with query time not"):
        rows_beside([str(tmp_path / "p.yaml")], "data/beauty", FACTS, False)
    with pytest.raises(FileNotFoundError, match=r"eval.compare_with '.*none.yaml' does not exist"):
        rows_beside([str(tmp_path / "none.yaml")], "data/mine", FACTS, False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no result.json"):
        rows_beside([str(tmp_path / "empty")], "data/mine", FACTS, False)


def test_a_run_has_the_rows_in_its_report(tmp_path):
    write_data(tmp_path / "mine", num_users=60, num_items=30)
    (tmp_path / "p.yaml").write_text(PUBLISHED)
    train_run(tmp_path / "mine", tmp_path / "first", "train.max_epochs=1")
    beside = f"eval.compare_with=[{tmp_path / 'p.yaml'},{tmp_path / 'first'}]"
    train_run(tmp_path / "mine", tmp_path / "second", "train.max_epochs=1", beside)
    page = (tmp_path / "second" / "report.md").read_text()
    assert "| A/B (a paper) | masked     |    0.1000 |" in page
    first, second = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second")
    )
    assert second["further"]["run first"] == first["test"]

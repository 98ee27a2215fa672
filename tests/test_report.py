"""What a finished run leaves: the exact JSON, a page to read, a picture, a table to print."""

import copy
import json
import re
import struct

import numpy as np
import pytest

from hstu_rec import drawing
from hstu_rec.report import (
    FIRST_METRICS,
    GROUPS,
    metric_table,
    plain,
    protocol_line,
    write_report,
)
from hstu_rec.tracking import Tracker, read_metrics
from tests.results import PROTOCOL

DATA = {
    **{"users": 22363, "length": {"median": 6}},
    **{"tie_last_two_share": 0.25, "first_timestamp": 1_300_000_000},
}
CONFIG = "data:\n  path: data/demo\n"


def metrics(first):
    return {name: first + index / 1000 for index, name in enumerate(FIRST_METRICS)}


@pytest.fixture
def result():
    return {
        "protocol": {**PROTOCOL, "data": DATA},
        "test": {"seen_masked": metrics(0.11), "seen_allowed": metrics(0.21)},
        "valid": {"seen_masked": metrics(0.31), "seen_allowed": metrics(0.41)},
        "baselines": {
            "popularity": {"seen_masked": metrics(0.51), "seen_allowed": metrics(0.61)},
            "co_occurrence": {"seen_masked": metrics(0.71), "seen_allowed": metrics(0.81)},
        },
        "timing": {"prepare_s": None, "train_s": 512.4, "events_per_s": 41233.0},
        "versions": {"torch": "2.13.0"},
    }


def track(folder):
    with Tracker(folder, is_main=True) as tracker:
        for step in range(60):
            tracker.log("train", step, {"loss": 9.0 - step / 10})
        for epoch, value in enumerate((0.01, 0.03, 0.02), start=1):
            tracker.log("valid", 20 * epoch, {"epoch": epoch, "seen_allowed/ndcg@10": value})


def test_result_json_is_the_result(tmp_path, result):
    write_report(tmp_path, result, CONFIG)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "report.md",
        "result.json",
    ]


def test_the_page_shows_metrics_baselines_statistics_and_configuration(tmp_path, result):
    write_report(tmp_path, result, CONFIG)
    page = (tmp_path / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["model", "masked", "0.1100", "0.1110", "0.1120", "0.1130", "0.1140"] in rows
    assert ["co-occurrence", "allowed", "0.8100", "0.8110", "0.8120", "0.8130", "0.8140"] in rows
    assert ["allowed", "0.4100", "0.4110", "0.4120", "0.4130", "0.4140"] in rows
    assert ["users", "22,363"] in rows and ["length.median", "6"] in rows
    assert ["share of users whose last two events have one time", "0.2500"] in rows
    assert ["first event", "2011-03-13 07:06:40 UTC"] in rows and "last_two" not in page
    assert ["training", "8 min 32 s"] in rows and ["torch", "2.13.0"] in rows
    assert "(curves.png)" in page and f"```yaml\n{CONFIG}```" in page


def test_a_configuration_with_backticks_cannot_end_its_fence(tmp_path, result):
    write_report(tmp_path, result, "name: '```'\n")
    assert "````yaml\nname: '```'\n````" in (tmp_path / "report.md").read_text()


def test_the_table_has_a_row_for_each_method_and_treatment_of_seen_items(result):
    protocol, _, header, _, *rows = metric_table(result).splitlines()
    assert header.split() == ["method", "seen", "items", *FIRST_METRICS]
    assert [row.split()[:2] for row in rows] == [
        [method, seen]
        for method in ("model", "popularity", "co-occurrence")
        for seen in ("masked", "allowed")
    ]
    assert [float(cell) for cell in rows[1].split()[2:]] == list(
        result["test"]["seen_allowed"].values()
    )
    assert len({len(row) for row in [header, *rows]}) == 1
    for part in ("22,363 users", "12,101 items", "query time not used", "50 events", "ndcg@10"):
        assert part in protocol


def test_the_table_says_when_the_query_time_is_used(result):
    result["protocol"]["use_query_time"] = True
    result["protocol"]["test_history_includes_valid"] = False
    line = metric_table(result).splitlines()[0]
    assert "query time used" in line and "excludes the validation item" in line


def test_further_rows_may_have_gaps_and_come_after_the_model(result):
    result["further"] = {"best possible": {"seen_allowed": {"recall@10": 0.9}}}
    result["protocol"] |= {"min_train_count": 20, "num_frequent_targets": 1234}
    first, _, _, _, _, _, row, popularity, *_ = metric_table(result).splitlines()
    assert row.split() == ["best", "possible", "allowed", "0.9000"]
    assert popularity.startswith("popularity")
    assert "20+ events: over the 1,234 users whose target occurs at least 20 times" in first


def test_metrics_at_other_cut_offs_get_their_own_column(result):
    result["test"]["seen_masked"]["recall@20"] = 0.5
    _, _, header, _, model, *_ = metric_table(result).splitlines()
    assert header.endswith("recall@20") and model.endswith("0.5000")


def test_all_that_is_missing_is_told_at_once_and_nothing_is_written(tmp_path, result):
    broken = copy.deepcopy(result)
    del broken["timing"], broken["protocol"]["num_users"], broken["test"]["seen_masked"]["mrr"]
    broken["extra"] = 1
    with pytest.raises(ValueError) as failure:
        write_report(tmp_path, broken, CONFIG)
    for name in ("timing", "protocol.num_users", "test.seen_masked.mrr", "extra"):
        assert name in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_is_not_a_number_is_refused(tmp_path, result):
    result["test"]["seen_masked"]["mrr"] = float("nan")
    with pytest.raises(ValueError, match=r"JSON"):
        write_report(tmp_path, result, CONFIG)


def test_the_curves_differ_with_the_metrics_and_are_a_wide_picture(tmp_path, result):
    write_report(tmp_path, result, CONFIG)
    empty = (tmp_path / "curves.png").read_bytes()
    track(tmp_path)
    write_report(tmp_path, result, CONFIG)
    drawn = (tmp_path / "curves.png").read_bytes()
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n" and drawn != empty
    width, height = struct.unpack(">II", drawn[16:24])
    assert width > 2 * height > 1000


def test_the_best_epoch_is_marked_in_the_curves(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    drawing._draw_metric(axes, [(1, 0.01), (2, 0.03), (3, 0.02)])
    assert "best 0.0300" in axes.texts[0].get_text()
    assert np.array_equal(axes.lines[1].get_xdata(), [2])


def test_a_selection_metric_that_was_never_logged_is_named(tmp_path, result):
    track(tmp_path)
    assert read_metrics(tmp_path)
    result["protocol"]["selection_metric"] = "ndcg@11"
    with pytest.raises(ValueError, match=r"ndcg@11.*seen_allowed/ndcg@10"):
        write_report(tmp_path, result, CONFIG)


def test_any_cut_offs_may_be_chosen(tmp_path, result):
    parts = [result["test"], result["valid"], *result["baselines"].values()]
    for values in (values for part in parts for values in part.values()):
        for name in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
            del values[name]
        values |= {"recall@7": 0.5, "ndcg@7": 0.25}
    track(tmp_path)
    write_report(tmp_path, result, CONFIG)
    header = metric_table(result).splitlines()[2]
    assert header.split() == ["method", "seen", "items", "mrr", "recall@7", "ndcg@7"]


def test_repeated_targets_are_told_where_masking_makes_them_easy() -> None:
    assert "repeats" not in protocol_line({**PROTOCOL, "num_repeated_targets": 0})
    line = protocol_line({**PROTOCOL, "num_users": 8, "num_repeated_targets": 3})
    assert " 37.5% of the targets are repeats: targets are never masked" in line


def group(num_users, first):
    figures = {"recall@10": first, "ndcg@10": first / 2}
    return {"num_users": num_users, "seen_masked": figures, "seen_allowed": figures}


def test_groups_are_a_table_each_and_a_picture(tmp_path, result):
    def of_method(first):
        lengths = {"1-5": group(1234, first), "6-10": {"num_users": 0}}
        return {"history_length": lengths, "target_train_count": {"0": group(5, first)}}

    result["groups"] = {"model": of_method(0.5), "own_history": of_method(0.25)}
    write_report(tmp_path, result, CONFIG)
    page = (tmp_path / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert rows.count(["1-5", "1,234", "0.5000", "0.2500", "0.2500", "0.1250"]) == 2
    assert not any(row[:1] == ["6-10"] for row in rows)  # of no users
    assert ["0", "5", "0.5000", "0.2500", "0.2500", "0.1250"] in rows
    assert "(groups.png)" in page and "own-history recall@10" in page
    drawn = (tmp_path / "groups.png").read_bytes()
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    result["groups"]["own_history"] = of_method(0.75)
    write_report(tmp_path, result, CONFIG)
    assert (tmp_path / "groups.png").read_bytes() != drawn


def test_the_titles_of_groups_fit_and_bars_of_few_users_are_pale(monkeypatch):
    monkeypatch.setattr(drawing, "png", lambda figure: figure)
    methods = ("model", "popularity", "own_history", "co_occurrence")
    bins = {"1-5": group(9, 0.5), "6-10": group(10, 0.5), "11-20": {"num_users": 0}}
    groups = {method: dict.fromkeys(GROUPS, bins) for method in methods}
    figure = drawing.draw_groups(groups, "recall@10", "seen_masked", GROUPS)
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "Recall@10, seen items masked"
    texts = figure.texts[0], figure.legends[0]  # of which the first is the title
    title, legend = (one.get_window_extent() for one in texts)
    assert not title.overlaps(legend) and figure.bbox.x0 <= title.x0
    ends = [*(axes.bbox.x0 for axes in figure.axes[1:]), figure.bbox.x1]
    for axes, grouping, end in zip(figure.axes, GROUPS.values(), ends, strict=True):
        assert axes.get_title("left") == grouping
        head = axes._left_title.get_window_extent()
        assert head.x1 < end and not head.overlaps(legend) and not head.overlaps(title)
        assert [bar.get_alpha() for bar in axes.patches] == [drawing.PALE, 1.0] * len(methods)
        assert "pale: fewer than 10 users" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("epochs", "told"),
    [
        (
            28,
            "Trained 28 of at most 60 epochs in 8 min 32 s: no validation since epoch 18 was better",
        ),
        (
            60,
            "Trained 60 of at most 60 epochs in 8 min 32 s: all epochs are done. The model of epoch 18",
        ),
    ],
)
def test_the_page_says_how_training_ended(tmp_path, result, epochs, told):
    result["timing"] |= {"epochs": epochs, "best_epoch": 18}
    write_report(tmp_path, result, CONFIG)
    assert "Trained" not in (tmp_path / "report.md").read_text()  # by an older version
    result["timing"]["max_epochs"] = 60
    write_report(tmp_path, result, CONFIG)
    assert told in (tmp_path / "report.md").read_text()


def test_a_model_below_baselines_is_told_by_the_metric_that_chose_it(tmp_path, result):
    write_report(tmp_path, result, CONFIG)
    page = (tmp_path / "report.md").read_text()
    assert (
        "**The model is below popularity (0.6130) and co-occurrence (0.8130)** by the metric that chose it, "
        "ndcg@10 with seen items allowed (0.2130)."
    ) in page
    result["test"]["seen_allowed"]["ndcg@10"] = 0.9
    write_report(tmp_path, result, CONFIG)
    assert "The model is below" not in (tmp_path / "report.md").read_text()


def test_coverage_and_novelty_are_sentences(tmp_path, result):
    result["recommended"] = {
        **{"num_users": 5000, "k": 10, "coverage": 0.123, "num_items": 1488},
        **{"novelty": 9.876, "target_novelty": 10.5},
    }
    write_report(tmp_path, result, CONFIG)
    page = (tmp_path / "report.md").read_text()
    assert "of 5,000 test users: 1,488 items" in page
    assert "**12.3%** of the catalogue" in page and "**9.88** bits" in page and "10.50 bits" in page


def example(**title):
    item = {"item_id": 7, **title}
    other = {"item_id": "a_b"}
    parts = {"history": [other, item], "target": item, "recommended": [other, item]}
    return {"user": "u|1", "num_events": 1234, **parts}


def test_examples_show_titles_that_markdown_does_not_read(tmp_path, result):
    result["examples"] = [example(title="*Bold* | [x](y)\n<b>\x07")]
    write_report(tmp_path, result, CONFIG)
    page = (tmp_path / "report.md").read_text()
    assert "User u\\|1, the newest of 1,234 events. The target, a repeat of an item" in page
    assert " is in place 2 of the list:" in page
    title = r"\*Bold\* \| \[x\]\(y\) \<b\>"
    assert re.search(rf"\| 2 recommended \(the target\) \| 7 +\| {re.escape(title)} \|", page)
    assert re.search(r"\| history +\| a\\_b +\| +\|", page)


def test_without_titles_examples_have_own_ids_alone(tmp_path, result):
    result["examples"] = [example()]
    write_report(tmp_path, result, CONFIG)
    page = (tmp_path / "report.md").read_text()
    assert "| **target**" in page and "title" not in page.split("## Examples")[1].split("##")[0]


@pytest.mark.parametrize(
    ("place", "is_repeat", "told"),
    [
        (7, False, "The target is in place 7 of the list:"),
        (None, False, "The target is not in the list:"),
        (None, True, "a repeat of an item of the history, is not in the list, which has no seen"),
    ],
)
def test_examples_tell_the_place_of_the_target(tmp_path, result, place, is_repeat, told):
    result["examples"] = [example() | {"place": place, "is_repeat": is_repeat}]
    write_report(tmp_path, result, CONFIG)
    assert told in (tmp_path / "report.md").read_text()


def test_a_long_title_is_cut():
    assert plain("x" * 81) == "x" * 77 + "..." and plain("x" * 80) == "x" * 80

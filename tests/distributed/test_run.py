"""Whole runs on several ranks: measured again at any number of them, and gone on with after a stop."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from hstu_rec import distributed
from hstu_rec.config import RunConfig, load
from hstu_rec.trainer import evaluate_run, train
from hstu_rec.training import Training
from tests.datasets import write_dataset
from tests.ranks import run_ranks

NUM_EPOCHS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """41 users (not a multiple of 2 or 3) of 3 to 14 events, of 30 items."""
    random = np.random.default_rng(11)
    sequences = [random.integers(0, 30, n).tolist() for n in random.integers(3, 15, 41)]
    path = tmp_path_factory.mktemp("run") / "data"
    write_dataset(path, sequences, num_items=30)
    return path


def train_once(data: Path, folder: Path, *settings: str):
    """result.json's content of a small run with dropout, a decaying rate and validation every epoch."""
    small = ["encoder.dim=8", "encoder.max_history_len=9", "encoder.dropout=0.3"]
    steps = ["data.batch_users=8", "optim.schedule=cosine", "loss.num_negatives=12"]
    learned = ["loss.use_seen_bias=true"]
    often = ["train.eval_every_epochs=1", "train.patience=0", "train.log_every_steps=1"]
    paths = [f"data.path={data}", f"train.run_dir={folder}", "train.device=cpu"]
    length = [f"train.max_epochs={NUM_EPOCHS}"]
    return train(load(RunConfig, [*small, *steps, *learned, *often, *paths, *length, *settings]))


@pytest.fixture(scope="module")
def run(data):
    """(folder, result) of an uninterrupted run on two ranks."""
    folder = data.parent / "whole"
    return folder, run_ranks(2, train_once, data, folder)[0]


def measured(result):
    """The part of a result that a second measurement must repeat."""
    return {name: result[name] for name in ("test", "valid", "baselines", "protocol")}


def train_losses(folder: Path):
    """{step: loss} from metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_the_result_is_written_and_returned_alike(run):
    folder, result = run
    assert json.loads((folder / "result.json").read_text()) == result


@pytest.mark.fault("R22")
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_at_any_number_of_ranks_gives_the_figures_of_the_run(run, world_size):
    folder, result = run
    for again in run_ranks(world_size, evaluate_run, folder, []):
        assert measured(again) == measured(result)


@pytest.mark.parametrize(
    "setting", ["loss.similarity=dot", "optim.lr=0.5", "train.seed=9", "encoder.window=3", "name=x"]
)
def test_what_makes_another_model_or_changes_nothing_is_refused(run, setting):
    with pytest.raises(ValueError, match=r"is measured as it was trained; .* what may be given is"):
        evaluate_run(run[0], ["train.device=cpu", setting])


def refused_on_rank_1(folder: Path) -> str:
    """What the process is told when one of two has no such folder."""
    with pytest.raises(ValueError) as raised:
        evaluate_run(folder if distributed.rank() == 0 else folder / "nowhere", [])
    return str(raised.value)


def test_all_ranks_end_when_one_does_not_find_the_run(run):
    for sentence in run_ranks(2, refused_on_rank_1, run[0]):
        assert "nowhere is no run folder: it does not exist" in sentence


def test_evaluate_prints_the_table_or_json_with_figures_over_frequent_targets_too(run, capsys):
    script = runpy.run_path(str(Path(__file__).parents[2] / "apps" / "evaluate.py"))
    given = [str(run[0]), "eval.min_train_count=6", "train.device=cpu"]
    script["main"](given)
    table = capsys.readouterr().out
    assert "{" not in table and "model, 6+ events" in table
    script["main"]([*given, "json=true"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["test"] == run[1]["test"] and printed["valid"] == run[1]["valid"]
    frequent = printed["frequent"]
    assert frequent["min_train_count"] == 6 and 0 < frequent["num_targets"] < 41
    assert frequent["test"]["seen_masked"].keys() == printed["test"]["seen_masked"].keys()
    assert frequent["test"] != printed["test"]


class Stopped(Exception):
    """Stands for whatever ends a run early."""


def train_two_epochs(data: Path, folder: Path, *settings: str):
    """Ends a run of NUM_EPOCHS after two, when their checkpoint is written."""
    validate = Training._validate

    def validate_and_stop(training):
        validate(training)
        if training.progress.epoch == 2:
            raise Stopped

    Training._validate = validate_and_stop
    with pytest.raises(Stopped):
        train_once(data, folder, *settings)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(data, run):
    whole, result = run
    folder = data.parent / "resumed"
    run_ranks(2, train_two_epochs, data, folder)
    before = train_losses(folder)
    resumed = run_ranks(2, train_once, data, folder, "train.resume=auto")[0]
    assert measured(resumed) == measured(result)
    losses = train_losses(folder)
    assert len(before) == len(losses) // 2
    # To the last bit: dense moments, row moments, dropout, order.
    assert losses == train_losses(whole)


def test_a_stopped_run_goes_on_with_another_number_of_ranks(data):
    same, other = data.parent / "same", data.parent / "other"
    # Dropout is drawn by each rank for its own users. Table-wise, all but one rank have no rows.
    still = ("encoder.dropout=0", "table.sharding=table_wise")
    run_ranks(2, train_two_epochs, data, same, *still)
    shutil.copytree(same, other)
    for world_size, folder in ((2, same), (3, other)):
        run_ranks(world_size, train_once, data, folder, "train.resume=auto", *still)
    expected, losses = train_losses(same), train_losses(other)
    assert losses.keys() == expected.keys()
    assert len(losses) > 10
    np.testing.assert_allclose([losses[s] for s in expected], list(expected.values()), atol=1e-4)


def test_a_used_folder_is_refused_on_all_ranks(data, run):
    folder, _ = run
    before = (folder / "config.yaml").read_text()
    for sentence in run_ranks(2, refusal, data, folder, "encoder.dim=4"):
        assert "holds a run already; give another folder" in sentence
    assert (folder / "config.yaml").read_text() == before


def refusal(data: Path, folder: Path, *settings: str) -> str:
    with pytest.raises(ValueError) as raised:
        train_once(data, folder, *settings)
    return str(raised.value)


def test_a_run_out_of_patience_is_only_measured_again(data, tmp_path):
    patient = ("train.patience=1", "optim.lr=1e-9", "table.lr=1e-9", "train.resume=auto")
    first = train_once(data, tmp_path / "run", *patient)
    assert first["timing"]["epochs"] < NUM_EPOCHS
    again = train_once(data, tmp_path / "run", *patient)
    assert measured(again) == measured(first)
    assert again["timing"] == first["timing"]


def test_a_checkpoint_of_another_folder_begins_a_run_with_its_own_best(data, run, tmp_path):
    whole, _ = run
    newest = max((whole / "checkpoints").glob("step_*"))
    longer = (f"train.resume={newest}", f"train.max_epochs={NUM_EPOCHS + 1}")
    sentence = refusal(data, tmp_path / "run", *longer)
    assert "train.max_epochs was 4 and is 5" in sentence  # of which the rates are functions
    result = train_once(data, tmp_path / "run", *longer, "train.resume_changed=true")
    # Its first one is what it began with.
    assert result["timing"]["best_epoch"] >= NUM_EPOCHS


def test_other_items_are_refused(data, run, tmp_path):
    whole, _ = run
    other = shutil.copytree(data, tmp_path / "data")
    stats = json.loads((other / "stats.json").read_text()) | {"item_map_hash": "another"}
    (other / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(ValueError, match="was trained on other items than"):
        evaluate_run(whole, [f"data.path={other}"])


def test_a_missing_checkpoint_is_named(data, tmp_path):
    sentence = refusal(data, tmp_path / "run", "train.resume=runs/typo")
    assert sentence.startswith("train.resume 'runs/typo' does not exist; give none, auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "is_told"), [(30, True), (29, False)])
def test_a_run_opens_with_a_remark_on_negatives_beyond_the_catalogue(
    data, tmp_path, capsys, count, is_told
):
    train_once(data, tmp_path / "run", "train.max_epochs=1", f"loss.num_negatives={count}")
    told = f"{count} negatives are drawn of 30 items; loss.negatives=all takes every item once"
    assert (told in capsys.readouterr().out) == is_told

"""What takes long shows how far it is; what is short shows nothing."""

import pytest

from hstu_rec import baselines, export, tracking
from hstu_rec.data.synthetic import SyntheticConfig, SyntheticDataset, event_tables
from hstu_rec.export import ExportConfig
from hstu_rec.tracking import Tracker
from tests.datasets import write_dataset
from tests.shared_models import train_run, write_data


@pytest.fixture
def at_once(monkeypatch):
    """Bars are shown after no time at all."""
    monkeypatch.setattr(tracking, "BAR_AFTER_S", 1e-9)
    monkeypatch.setattr(baselines, "BAR_AFTER_S", 1e-9)


def test_what_is_short_shows_no_bar(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "data", [[0, 1, 2, 3]] * 9)
    baselines.baseline_metrics(dataset, "test", [1])
    assert "baselines" not in capsys.readouterr().err


def test_baselines_and_made_events_show_how_far_they_are(tmp_path, capsys, at_once):
    dataset = write_dataset(tmp_path / "data", [[0, 1, 2, 3]] * 9)
    baselines.baseline_metrics(dataset, "test", [1])
    assert "baselines: 100%" in capsys.readouterr().err
    config = SyntheticConfig(num_users=30, num_items=20)
    assert sum(map(len, event_tables(config))) == SyntheticDataset(config).num_events
    assert "making events: 100%" in capsys.readouterr().err
    assert SyntheticDataset(config).train_counts.sum()
    assert "counting items: 100%" in capsys.readouterr().err


def test_a_run_tells_its_steps_and_how_many_histories_it_cuts_and_an_export_and_a_warm_start_theirs(
    tmp_path, capsys, at_once
):
    dataset = write_data(tmp_path / "data", num_users=60, num_items=30)
    train_run(tmp_path / "data", tmp_path / "run", "data.batch_users=16", "train.max_epochs=2")
    printed = capsys.readouterr()
    num_trained = int((dataset.train_ends >= 2).sum())
    num_cut = int((dataset.train_ends - 1 > 6).sum())
    assert 0 < num_cut < num_trained
    told = f"the newest 6 events; {num_cut} of {num_trained} that are trained on have more"
    assert told in printed.out
    num_steps = 2 * -(-num_trained // 16)
    assert f"{num_steps}/{num_steps} [" in printed.err and "training: 100%" in printed.err
    assert "epoch 2/2  loss" in printed.err
    export.export(tmp_path / "run", tmp_path / "shared", ExportConfig())
    assert "item vectors: 100%" in capsys.readouterr().err
    start = f"train.warm_start={tmp_path / 'run'}"
    train_run(tmp_path / "data", tmp_path / "next", "train.max_epochs=1", start)
    assert "rows of model/" in capsys.readouterr().err


def test_a_run_that_patience_ends_says_since_when_nothing_was_better(tmp_path, capsys):
    write_data(tmp_path / "data", num_users=60, num_items=30)
    settings = ["train.max_epochs=9", "train.eval_every_epochs=1", "train.patience=2"]
    settings += ["optim.lr=1e-30", "table.lr=1e-30"]  # by which nothing changes
    train_run(tmp_path / "data", tmp_path / "run", *settings)
    told = "stopped: no better validation since epoch 1 (train.patience=2)"
    assert told in capsys.readouterr().out
    page = (tmp_path / "run" / "report.md").read_text()
    assert "Trained 3 of at most 9 epochs in " in page
    assert "no validation since epoch 1 was better" in page
    train_run(tmp_path / "data", tmp_path / "whole", *settings[:2], "train.patience=0")
    assert "stopped" not in capsys.readouterr().out


def test_what_was_done_before_counts_as_done_but_not_for_the_speed(tmp_path, capsys):
    with Tracker(tmp_path, is_main=True) as tracker:
        bar = tracker.bar(10, "training", "step", done=8)
        assert bar.n == 8 and bar.format_dict["initial"] == 8
        bar.update(2)
        bar.close()
    assert "training: 100%" in capsys.readouterr().err and bar.n == 10

"""The run's record: rows survive kills and resumes, the bar stays readable in a log."""

import io
import json
import math
import subprocess
import sys

import pytest

from hstu_rec import tracking
from hstu_rec.tracking import METRICS_FILE, Stages, Tracker, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with Tracker(tmp_path, is_main=True) as tracker:
        tracker.log("train", 10, {"loss": 2.5, "lr": 1e-3})
        row = json.loads((tmp_path / METRICS_FILE).read_text())
    assert row.pop("time_s") >= 0
    assert row == {"kind": "train", "step": 10, "loss": 2.5, "lr": 1e-3}


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    with Tracker(folder, is_main=False) as tracker:
        tracker.log("train", 1, {"loss": 1.0})
        tracker.say("hello")
        bar = tracker.bar(5, "train", "step")
        bar.update(5)
        bar.close()
    assert not folder.exists()
    assert capsys.readouterr() == ("", "")


def test_a_resumed_run_appends_and_the_newest_row_of_a_step_counts(tmp_path):
    with Tracker(tmp_path, is_main=True) as tracker:
        for step in (10, 20, 30):
            tracker.log("train", step, {"loss": float(step)})
        tracker.log("valid", 30, {"mrr": 0.3})
    with Tracker(tmp_path, is_main=True) as tracker:
        for step in (20, 30, 40):
            tracker.log("train", step, {"loss": -float(step)})
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 7
    losses = [
        (row["step"], row["loss"]) for row in read_metrics(tmp_path) if row["kind"] == "train"
    ]
    assert losses == [(10, 10.0), (20, -20.0), (30, -30.0), (40, -40.0)]
    assert [row["mrr"] for row in read_metrics(tmp_path) if row["kind"] == "valid"] == [0.3]


def test_a_line_torn_by_a_kill_is_left_out_and_does_not_spoil_the_next(tmp_path):
    with Tracker(tmp_path, is_main=True) as tracker:
        tracker.log("train", 1, {"loss": 1.0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with Tracker(tmp_path, is_main=True) as tracker:
        tracker.log("train", 2, {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"kind": "train", "step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_nan_and_infinity_are_stored_as_json_null(tmp_path):
    with Tracker(tmp_path, is_main=True) as tracker:
        tracker.log("train", 1, {"loss": math.nan, "norm": math.inf, "lr": 1.0})
    assert '"loss": null, "norm": null, "lr": 1.0' in (tmp_path / METRICS_FILE).read_text()
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_a_value_cannot_take_the_place_of_the_step(tmp_path):
    with Tracker(tmp_path, is_main=True) as tracker, pytest.raises(ValueError, match="step"):
        tracker.log("train", 1, {"step": 2.0})


def test_tensorboard_holds_the_same_scalars_and_hides_steps_done_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, sign in (((10, 20, 30), 1), ((20, 30), -1)):
        with Tracker(tmp_path, is_main=True) as tracker:
            for step in steps:
                tracker.log("train", step, {"loss": float(sign * step)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(10, 10.0), (20, -20.0), (30, -30.0)]


def test_without_a_terminal_the_bar_prints_a_line_at_most_every_ten_seconds(tmp_path, monkeypatch):
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    with Tracker(tmp_path, is_main=True) as tracker:
        bar = tracker.bar(100, "train", "step")
        for second in range(1, 36):
            now[0] = float(second)
            bar.update(2)
            bar.set_postfix_str(f"loss {second}")
        bar.close()
    lines = log.getvalue().split("\n")
    assert "\r" not in log.getvalue()
    assert [line.split("loss ")[1].rstrip("]") for line in lines[:-1]] == ["10", "20", "30", "35"]
    assert "70/100" in lines[3] and lines[-1] == ""


def test_on_a_terminal_the_bar_rewrites_its_line_and_text_appears_above(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with Tracker(tmp_path, is_main=True) as tracker:
        bar = tracker.bar(4, "train", "step")
        tracker.say("best so far")
        bar.update(4)
        bar.close()
    shown = screen.getvalue()
    assert "best so far\n" in shown and shown.count("\n") == 2
    assert "4/4" in shown.split("\r")[-1]


def test_importing_tracking_loads_neither_torch_nor_tensorboard_nor_matplotlib():
    code = (
        "import sys, hstu_rec.tracking; "
        "print([m for m in ('torch', 'tensorboard', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_stages_are_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    stderr = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(ValueError, match="bad rows"), Stages(2, is_shown=True) as stages:
        with stages.stage("read"):
            pass
        with stages.stage("clean"):
            raise ValueError("bad rows")
    told = stderr.getvalue()
    if is_terminal:
        assert "clean:  50%" in told and "1/2" in told
    else:
        assert [line.split()[0] for line in told.splitlines()] == ["read"]


def test_stages_that_are_not_shown_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Stages(1, is_shown=False) as stages, stages.stage("read"):
        pass
    assert capfd.readouterr() == ("", "")

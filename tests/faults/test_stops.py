"""Runs that a scheduler, a launcher or a user asks to stop: they save, end soon, and lose no step."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hstu_rec import checkpoint
from hstu_rec.signals import INTERRUPTED_CODE, RETRY_CODE
from tests.datasets import write_dataset

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SETTINGS = (
    "encoder.dim=8", "encoder.max_history_len=9", "encoder.dropout=0.3", "data.batch_users=8",
    "loss.num_negatives=12", "train.patience=0", "train.device=cpu", "train.log_every_steps=1",
    "train.eval_every_epochs=9", "train.resume=auto", "eval.with_baselines=false", "name=stops",
)  # fmt: skip
# torchrun ends what has not ended 30 s after it was asked.
WITHIN_S = 25.0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """77 users, 10 steps an epoch, of 30 items."""
    generator = np.random.default_rng(5)
    sequences = [generator.integers(0, 30, n).tolist() for n in generator.integers(4, 15, 77)]
    path = tmp_path_factory.mktemp("stops") / "data"
    write_dataset(path, sequences, num_items=30)
    return path


def start(data, folder, num_epochs, *launcher):
    """A run in a process group of its own."""
    paths = (f"data.path={data}", f"train.run_dir={folder}", f"train.max_epochs={num_epochs}")
    return subprocess.Popen(
        [*(launcher or (sys.executable,)), "apps/train.py", *SETTINGS, *paths],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


TWO = (str(BIN / "torchrun"), "--nproc-per-node", "2")


def losses(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def stop(run, folder, num_steps, number, is_group):
    """Asks the run to stop once it has done so many steps; (its output, exit code, seconds that it took)."""
    try:
        while len(losses(folder)) < num_steps:
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.01)
        asked_at = time.monotonic()
        (os.killpg if is_group else os.kill)(run.pid, number)
        output, _ = run.communicate(timeout=60)
        return output, run.returncode, time.monotonic() - asked_at
    finally:
        run.kill()


def has_lost_no_step(folder):
    """Whether the newest checkpoint is of the last step that was told."""
    path, skipped = checkpoint.newest(folder / "checkpoints")
    done = max(losses(folder)) + 1
    return path is not None and skipped == [] and path.name == f"step_{done:08d}"


@pytest.mark.fault("R9")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, RETRY_CODE), (signal.SIGINT, INTERRUPTED_CODE)]
)
def test_one_process_saves_and_ends_with_a_code_that_says_so(data, tmp_path, number, code):
    run = start(data, tmp_path / "run", 10_000)
    output, exit_code, took_s = stop(run, tmp_path / "run", 33, number, is_group=False)
    assert exit_code == code and took_s < WITHIN_S
    assert "stopped at step" in output.splitlines()[-1], output
    assert has_lost_no_step(tmp_path / "run")


@pytest.mark.fault("R9")
def test_processes_of_a_launcher_save_together(data, tmp_path):
    run = start(data, tmp_path / "run", 10_000, *TWO)
    output, _, took_s = stop(run, tmp_path / "run", 33, signal.SIGTERM, is_group=True)
    assert took_s < WITHIN_S and has_lost_no_step(tmp_path / "run"), output


@pytest.mark.slow
@pytest.mark.fault("R9")
def test_a_run_stopped_ten_times_ends_as_if_it_had_not_been(data, tmp_path, tries):
    folder, moments = tmp_path / "stopped", random.Random(9)
    num_epochs, num_steps = 70, 0
    for number in range(10):
        num_steps += moments.randrange(1, 60)
        run = start(data, folder, num_epochs, *TWO)
        which = (signal.SIGTERM, signal.SIGINT)[number % 5 == 4]
        output, _, took_s = stop(run, folder, num_steps, which, is_group=number % 2 == 0)
        num_steps = len(losses(folder))
        is_held = took_s < WITHIN_S and has_lost_no_step(folder)
        assert is_held, (number, took_s, output)
        tries.count(is_held)
    for path in (folder, tmp_path / "whole"):
        assert start(data, path, num_epochs, *TWO).wait(300) == 0
    assert losses(folder) == losses(tmp_path / "whole")
    results = [json.loads((f / "result.json").read_text()) for f in (folder, tmp_path / "whole")]
    assert results[0]["test"] == results[1]["test"]

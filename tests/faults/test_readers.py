"""Files of events that are cut, fail or vanish while a run reads them: no hang, errors name them."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hstu_rec.config import RunConfig, load
from hstu_rec.data.dataset import Dataset
from hstu_rec.distributed import process_group
from hstu_rec.learner import Learner
from tests.faults.launched import (
    SETTINGS,
    TORCHRUN,
    Launched,
    figures,
    free_port,
    launched,
    num_rows,
    small_dataset,
    two_processes,
    wait_for,
)

ENDED_WITHIN_S = 60.0
FILES = ("events.arrow", "users.arrow")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_dataset(tmp_path / "data")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def training(data: Path, run: Path, num_epochs: int) -> list[str]:
    return [
        *SETTINGS,
        f"train.max_epochs={num_epochs}",
        f"data.path={data}",
        f"train.run_dir={run}",
    ]


def wait_until_it_trains(run: Path, *processes: Launched) -> None:
    def is_training() -> bool:
        assert all(one.launcher.poll() is None for one in processes), processes[0].told()
        return num_rows(run, "train") > 10

    wait_for(is_training)


@pytest.mark.fault("R11")
def test_a_file_that_is_cut_while_it_is_read_ends_all_with_its_name(
    data: Path, tmp_path: Path
) -> None:
    file = "events.arrow"
    settings = training(data, tmp_path / "run", 100_000)
    with two_processes(settings, tmp_path / "log", free_port()) as both:
        wait_until_it_trains(tmp_path / "run", *both)
        cut(data / file)
        cut_at = time.monotonic()
        assert [one.wait(ENDED_WITHIN_S) for one in both] == [2, 2]
        assert time.monotonic() - cut_at < ENDED_WITHIN_S
        for one in both:
            assert f"{data / file} was changed while it was read: it had " in one.told()


@pytest.mark.fault("R11")
def test_a_cut_file_is_not_read_again_and_again(data: Path, tmp_path: Path) -> None:
    with launched([*TORCHRUN, *training(data, tmp_path / "run", 100_000)], tmp_path / "log") as one:
        wait_until_it_trains(tmp_path / "run", one)
        cut(data / "events.arrow")
        assert one.wait(ENDED_WITHIN_S) != 0
        assert f"error: {data}/events.arrow was changed while it was read" in one.told()
        assert one.told().count("\nmodel  ") == 1  # of the opening


@pytest.mark.fault("R11")
def test_files_that_are_removed_while_a_run_reads_them_stay_with_it(
    data: Path, tmp_path: Path
) -> None:
    runs = {name: tmp_path / name for name in ("removed", "kept")}
    for name, run in runs.items():
        command = [sys.executable, *training(data, run, 20)]
        with launched(command, tmp_path / f"log_{name}") as one:
            if name == "removed":
                wait_until_it_trains(run, one)
                content = {file: (data / file).read_bytes() for file in FILES}
                for file in FILES:
                    (data / file).unlink()
            assert one.wait() == 0, one.told()
        if name == "removed":
            for file in FILES:
                (data / file).write_bytes(content[file])
    assert figures(runs["removed"]) == figures(runs["kept"])


BUS_ERROR = """
import sys, time
from pathlib import Path
import torch
from hstu_rec import distributed
from hstu_rec.config import run_app
from hstu_rec.data.dataset import Dataset

def main(arguments):
    dataset = Dataset(arguments[0])
    with distributed.process_group("cpu"):
        distributed.barrier()
        if distributed.rank() == 1:
            open(dataset.path / "counts.arrow", "w").close()
            print(dataset.train_counts.sum())
        distributed.barrier()

run_app(main)
"""


@pytest.mark.fault("R11")
def test_who_waits_for_a_process_that_a_cut_file_killed_names_the_file(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(BUS_ERROR)
    script = [str(tmp_path / "script.py"), str(data)]
    with two_processes(script, tmp_path / "log", free_port()) as (waiting, reading):
        assert waiting.wait(ENDED_WITHIN_S) == 2, waiting.told()
        assert reading.wait(ENDED_WITHIN_S) < 0
    assert f"error: {data}/counts.arrow was changed while it was read: it had " in waiting.told()
    # The one that was killed tells where.
    assert "Fatal Python error: Bus error" in reading.told()


ONE_FAILS = """
import runpy, sys
from hstu_rec.data.dataset import Dataset
from hstu_rec import distributed

gather, num_calls = Dataset.gather, 0

def failing(self, *args):
    global num_calls
    num_calls += 1
    if distributed.rank() == 1 and num_calls == 30:
        raise OSError(5, "Input/output error", str(self.path / "events.arrow"))
    return gather(self, *args)

Dataset.gather = failing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.fault("R11")
def test_a_read_that_fails_on_one_process_ends_all_with_the_files_name(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    script = [str(tmp_path / "one_fails.py"), *training(data, tmp_path / "run", 100_000)]
    with two_processes(script, tmp_path / "log", free_port()) as (waiting, reading):
        assert reading.wait() == 1
        assert waiting.wait(ENDED_WITHIN_S) == 75
    for one in (waiting, reading):
        assert f"Input/output error: '{data}/events.arrow'" in one.told()
    assert "error: process 1 of 2 on " in waiting.told()


@pytest.mark.fault("R11")
def test_a_thread_that_makes_inputs_hands_its_error_on(data: Path) -> None:
    config = load(RunConfig, [*SETTINGS[1:], f"data.path={data}", "train.run_dir=unused"])
    with process_group("cpu") as device:
        learner = Learner(config, Dataset(data), device)
        # As on CUDA with large steps.
        learner.inputs._thread = ThreadPoolExecutor(1)
        learner.step(0, 0, 0)
        cut(data / "events.arrow")
        with pytest.raises(ValueError, match=r"events\.arrow was changed while it was read"):
            for number in range(1, 4):
                learner.step(0, number, number)

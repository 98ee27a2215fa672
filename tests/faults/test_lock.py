"""A run's folder is of one run at a time, and of runs alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from hstu_rec import distributed, lock
from hstu_rec.config import RunConfig, load
from hstu_rec.trainer import train
from tests.faults.launched import small_dataset

HOLDER = """
import sys, time
from pathlib import Path
from hstu_rec import lock
with lock.only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@contextmanager
def another_run_in(folder: Path, job: str = ""):
    """The process of a run that goes on in `folder`, of a launcher's job if one is named."""
    variables = {"RANK": "0", "TORCHELASTIC_RUN_ID": job} if job else {}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def small_run(tmp_path: Path, folder: Path) -> RunConfig:
    data = tmp_path / "data"
    if not data.exists():
        small_dataset(data)
    settings = [
        "encoder.dim=8",
        "train.max_epochs=1",
        "train.device=cpu",
        "eval.with_baselines=false",
    ]
    return load(
        RunConfig, [*settings, f"data.path={data}", f"train.run_dir={folder}", "train.resume=auto"]
    )


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_S", 0.3)
    (tmp_path / "run").mkdir()
    config = small_run(tmp_path, tmp_path / "run")
    with another_run_in(tmp_path / "run") as other:
        with pytest.raises(ValueError, match=rf"run that still goes on \(process {other.pid} on "):
            train(config)
        assert [one.name for one in (tmp_path / "run").iterdir()] == [".lock"]
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert train(config)["timing"]["epochs"] == 1


def test_a_job_that_was_started_again_waits_for_its_former_process(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_S", 0.1)
    with another_run_in(tmp_path, job="seven") as other:
        monkeypatch.setattr(distributed, "job", lambda: "eight")
        with pytest.raises(ValueError, match="still goes on"), lock.only_run_in(tmp_path):
            pass
        monkeypatch.setattr(distributed, "job", lambda: "seven")
        killer = threading.Timer(1.0, other.kill)
        killer.start()
        began = time.monotonic()
        with lock.only_run_in(tmp_path):
            assert time.monotonic() - began > 0.9
        killer.join()


def test_the_folder_of_a_job_is_the_newest_that_it_began(tmp_path, monkeypatch):
    for number, job in enumerate(["one", "two", "one"]):
        monkeypatch.setattr(distributed, "job", lambda job=job: job)
        folder = tmp_path / f"run {number}"
        folder.mkdir()
        with lock.only_run_in(folder):
            pass
        os.utime(folder / lock.LOCK, (number, number))
    (tmp_path / "no run").mkdir()
    assert lock.folder_of("one", tmp_path) == tmp_path / "run 2"
    assert lock.folder_of("two", tmp_path) == tmp_path / "run 1"
    assert lock.folder_of("three", tmp_path) is None


def test_a_folder_of_other_files_is_no_run_s(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("\\chapter{}")
    with pytest.raises(ValueError, match="holds other files, and no run; give a folder that is"):
        train(small_run(tmp_path, folder))
    with pytest.raises(ValueError, match=r"chapter.tex is no folder"):
        train(small_run(tmp_path, folder / "chapter.tex"))
    assert [one.name for one in folder.iterdir()] == ["chapter.tex"]


def test_what_a_run_leaves_that_was_killed_as_it_began_is_in_no_one_s_way(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".seen_by_all_0").touch()
    assert train(small_run(tmp_path, folder))["timing"]["epochs"] == 1

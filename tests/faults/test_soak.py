"""What a process takes does not grow with fits and hours, and Ctrl-C leaves nothing behind.

`make test-soak` alone runs the long ones: 500 fits, and an hour of training (or `--soak-minutes`).
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hstu_rec.config import RunConfig, load
from hstu_rec.tracking import read_metrics
from hstu_rec.trainer import train
from tests.datasets import write_dataset

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")
SMALL = (
    "encoder.dim=8",
    "encoder.max_history_len=9",
    "data.batch_users=16",
    "loss.num_negatives=20",
    "train.device=cpu",
)
END_S = 60.0


class Usage(NamedTuple):
    """What a process holds."""

    memory_mib: float  # of its own, not of mapped files
    descriptors: float
    threads: float
    shared: float  # files of /dev/shm that it has mapped or open


def usage(pid: int) -> Usage:
    """That of a process, as the kernel counts it."""
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    mib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024
    descriptors = len(os.listdir(folder / "fd"))
    return Usage(mib, descriptors, int(status["Threads"]), len(shared_files(pid)))


def shared_files(pid: int) -> set[str]:
    """Files of /dev/shm that a process uses; none of one that has gone, or is another user's."""
    folder, found = Path("/proc") / str(pid), set()
    with contextlib.suppress(OSError):
        for line in (folder / "maps").read_text().splitlines():
            found |= {word for word in line.split()[5:6] if word.startswith(str(SHARED_MEMORY))}
        for one in (folder / "fd").iterdir():
            with contextlib.suppress(OSError):
                found |= {to for to in [os.readlink(one)] if to.startswith(str(SHARED_MEMORY))}
    return found


def files(folder: Path) -> list[str]:
    """Files in a folder; not the empty folders that torch makes for a cache, and torchrun for logs."""
    return [str(one.relative_to(folder)) for one in folder.rglob("*") if not one.is_dir()]


def growth(taken: Sequence[Usage], num_first: int) -> Usage:
    """By how much each number rises from one to the next, by least squares, after the first few."""
    rest = np.array(taken[num_first:], dtype=np.float64)
    return Usage(*np.polynomial.polynomial.polyfit(np.arange(len(rest)), rest, 1)[1].tolist())


def small_data(path: Path) -> Path:
    """40 users of 3 to 11 events, of 30 items."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 12, 40)
    write_dataset(path, [random.integers(0, 30, n).tolist() for n in lengths], num_items=30)
    return path


def fit(number: int, root: Path) -> None:
    """A run of two epochs, into a folder of its own, which is removed."""
    folder = root / f"run {number}"
    length = ("train.max_epochs=2", "train.eval_every_epochs=1")
    paths = (f"data.path={root / 'data'}", f"train.run_dir={folder}")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(load(RunConfig, [*SMALL, *length, *paths]))
    assert (folder / "result.json").is_file()
    shutil.rmtree(folder)


held: list[object] = []


def leak(number: int, root: Path) -> None:
    """What must be noticed: a descriptor and a MiB a time."""
    held.extend([open(root / f"leak {number}", "wb"), bytearray(os.urandom(2**20))])


def repeated(work: Callable[[int, Path], None], count: int, root: Path) -> list[Usage]:
    """What this process takes after each time. Raises AssertionError for a temporary file that is left."""
    temporary = root / "temporary"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    taken = []
    for number in range(count):
        work(number, root)
        taken.append(usage(os.getpid()))
        assert not files(temporary)
    return taken


def in_a_process(work: Callable[[int, Path], None], count: int, root: Path) -> list[Usage]:
    """`repeated` in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(repeated, work, count, root).result()


@pytest.mark.fault("R33")
@pytest.mark.slow
def test_thirty_fits_in_one_process_take_no_more_than_ten(tmp_path):
    small_data(tmp_path / "data")
    grown = growth(in_a_process(fit, 30, tmp_path), 10)
    assert grown.memory_mib < 0.5 and max(grown[1:]) < 0.2, grown


def test_a_leak_would_be_seen(tmp_path):
    grown = growth(in_a_process(leak, 30, tmp_path), 10)
    assert grown.memory_mib > 0.5 and grown.descriptors > 0.2, grown


@pytest.mark.soak
@pytest.mark.fault("R33")
def test_five_hundred_fits_in_one_process(tmp_path, tries):
    small_data(tmp_path / "data")
    taken = in_a_process(fit, 500, tmp_path)
    grown = growth(taken, 100)
    print(f"first {taken[0]}, 100th {taken[99]}, last {taken[-1]}, growth a fit {grown}")
    tries.count(grown.memory_mib < 0.05 and max(grown[1:]) < 0.01)


LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ],
    "torchx": ["torchx", "run", "-s", "local_cwd", "dist.ddp", "-j", "1x2"],
}


class Job:
    """A training that goes on until it is stopped, started as from a terminal."""

    def __init__(self, launcher: str, root: Path) -> None:
        self.folder, self.temporary = root / "run", root / "temporary"
        self.temporary.mkdir()
        self.log = root / "log"
        self._mark = f"HSTU_REC_JOB={uuid.uuid4()}"
        self._shared = set(SHARED_MEMORY.iterdir())
        hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHXCONFIG"}
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        name, value = self._mark.split("=")
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        own = {name: value, "PATH": path, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        endless = ("train.max_epochs=1000000", "train.patience=0", "train.eval_every_epochs=20")
        paths = (f"data.path={small_data(root / 'data')}", f"train.run_dir={self.folder}")
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*LAUNCHERS[launcher], "apps/train.py", *SMALL, *endless, *paths],
                cwd=ROOT,
                env=environment | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Those of the job that are there, by what they inherit."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def ranks(self) -> list[int]:
        """Those that train."""
        with_rank = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                is_rank = any(word.startswith(b"RANK=") for word in words)
                with_rank += [pid] * (is_rank and b"apps/train.py" in self._command(pid))
        return with_rank

    @staticmethod
    def _command(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()

    def wait_until_it_trains(self) -> None:
        """Waits for some epochs."""
        deadline = time.monotonic() + 120
        while not self.folder.is_dir() or len(read_metrics(self.folder)) < 40:
            assert self.launcher.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def interrupt(self) -> float:
        """Ctrl-C, which a terminal sends to its foreground processes; seconds until all have ended."""
        began_at = time.monotonic()
        os.killpg(self.launcher.pid, signal.SIGINT)
        while self.launcher.poll() is None or self.processes():
            if time.monotonic() - began_at > END_S:
                raise AssertionError(f"{self.processes()} are left; {self.text()[-3000:]}")
            time.sleep(0.1)
        return time.monotonic() - began_at

    def left_behind(self) -> list[str]:
        """Temporary files, and shared memory that is new and that no process uses or removes within 30 s."""
        new = {str(one) for one in SHARED_MEMORY.iterdir() if one not in self._shared}
        deadline = time.monotonic() + 30
        while new and time.monotonic() < deadline:  # other programs make and remove theirs
            pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
            used = set().union(*map(shared_files, pids))
            new = {one for one in new - used if Path(one).exists()}
            time.sleep(0.1)
        return files(self.temporary) + sorted(new)

    def text(self) -> str:
        """What the job printed."""
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Kills what is left."""
        for pid in {
            *self.processes(),
            *([self.launcher.pid] if self.launcher.poll() is None else []),
        }:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()


@contextlib.contextmanager
def started(launcher: str, root: Path) -> Iterator[Job]:
    """A job that trains; nothing of it is left at the end."""
    job = Job(launcher, root)
    try:
        job.wait_until_it_trains()
        yield job
    finally:
        job.end()


@pytest.mark.fault("R33")
@pytest.mark.parametrize(
    "launcher", ["python", "torchrun", pytest.param("torchx", marks=pytest.mark.slow)]
)
def test_ctrl_c_leaves_no_process_and_no_file_behind(launcher, tmp_path):
    with started(launcher, tmp_path) as job:
        assert len(job.ranks()) == {"python": 0}.get(launcher, 2)
        job.interrupt()
        assert job.launcher.returncode != 0
        assert job.left_behind() == []


@pytest.mark.soak
@pytest.mark.fault("R33")
def test_an_hour_of_training_on_two_ranks(tmp_path, pytestconfig):
    minutes = pytestconfig.getoption("--soak-minutes")
    with started("torchrun", tmp_path) as job:
        pids, taken = job.ranks(), []
        deadline, every_s = time.monotonic() + 60 * minutes, 60 * minutes / 240
        while time.monotonic() < deadline:
            assert job.launcher.poll() is None, job.text()
            taken.append([usage(pid) for pid in pids])
            time.sleep(every_s)
        num_steps = read_metrics(job.folder)[-1]["step"]
        for rank, of_rank in enumerate(zip(*taken, strict=True)):
            grown = growth(of_rank, 60)
            print(f"rank {rank}, {num_steps} steps: {of_rank[0]}, {of_rank[59]}, {of_rank[-1]}")
            # In all: what grew from the 60th of 240 on.
            whole = Usage(*(180 * one for one in grown))
            assert whole.memory_mib < 20 and max(whole[1:]) < 3, whole
        job.interrupt()
        assert job.left_behind() == []

"""Runs of an app by a launcher, whose processes can be found and killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from tests.datasets import write_dataset

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
TORCHX = ("torchx", "run", "-s", "local_cwd", "dist.ddp", "-j", "1x2")
TORCHRUN = ("torchrun", "--nproc-per-node", "2", "--max-restarts", "3")
# Of a run before this one.
HIDDEN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
HIDDEN |= {"GLOO_SOCKET_IFNAME", "TORCHXCONFIG"}
MARK = "HSTU_REC_TEST"
SETTINGS = (
    *("apps/train.py", "name=small", "train.device=cpu", "train.patience=0"),
    *("train.eval_every_epochs=1", "train.log_every_steps=1", "train.resume=auto"),
    *("data.batch_users=8", "encoder.dim=8", "encoder.max_history_len=9", "loss.num_negatives=12"),
    "eval.with_baselines=false",
)
PATIENCE_S = 300.0


def small_dataset(path: Path) -> Path:
    """A dataset folder of 60 users and 50 items."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 50, n).tolist() for n in random.integers(3, 15, 60)]
    return write_dataset(path, sequences, num_items=50).path


def environment(**variables: str) -> dict[str, str]:
    """Of a launcher: this Python's own programs, this repository's package, one thread a process."""
    kept = {k: v for k, v in os.environ.items() if k not in HIDDEN and not k.startswith("TORCHEL")}
    kept |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return kept | {"OMP_NUM_THREADS": "1"} | variables


def figures(run: Path) -> dict[str, Any]:
    """What must be the same however often a run was interrupted."""
    result = json.loads((run / "result.json").read_text())
    return {part: result[part] for part in ("test", "valid", "protocol")}


def num_rows(run: Path, kind: str) -> int:
    """Rows of a kind in metrics.jsonl, which are flushed as they come."""
    path = run / "metrics.jsonl"
    return path.read_text().count(f'"kind": "{kind}"') if path.exists() else 0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def variables_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it has ended."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


def wait_for(what: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    """What `what()` returns once that is true."""
    deadline = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {within_s} s in vain"
        time.sleep(0.02)
    return found


class Launched:
    """A launcher that runs, and its processes."""

    def __init__(
        self, command: Sequence[str], log: Path, folder: Path = ROOT, **variables: str
    ) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        with log.open("ab") as out:
            self.launcher = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(**{MARK: self.mark}, **variables),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> dict[int, dict[str, str]]:
        """Variables of all that are running, launchers and their processes, by process id."""
        pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
        found = {pid: variables_of(pid) for pid in pids}
        return {pid: own for pid, own in found.items() if own.get(MARK) == self.mark}

    def ranks(self) -> dict[int, int]:
        """Process ids of those that are running, by rank."""
        return {int(own["RANK"]): pid for pid, own in self.processes().items() if "RANK" in own}

    def kill(self, rank: int, how: signal.Signals = signal.SIGKILL) -> int | None:
        """Kills the process of that rank and returns its id; None when there is none any more."""
        pid = self.ranks().get(rank)
        if pid is not None:
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                return None
        return pid

    def wait(self, within_s: float = PATIENCE_S) -> int:
        """The launcher's exit code."""
        return self.launcher.wait(within_s)

    def told(self) -> str:
        """What launcher and processes wrote."""
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Leaves nothing behind."""
        # A launcher may start others between a look and a kill.
        while found := self.processes():
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.launcher.poll()
        self.launcher.wait()


@contextmanager
def launched(
    command: Sequence[str], log: Path, folder: Path = ROOT, **variables: str
) -> Iterator[Launched]:
    """The command, running in a folder; ended with all its processes on the way out."""
    one = Launched(command, log, folder, **variables)
    try:
        yield one
    finally:
        one.end()


@contextmanager
def two_processes(script: Sequence[str], log: Path, port: int) -> Iterator[list[Launched]]:
    """Two processes of one group without a launcher that would end one for the other."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = []
    try:
        for rank in range(2):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            command = [sys.executable, *script]
            both.append(Launched(command, log.with_suffix(f".{rank}"), **group, **own))
        yield both
    finally:
        for one in both:
            one.end()

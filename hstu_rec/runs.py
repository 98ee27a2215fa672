"""Runs of recipes: a process group each, launched as a user launches apps/train.py, and once only.

    quality.folder/<recipe>-<digest>/seed_<seed>/      and seed_<seed>.log beside it

The digest is of the settings that are not the defaults and of the data, so that a changed recipe is another
folder and what is done is never run again. Of the code the tables tell the commit that each row was made
with: after a change of it, give another quality.folder. A stopped run goes on.
"""

import fcntl
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hstu_rec import distributed
from hstu_rec.config import RunConfig, leaves, load, save
from hstu_rec.run_folder import settings_file

TREE = Path(__file__).parent.parent
TRAIN_APP = TREE / "apps" / "train.py"
# What quality sets itself in every run.
OWN_KEYS = ("train.seed", "train.run_dir", "train.resume")
# What may differ where a run is measured again.
MEASURING_KEYS = (
    r"eval\..*|data\.path|train\.(device|precision)|encoder\.attention_kernel|table\.sharding"
)
POLL_S = 0.2
# torchrun gives its processes 30 s to end.
STOP_S = 40.0
# The last of the first pattern that a log has: an error's own line, a killed process in torchrun's report.
REASONS = (r"^(?:error|[\w.]+(?:Error|Exception)): \S.*", r"Signal \d+ .*", r"\S.*")


@dataclass(frozen=True, eq=False)
class Recipe:
    """A YAML file, resolved with the overrides of all runs; equal to itself alone."""

    file: str
    given: tuple[str, ...]  # settings given to all recipes
    variant: str  # of quality.variants, or ""
    config: RunConfig
    facts: dict[str, Any]  # of the data, as a result's protocol.data has them
    folder: Path

    @property
    def name(self) -> str:
        """What the recipe is called in tables."""
        return ", ".join(filter(None, [Path(self.file).stem, self.variant]))


@dataclass(frozen=True)
class Run:
    """One seed of a recipe."""

    recipe: Recipe
    seed: int

    @property
    def folder(self) -> Path:
        """The run's folder, train.run_dir."""
        return self.recipe.folder / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        """What the run's processes print."""
        return self.recipe.folder / f"seed_{self.seed}.log"

    def __str__(self) -> str:
        return f"{self.recipe.name} seed {self.seed}"


class Active(NamedTuple):
    """A run in progress."""

    process: subprocess.Popen[bytes]
    began_at: float
    slot: int  # of quality.jobs; it has GPUs of its own where there are enough


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run what it is, but for its seed."""
    return {key: value for key, value in leaves(config).items() if key not in OWN_KEYS}


def identity_of_data(facts: dict[str, Any]) -> dict[str, Any]:
    """Statistics without the time that they took."""
    return {name: value for name, value in facts.items() if name != "prepare_s"}


def measured_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run, to measure it again with other `MEASURING_KEYS`.

    Raises FileNotFoundError when `folder` is no run's, ValueError for a setting that would make another model
    or change nothing.
    """
    written = settings_file(folder)
    if not written.is_file():
        what = f"has no {written.name}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{folder} is no run folder: it {what}; give one that apps/train.py wrote, "
            "runs/<time>-<name>"
        )
    config = load(RunConfig, [str(written), *overrides])
    trained = leaves(load(RunConfig, [str(written)]))
    changed = [
        f"{key} (trained with {trained[key]}, given {value})"
        for key, value in leaves(config).items()
        if value != trained[key] and not re.fullmatch(MEASURING_KEYS, key)
    ]
    if changed:
        raise ValueError(
            f"{folder} is measured as it was trained; without effect, or of another model: "
            f"{', '.join(changed)}; what may be given is eval.*, data.path, train.device, train.precision, "
            "encoder.attention_kernel and table.sharding"
        )
    return config


def finished(run: Run) -> dict[str, Any] | None:
    """The run's result.json, None while there is none.

    Raises ValueError when the folder holds a run of another configuration, seed or data.
    """
    written = run.folder / "config.yaml"
    if not written.is_file():
        return None
    there = load(RunConfig, [str(written)])
    is_other = identity(there) != identity(run.recipe.config) or there.train.seed != run.seed
    path = run.folder / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if result is not None:
        is_other |= identity_of_data(result["protocol"]["data"]) != run.recipe.facts
    if is_other:
        raise ValueError(
            f"{run.folder} holds another run than {run}, changed by hand or cut short; remove that "
            "folder, or give another quality.folder"
        )
    return result


def train_all(runs: Sequence[Run], num_jobs: int, num_processes: int) -> dict[Run, str]:
    """Trains the runs, `num_jobs` at a time; the reason of each that failed. 0 processes: see `processes_of`.

    Whatever ends this function early, Ctrl-C or a signal, ends the runs that are in progress.
    """
    waiting, active = list(runs), dict[Run, Active]()
    free, failures = list(range(num_jobs)), {}
    with _signals_as_interrupts():
        try:
            while waiting or active:
                while waiting and free:
                    run = waiting.pop(0)
                    print(f"begins  {run}  {run.log}", flush=True)
                    try:
                        process = _launch(run, num_processes or processes_of(run), free[0])
                    except BlockingIOError:
                        failures[run] = "another process is training it"
                        print(f"failed  {run}  {failures[run]}", flush=True)
                        continue
                    active[run] = Active(process, time.monotonic(), free.pop(0))
                time.sleep(POLL_S)
                for run in [run for run, one in active.items() if one.process.poll() is not None]:
                    process, began_at, slot = active.pop(run)
                    free.append(slot)
                    spent = f"{time.monotonic() - began_at:.0f} s"
                    if reason := _reason(run, process.returncode):
                        failures[run] = reason
                        print(f"failed  {run}  {spent}  {reason}", flush=True)
                    else:
                        print(f"done    {run}  {spent}", flush=True)
        finally:
            _stop([one.process for one in active.values()])
    return failures


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP, unless they are ignored or handled already, act as Ctrl-C does."""
    plain = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for one in plain:
        signal.signal(one, signal.default_int_handler)
    try:
        yield
    finally:
        for one in plain:
            signal.signal(one, signal.SIG_DFL)


def _launch(run: Run, num_processes: int, slot: int) -> subprocess.Popen[bytes]:
    """The run's launcher, started. The recipe is given as resolved now: its file may change meanwhile.

    Raises BlockingIOError while another process trains the same run: its log is locked for as long as any
    process of the run has it open.
    """
    run.recipe.folder.mkdir(parents=True, exist_ok=True)
    save(run.recipe.config, run.recipe.folder / "recipe.yaml")
    with run.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.truncate(0)
        # In a session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
        return subprocess.Popen(
            _command(run, num_processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=distributed.environment_of(slot, num_processes),
            start_new_session=True,
        )


def processes_of(run: Run) -> int:
    """How many processes train a run where nobody says it: 1 on CUDA, 2 on CPU."""
    return 1 if distributed.uses_cuda(run.recipe.config.train.device) else 2


def _command(run: Run, num_processes: int) -> list[str]:
    """A run as a user would start it, on a free port; with nothing to resume, auto begins anew."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_processes),
    ]
    return [
        sys.executable,
        *launcher,
        str(TRAIN_APP),
        str(run.recipe.folder / "recipe.yaml"),
        f"train.seed={run.seed}",
        f"train.run_dir={run.folder}",
        "train.resume=auto",
    ]


def _reason(run: Run, code: int) -> str:
    """Why an ended run failed, by the line of its log that tells it; "" when it did not."""
    try:
        if code == 0 and finished(run) is not None:
            return ""
    except ValueError as error:
        return str(error)
    text = run.log.read_text(encoding="utf-8", errors="replace")
    found = (re.findall(pattern, text, re.MULTILINE) for pattern in REASONS)
    return next((lines[-1].strip() for lines in found if lines), "it printed nothing")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends launchers, which end their processes."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()

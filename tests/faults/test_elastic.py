"""Processes that are killed: all start again, go on from the newest checkpoint and end as if undisturbed."""

import random
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.faults.launched import (
    ROOT,
    SETTINGS,
    TORCHRUN,
    TORCHX,
    Launched,
    figures,
    free_port,
    launched,
    num_rows,
    small_dataset,
    two_processes,
    wait_for,
)
from tests.faults.tries import Tries

EPOCHS = 20
# What a process does before it knows its settings, at most, beside other work.
START_S = 8.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = small_dataset(tmp_path_factory.mktemp("elastic") / "data")
    return [*SETTINGS, f"train.max_epochs={EPOCHS}", f"data.path={data}"]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [*TORCHRUN, *settings, f"train.run_dir={folder / 'run'}"]
    with launched(command, folder / "log") as one:
        assert one.wait() == 0, one.told()
    return folder / "run"


def kill_once(one: Launched, run: Path, chosen: random.Random) -> float | None:
    """Kills a random process at a random moment of the start, or of training and validation; when that was.

    None when the run had ended.
    """
    wait_for(lambda: len(one.ranks()) == 2)
    if chosen.random() < 0.3:
        time.sleep(chosen.uniform(0, START_S))
    else:
        epoch = chosen.randrange(EPOCHS - 1)
        wait_for(lambda: num_rows(run, "speed") > epoch or one.launcher.poll() is not None)
        time.sleep(chosen.uniform(0, 0.3))
    pid = one.kill(chosen.randrange(2))
    return time.monotonic() if pid else None


def has_recovered(
    command: list[str], undisturbed: Path, folder: Path, chosen: random.Random
) -> bool:
    """Whether a run that loses a process starts again by itself and ends as the undisturbed one."""
    for attempt in range(5):
        run = folder / f"run_{attempt}"
        with launched([*command, f"train.run_dir={run}"], folder / f"log_{attempt}") as one:
            if kill_once(one, run, chosen) is None:
                continue
            code = one.wait()
            assert "SIGKILL" in one.told() or "exitcode: -9" in one.told()
            is_held = code == 0 and figures(run) == figures(undisturbed)
            if not is_held:
                print(f"exit code {code}, {run}", one.told(), sep="\n")
                if code == 0:
                    print(figures(run), figures(undisturbed), sep="\n")
            return is_held
    raise AssertionError("the run was always over before a process was killed")


@pytest.mark.fault("R10")
def test_a_killed_process_restarts_all_and_the_run_ends_the_same(
    settings: list[str], undisturbed: Path, tmp_path: Path, tries: Tries
) -> None:
    tries.count(has_recovered([*TORCHX, *settings], undisturbed, tmp_path, random.Random(1)))


@pytest.mark.fault("R10")
def test_a_run_without_a_folder_goes_on_in_the_one_that_it_began(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    options = [one for one in settings[1:] if one != "train.resume=auto"]
    command = [*TORCHRUN, str(ROOT / settings[0]), *options]
    with launched(command, tmp_path / "log", tmp_path) as one:
        (run,) = wait_for(lambda: [*tmp_path.glob("runs/*")])
        wait_for(lambda: num_rows(run, "speed") > 3)
        assert one.kill(1) is not None
        assert one.wait() == 0, one.told()
    assert [*tmp_path.glob("runs/*")] == [run] and "resume: " in one.told()
    assert figures(run) == figures(undisturbed)


@pytest.mark.slow
@pytest.mark.fault("R10")
@pytest.mark.parametrize("launcher", [TORCHX, TORCHRUN], ids=["torchx", "torchrun"])
def test_killed_processes_restart_all_and_runs_end_the_same(
    launcher: tuple[str, ...],
    settings: list[str],
    undisturbed: Path,
    tmp_path: Path,
    tries: Tries,
) -> None:
    for number in range(20 if launcher == TORCHX else 10):
        (tmp_path / str(number)).mkdir()
        chosen = random.Random(100 + number)
        command = [*launcher, *settings]
        tries.count(has_recovered(command, undisturbed, tmp_path / str(number), chosen))


PROBE = """
import os, signal, sys, time
from pathlib import Path
import torch
from hstu_rec import distributed

attempt, rank = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ["RANK"]
Path(sys.argv[1], f"attempt_{attempt}_{rank}").touch()

def total():
    return distributed.all_reduce_sum(torch.ones(1)).item()

def main(arguments):
"""


def probe(folder: Path, body: str, is_app: bool = True) -> list[str]:
    """A script of its own, with that body of `main`, and its argument, the folder."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    end = "from hstu_rec.config import run_app; run_app(main)" if is_app else "main([])"
    (folder / "probe.py").write_text(f"{PROBE}{lines}\n{end}\n")
    return [str(folder / "probe.py"), str(folder)]


def attempts(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("attempt_*")}


@pytest.mark.slow
@pytest.mark.fault("R10")
@pytest.mark.parametrize("variable", ["0", "1"], ids=["shared store", "own store"])
def test_processes_that_come_first_do_not_wait_for_the_dead(variable: str, tmp_path: Path) -> None:
    # To where the addresses of the first attempt still are.
    script = probe(
        tmp_path,
        """
if attempt != "0" and rank == "0":
    time.sleep(2)
with distributed.process_group("cpu"):
    assert total() == 4
    if attempt == "0" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    assert total() == 4
""",
        is_app=False,
    )
    command = [*TORCHRUN[:2], "4", *TORCHRUN[3:], *script]
    with launched(command, tmp_path / "log", TORCH_DISABLE_SHARE_RDZV_TCP_STORE=variable) as one:
        assert one.wait() == 0, one.told()
    assert {name[:-2] for name in attempts(tmp_path)} == {"attempt_0", "attempt_1"}


@pytest.mark.slow
@pytest.mark.fault("R10")
def test_failures_are_tried_again_three_times_and_no_more(tmp_path: Path) -> None:
    script = probe(tmp_path, "raise OSError('a disk that comes and goes')")
    with launched([*TORCHRUN, *script], tmp_path / "log") as one:
        assert one.wait() != 0
    assert {name[:-2] for name in attempts(tmp_path)} == {f"attempt_{n}" for n in range(4)}


@pytest.mark.parametrize("who", ["all", "rank 1"])
def test_a_mistake_is_not_tried_again(who: str, tmp_path: Path) -> None:
    script = probe(
        tmp_path,
        f"""
with distributed.process_group("cpu"):
    total()
    if {who == "all"} or rank == "1":
        raise ValueError("lr must be above 0; got -1")
    total()
""",
    )
    with launched([*TORCHRUN, *script], tmp_path / "log") as one:
        assert one.wait() != 0
    assert "error: lr must be above 0; got -1\n" in one.told()
    assert one.told().count("lr must be above 0") <= 2
    assert {name[:-2] for name in attempts(tmp_path)} == {"attempt_0"}


FAILURES = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, 75, "and tells why itself"),
    "mistake": (
        "raise ValueError('of rank 1')",
        2,
        2,
        f"error: process 1 of 2 on {socket.gethostname()} has ended: of rank 1\n",
    ),
    "other": (
        "raise OSError('of rank 1')",
        1,
        75,
        f"error: process 1 of 2 on {socket.gethostname()} has ended: OSError: of rank 1\n",
    ),
    "after a while": ("time.sleep(2)\n        os._exit(5)", 5, 75, "and tells why itself"),
}


@pytest.mark.fault("R11")
@pytest.mark.parametrize("failure", FAILURES)
def test_who_waits_for_a_process_that_ends_tells_so_and_ends(failure: str, tmp_path: Path) -> None:
    how, own_code, code, sentence = FAILURES[failure]
    script = probe(
        tmp_path,
        f"""
with distributed.process_group("cpu"):
    total()
    if rank == "1":
        {how}
    total()
""",
    )
    with two_processes(script, tmp_path / "log", free_port()) as (waiting, failing):
        assert failing.wait() == own_code, failing.told()
        ended_at = time.monotonic()
        assert waiting.wait(60) == code, waiting.told()
        assert time.monotonic() - ended_at < 10
    assert sentence in waiting.told()
    assert "Traceback" not in waiting.told()

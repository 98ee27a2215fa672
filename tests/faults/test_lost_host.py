"""A host of two that is lost in the middle of training: agent and processes, all at once."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.launched import (
    MARK,
    SETTINGS,
    Launched,
    figures,
    launched,
    num_rows,
    small_dataset,
    variables_of,
    wait_for,
)
from tests.test_machines import WHY_NOT, job_of_two_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fault("R10"),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "can be made"),
]
# A host that has lost its processes waits to be told whether it starts them again.
SUPERVISE = """
"$@" && exit 0
code=$?
[ $NAME = $LOST ] || exit $code
until [ -e $FOLDER/again ]; do sleep 0.05; done
[ -s $FOLDER/again ] && exec "$@"
exit $code
"""


def lose(one: Launched, host: str) -> None:
    """Kills torchrun and its processes on that host, first torchrun."""
    found = {int(folder.name) for folder in Path("/proc").glob("[0-9]*")}
    variables = {pid: variables_of(pid) for pid in found}
    own = [p for p, v in variables.items() if v.get(MARK) == one.mark and v.get("NAME") == host]
    agents = [pid for pid in own if b"torchrun" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    shells = [p for p in agents if b"bash" in Path(f"/proc/{p}/cmdline").read_bytes()[:20]]
    workers = [pid for pid in own if "RANK" in variables[pid]]
    for pid in [*(set(agents) - set(shells)), *workers]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = small_dataset(tmp_path_factory.mktemp("hosts") / "data")
    return [*SETTINGS, "train.max_epochs=40", f"data.path={data}"]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    command = ["torchrun", "--nproc-per-node", "2", *settings, f"train.run_dir={folder / 'run'}"]
    with launched(command, folder / "log") as one:
        assert one.wait() == 0, one.told()
    return folder / "run"


def disturbed(
    settings: list[str], folder: Path, lost: str, num_hosts: str, is_back: bool
) -> tuple[Path, float]:
    """The folder of a run that loses the host `lost`, which comes back or not, and how long after it ended.

    The hosts meet at the other one.
    """
    run, stays = folder / "run", {"first": "second", "second": "first"}[lost]
    (folder / "supervise.sh").write_text(SUPERVISE)
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{stays}:29500", "--rdzv-id", "7"]
    torchrun = ["torchrun", "--nnodes", num_hosts, "--nproc-per-node", "1", *meeting]
    torchrun += ["--max-restarts", "3", *settings, f"train.run_dir={run}"]
    job, needed = job_of_two_hosts(folder, "bash", str(folder / "supervise.sh"), *torchrun)
    needed |= {"LOST": lost, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with launched(job, folder / "log", **needed) as one:
        wait_for(lambda: num_rows(run, "speed") > 3 or one.launcher.poll() is not None)
        lose(one, lost)
        lost_at = time.monotonic()
        if is_back:
            (folder / "again").write_text("yes")
        wait_for(lambda: (run / "result.json").exists() or one.launcher.poll() is not None)
        taken_s = time.monotonic() - lost_at
        (folder / "again").touch()
        code = one.wait()
        told = (folder / f"out_{stays}").read_text()
        assert (code == 0) == is_back, told
        assert "another process of this run has ended" in told
    return run, taken_s


@pytest.mark.parametrize("lost", ["second", "first"])
def test_a_host_that_comes_back_is_taken_in_and_the_run_ends_the_same(
    lost: str, settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run, taken_s = disturbed(settings, tmp_path, lost, "2", is_back=True)
    assert figures(run) == figures(undisturbed)
    print(f"{taken_s:.0f} s")


def test_the_host_that_is_left_goes_on_alone(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run, taken_s = disturbed(settings, tmp_path, "second", "1:2", is_back=False)
    found, expected = figures(run), figures(undisturbed)
    for part in ("seen_masked", "seen_allowed"):
        assert found["test"][part] == pytest.approx(expected["test"][part], abs=1e-5)
    print(f"{taken_s:.0f} s")

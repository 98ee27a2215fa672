"""A host of two that is lost in the middle of training: agent and processes, all at once."""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.launched import (
    SETTINGS,
    Launched,
    figures,
    launched,
    num_rows,
    small_dataset,
    wait_for,
)
from tests.test_machines import WHY_NOT, job_of_two_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fault("R10"),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "can be made"),
]
# The host that loses its processes starts them again when it is told to; it and its cable stay there until
# the other has ended.
SUPERVISE = """
code=0
"$@" || code=$?
[ $NAME = $LOST ] || { touch $FOLDER/done; exit $code; }
until [ $code = 0 -o -e $FOLDER/again -o -e $FOLDER/done ]; do sleep 0.05; done
[ $code = 0 -o -e $FOLDER/done ] || exec "$@"
exit $code
"""


def lose(one: Launched, host: str) -> None:
    """Kills torchrun and its processes on that host, first torchrun."""
    variables = one.processes()
    own = [pid for pid, of in variables.items() if of.get("NAME") == host]
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


def disturbed(settings: list[str], folder: Path, lost: str, num_hosts: str, is_back: bool) -> Path:
    """The folder of a run that loses the host `lost`, which comes back or not.

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
        if is_back:
            (folder / "again").touch()
        wait_for((folder / "done").exists)
        code = one.wait()
        told = (folder / f"out_{stays}").read_text()
        assert (code == 0) == is_back, told
        assert "another process of this run has ended" in told
    return run


@pytest.mark.parametrize("lost", ["second", "first"])
def test_a_host_that_comes_back_is_taken_in_and_the_run_ends_the_same(
    lost: str, settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = disturbed(settings, tmp_path, lost, "2", is_back=True)
    assert figures(run) == figures(undisturbed)


def losses(run: Path) -> dict[int, float]:
    """The training loss by step, of a run that may have taken steps again."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def test_the_host_that_is_left_goes_on_alone(settings: list[str], tmp_path: Path) -> None:
    # Each process drops out its own; all else is the same at any number of them, but for rounding.
    settings = [*settings, "encoder.dropout=0", "train.max_epochs=12"]
    run = disturbed(settings, tmp_path, "second", "1:2", is_back=False)
    alone = tmp_path / "alone"
    with launched([sys.executable, *settings, f"train.run_dir={alone}"], tmp_path / "log") as one:
        assert one.wait() == 0, one.told()
    assert json.loads((run / "result.json").read_text())["timing"]["processes"] == 1
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    for part in ("seen_masked", "seen_allowed"):
        found, expected = (figures(one)["test"][part] for one in (run, alone))
        assert found == pytest.approx(expected, abs=1e-5)

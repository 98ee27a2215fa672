"""Faults while a checkpoint is written: the process killed, the disk full, files damaged."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hstu_rec import checkpoint
from hstu_rec.durable import write_file
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
NUM_ROWS = 60_000


def table_of(step):
    """16 MB that tell the step they are of."""
    return torch.full((NUM_ROWS, 64), float(step))


def save_for_ever(root, seed):
    """Saves step after step beside work, and tells of each that is through, until it is killed."""
    torch.set_num_threads(1)
    with checkpoint.Saver(root, checkpoint.CheckpointConfig(keep=2)) as saver:
        step = 0
        while True:
            step += 1
            saver.save(step, {"table": table_of(step)}, {"step": step})
            (root / f"begun_{step}").touch()
            if random.Random(seed + step).random() < 0.5:
                saver.wait()
                write_file(root.with_suffix(".durable"), str(step).encode())


@pytest.mark.fault("R5")
def test_a_kill_at_any_moment_leaves_the_newest_complete_checkpoint(tmp_path, tries):
    # Forked from a process that has imported what is needed: an import takes longer than twenty tries.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hstu_rec.checkpoint", "tests.faults.test_saving"])
    moments = random.Random(20)
    for number in range(20):
        root = tmp_path / str(number)
        root.mkdir()
        process = context.Process(target=save_for_ever, args=(root, number))
        process.start()
        wait_for(root / "begun_3")
        time.sleep(moments.uniform(0, 0.4))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        through = root.with_suffix(".durable")
        durable = int(through.read_text()) if through.exists() else 1
        path, skipped = checkpoint.newest(root)
        is_held = path is not None and skipped == []
        if path is not None:
            state = {"table": torch.empty(NUM_ROWS, 64)}
            step = checkpoint.load(path, state)["step"]
            is_held &= step >= durable and torch.equal(state["table"], table_of(step))
            # The pointer names a whole one too, and the next save clears what is left.
            is_held &= checkpoint.resolve(root, "last").name in (path.name, f"step_{step - 1:08d}")
            (root / "last.tmp").touch()  # as a kill while the pointer moves leaves it
            with checkpoint.Saver(root, checkpoint.CheckpointConfig(keep=2)) as saver:
                saver.save(step + 1, state, {"step": step + 1})
            is_held &= not list(root.glob("*.tmp"))
        tries.count(is_held)


def wait_for(path, within_s=120.0):
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.001)


# A file system of 12 MB, of whoever may make one.
MOUNT = """
mount -t tmpfs -o size=12m none "$1" || exit 77
exec "$2" -W ignore -c "$3" "$1"
"""
FILL = """
import shutil
import sys
from pathlib import Path
import torch
from hstu_rec import checkpoint
from hstu_rec.durable import write_file
root = Path(sys.argv[1]) / "checkpoints"
state = {"table": torch.ones(20_000, 64)}  # 5 MB: two fit, three do not
for in_background in (True, False):
    shutil.rmtree(root, ignore_errors=True)
    config = checkpoint.CheckpointConfig(keep=2, in_background=in_background)
    with checkpoint.Saver(root, config) as saver:
        for step in (1, 2):
            saver.save(step, state, {"step": step})
        try:
            saver.save(3, state, {"step": 3})
            saver.wait()
        except checkpoint.CheckpointError as error:
            assert "No space left" in str(error), error
        else:
            raise AssertionError("the disk was not full")
        path, skipped = checkpoint.newest(root)
        assert path == root / "step_00000002" and skipped == [], (path, skipped)
        assert checkpoint.load(path, {"table": torch.zeros(20_000, 64)}) == {"step": 2}
        assert checkpoint.resolve(root, "last") == path
        assert sorted(one.name for one in root.iterdir()) == ["last", "step_00000001", "step_00000002"]
        for one in (root / "step_00000001").iterdir():
            one.unlink()
        (root / "step_00000001").rmdir()
        saver.save(3, state, {"step": 3})  # once there is room again
print("held")
"""


@pytest.mark.fault("R7")
def test_a_full_disk_keeps_the_former_checkpoint_and_is_told(tmp_path):
    inside = ["sh", "-c", MOUNT, "sh", str(tmp_path), sys.executable, FILL]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *inside],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be made here: {done.stderr.strip()}")
    assert done.returncode == 0 and done.stdout == "held\n", done.stderr


def fail_on_one_rank(root):
    """A write that fails on rank 1 alone, in the background."""
    config = checkpoint.CheckpointConfig()
    state = {"table": torch.zeros(8, 2)}
    with checkpoint.Saver(root, config) as saver:
        saver.save(1, state, {})
        saver.wait()
        write = checkpoint.storage.StorageWriter.write_data

        def no_space(writer, *arguments):
            if torch.distributed.get_rank() == 1:
                raise OSError(28, "No space left on device")
            return write(writer, *arguments)

        checkpoint.storage.StorageWriter.write_data = no_space
        saver.save(2, state, {})
        with pytest.raises(checkpoint.CheckpointError, match="No space left") as raised:
            saver.save(3, state, {})
        checkpoint.storage.StorageWriter.write_data = write
        saver.save(3, state, {})
    return str(raised.value), checkpoint.newest(root)[0]


@pytest.mark.fault("R7")
def test_a_write_that_fails_on_one_rank_is_told_by_all_and_the_next_one_is_saved(tmp_path):
    (first, path), (second, _) = run_ranks(2, fail_on_one_rank, tmp_path)
    assert first == second and "rank 1" in first
    assert path == tmp_path / "step_00000003"

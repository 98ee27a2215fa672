"""Checkpoints: equal at any number of ranks, complete or absent, damage found and named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hstu_rec import checkpoint
from hstu_rec.checkpoint import CheckpointError, folder, storage
from tests.ranks import run_ranks

NUM_ROWS, DIM = 5, 3  # 5 rows: uneven at 2 and 3 ranks, an empty rank at 4


def full_state(step=0):
    return {
        "table": torch.arange(NUM_ROWS * DIM, dtype=torch.float32).view(NUM_ROWS, DIM) + step,
        "dense": {"weight": torch.linspace(0, 1, 5) + step, "moment": torch.tensor(step + 0.5)},
        "count": torch.tensor([step], dtype=torch.int64),
    }


def sharded(state):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {**state, "table": distribute_tensor(state["table"], mesh, [Shard(0)])}


def zeros():
    state = full_state()
    return {
        "table": torch.zeros_like(state["table"]),
        "dense": {name: torch.zeros_like(value) for name, value in state["dense"].items()},
        "count": torch.zeros_like(state["count"]),
    }


def assert_equal(state, expected):
    assert torch.equal(state["table"], expected["table"])
    assert torch.equal(state["dense"]["weight"], expected["dense"]["weight"])
    assert torch.equal(state["dense"]["moment"], expected["dense"]["moment"])
    assert torch.equal(state["count"], expected["count"])


def as_lists(state):
    return {
        name: as_lists(value) if isinstance(value, dict) else value.tolist()
        for name, value in state.items()
    }


def save_steps(root, steps):
    """Plain tensors, one process."""
    return [checkpoint.save(root, step, full_state(step), {"step": step}) for step in steps]


def save_on_ranks(root, step):
    return checkpoint.save(root, step, sharded(full_state(step)), {"epoch": 2, "best": None})


def load_on_ranks(path):
    state = sharded(zeros())
    meta = checkpoint.load(path, state)
    table = state["table"]
    assert isinstance(table, DTensor)
    return as_lists({**state, "table": table.full_tensor()}), meta


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    paths = run_ranks(2, save_on_ranks, root, 12)
    assert paths == [root / "step_00000012"] * 2
    return paths[0]


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_what_two_ranks_saved_is_equal_at_other_numbers_of_ranks(saved_by_two, world_size):
    for state, meta in run_ranks(world_size, load_on_ranks, saved_by_two):
        assert state == as_lists(full_state(12))
        assert meta == {"epoch": 2, "best": None}


def test_a_sharded_checkpoint_loads_without_a_process_group(saved_by_two):
    state = zeros()
    checkpoint.load(saved_by_two, state)
    assert_equal(state, full_state(12))


def load_damaged_on_ranks(root):
    try:
        checkpoint.load(root / "step_00000012", sharded(zeros()))
    except CheckpointError as error:
        return str(error), checkpoint.newest(root)
    return "loaded", checkpoint.newest(root)


def test_all_ranks_refuse_a_damaged_checkpoint_together(saved_by_two, tmp_path):
    shutil.copytree(saved_by_two, tmp_path / "step_00000012")
    flip_bit(tmp_path / "step_00000012" / "__1_0.distcp")
    first, *others = run_ranks(3, load_damaged_on_ranks, tmp_path)
    assert "__1_0.distcp" in first[0] and first[1][0] is None
    assert others == [first, first]


def refuse_on_ranks(root):
    state = {"only on 1": torch.zeros(1)} if dist.get_rank() == 1 else {"only on 0": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"other keys"):
        checkpoint.save(root, 1, state, {})
    with pytest.raises(CheckpointError, match=r"meta must be plain JSON"):
        checkpoint.save(root, 1, {"a": torch.zeros(1)}, {"best": float("-inf")})
    with pytest.raises(CheckpointError, match=r"no pointer 'best'"):
        checkpoint.resolve(root, "best")
    return checkpoint.newest(root)


def test_a_failure_on_one_rank_is_raised_on_all_and_none_waits_for_ever(tmp_path):
    assert run_ranks(2, refuse_on_ranks, tmp_path) == [(None, [])] * 2


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.fault("R6")
@pytest.mark.parametrize("damage", [flip_bit, truncate, os.remove])
@pytest.mark.parametrize("name", ["__0_0.distcp", "tensors.json", "meta.json", "manifest.json"])
def test_damage_is_named_and_the_older_checkpoint_is_used(tmp_path, name, damage):
    older, newer = save_steps(tmp_path, [10, 20])
    assert checkpoint.newest(tmp_path) == (newer, [])
    damage(newer / name)
    path, skipped = checkpoint.newest(tmp_path)
    assert path == older and len(skipped) == 1
    # A flipped bit inside the manifest may as well accuse the file it describes.
    assert "step_00000020" in skipped[0]
    assert name in skipped[0] or (name == "manifest.json" and damage is flip_bit)
    state = zeros()
    with pytest.raises(CheckpointError, match=r"damaged"):
        checkpoint.load(newer, state)
    assert_equal(state, zeros())


def test_a_leftover_of_a_killed_save_is_ignored_then_removed(tmp_path):
    (path,) = save_steps(tmp_path, [10])
    shutil.copytree(path, tmp_path / "step_00000020.tmp")
    assert checkpoint.newest(tmp_path) == (path, [])
    checkpoint.purge(tmp_path, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000010"]


def test_a_step_saved_again_replaces_the_former_one(tmp_path):
    (path,) = save_steps(tmp_path, [10])
    again = checkpoint.save(tmp_path, 10, full_state(99), {"step": 99})
    state = zeros()
    assert again == path and checkpoint.load(path, state) == {"step": 99}
    assert_equal(state, full_state(99))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_replacement_cut_short_leaves_the_former_one_in_use(tmp_path):
    (path,) = save_steps(tmp_path, [10])
    checkpoint.point(tmp_path, "last", path)
    former = path.with_name(path.name + ".old")
    path.rename(former)  # the kill came between the two renames
    assert checkpoint.newest(tmp_path) == (former, [])
    assert checkpoint.resolve(tmp_path, "last") == former
    checkpoint.purge(tmp_path, 0)
    assert checkpoint.load(former, zeros()) == {"step": 10}
    save_steps(tmp_path, [10])
    assert checkpoint.newest(tmp_path) == (path, []) and not former.exists()


def test_a_replacement_that_fails_at_its_last_move_keeps_the_former_one(tmp_path, monkeypatch):
    (path,) = save_steps(tmp_path, [10])
    rename = os.rename

    def fail_into_place(source, target):
        if target == path:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(folder.os, "rename", fail_into_place)
    with pytest.raises(CheckpointError, match=r"Input/output error"):
        checkpoint.save(tmp_path, 10, full_state(99), {"step": 99})
    kept, skipped = checkpoint.newest(tmp_path)
    assert kept is not None and skipped == []
    assert checkpoint.load(kept, zeros()) == {"step": 10}


def test_a_save_that_fails_keeps_the_former_checkpoint_and_leaves_nothing(tmp_path, monkeypatch):
    (path,) = save_steps(tmp_path, [10])

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.StorageWriter, "write_data", no_space)
    with pytest.raises(CheckpointError, match=r"No space left"):
        save_steps(tmp_path, [10])
    assert checkpoint.newest(tmp_path) == (path, [])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_pointers_move_and_protect_what_they_name(tmp_path):
    paths = save_steps(tmp_path, [10, 20, 30, 40])
    checkpoint.point(tmp_path, "best", paths[2])
    checkpoint.point(tmp_path, "best", paths[0])
    checkpoint.point(tmp_path, "last", paths[3])
    assert checkpoint.resolve(tmp_path, "best") == paths[0]
    checkpoint.purge(tmp_path, 2)
    assert not paths[1].exists() and all(paths[i].exists() for i in (0, 2, 3))
    checkpoint.purge(tmp_path, 1)
    assert not paths[2].exists() and paths[0].exists() and paths[3].exists()


def test_a_pointer_needs_a_complete_checkpoint(tmp_path):
    save_steps(tmp_path, [10])
    with pytest.raises(CheckpointError, match=r"complete checkpoint"):
        checkpoint.point(tmp_path, "best", tmp_path / "step_00000011")
    with pytest.raises(CheckpointError, match=r"lower case"):
        checkpoint.point(tmp_path, "../best", tmp_path / "step_00000010")
    with pytest.raises(CheckpointError, match=r"no pointer 'best'"):
        checkpoint.resolve(tmp_path, "best")


def without_moment(state):
    del state["dense"]["moment"]


def with_another_key(state):
    state["dense"]["second"] = torch.zeros(2)


def with_another_shape(state):
    state["table"] = torch.zeros(NUM_ROWS + 1, DIM)


def with_another_dtype(state):
    state["table"] = state["table"].double()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_moment, "'dense/moment' is in the checkpoint but not in the state"),
        (with_another_key, "'dense/second' is not in the checkpoint"),
        (with_another_shape, "'table' was saved as"),
        (with_another_dtype, "'table' was saved as"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_untouched(tmp_path, change, named):
    (path,) = save_steps(tmp_path, [10])
    state = zeros()
    change(state)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.load(path, state)
    assert not state["count"].any() and not state["dense"]["weight"].any()


def test_a_state_holds_tensors_only(tmp_path):
    with pytest.raises(CheckpointError, match=r"'optimizer/lr' is a float.*meta"):
        checkpoint.save(tmp_path, 1, {"optimizer": {"lr": 0.1}}, {})


def test_the_manifest_lists_every_other_file(tmp_path):
    (path,) = save_steps(tmp_path, [10])
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {entry.name for entry in path.iterdir()} - {"manifest.json"}


SAVE_FOR_EVER = """
import itertools, sys
from pathlib import Path
import torch
from hstu_rec import checkpoint
for step in itertools.count(1):
    table = torch.full((20000, 16), float(step % 3))
    checkpoint.save(Path(sys.argv[1]), step % 3, {"table": table}, {"value": step % 3})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SAVE_FOR_EVER, str(tmp_path)]
    for delay_s in (0.003, 0.011, 0.023, 0.037):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(4):
                assert process.stdout.readline()
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
        path, skipped = checkpoint.newest(tmp_path)
        assert path is not None and skipped == []
        state = {"table": torch.empty(20000, 16)}
        meta = checkpoint.load(path, state)
        assert torch.equal(state["table"], torch.full((20000, 16), float(meta["value"])))

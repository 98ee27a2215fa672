"""What processes that this one launches are given, and what they have in common."""

import os
from pathlib import Path

import pytest
import torch

from hstu_rec import distributed, hosts
from hstu_rec.meeting import is_mistake
from hstu_rec.transfer import sent


@pytest.mark.parametrize(
    ("seen", "num_processes", "expected"),
    [
        (None, 1, ["0", "1", "2", "0"]),
        (None, 2, ["0,1", "2,0", "1,2", "0,1"]),
        ("5,7", 1, ["5", "7", "5", "7"]),
        ("5,7", 3, ["5,7", "7,5", "5,7", "7,5"]),
    ],
)
def test_runs_at_a_time_are_dealt_to_the_gpus(
    seen: str | None, num_processes: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 3)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    found = [distributed.environment_of(slot, num_processes) for slot in range(4)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == expected
    assert all(one["PATH"] == os.environ["PATH"] for one in found)


def test_tensors_sent_as_one_are_the_same() -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(6).view(2, 3).T,
        torch.tensor(2.5),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.arange(5, dtype=torch.int32),
        torch.randn(3, 2, dtype=torch.float64),
    ]
    moved = sent(tensors, torch.device("cpu"))
    for copy, tensor in zip(moved, tensors, strict=True):
        assert copy.dtype == tensor.dtype and copy is not tensor
        assert copy.shape == tensor.shape and torch.equal(copy, tensor)


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_made_names_its_key(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    told = f"train.run_dir {tmp_path / name} cannot be made .*; give a folder where this user may write"
    with pytest.raises(NotADirectoryError, match=told) as caught:
        hosts.make_shared(tmp_path / name, "train.run_dir")
    assert is_mistake(caught.value)

"""What processes that this one launches are given."""

import os

import pytest

from hstu_rec import distributed


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

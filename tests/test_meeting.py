"""Where the processes of an attempt meet: on one store, attempt after attempt, here each a thread."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from hstu_rec.meeting import MISTAKES, Meeting, PeerLost

TIMEOUT = timedelta(seconds=20)
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1")


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)


def met(store: dist.TCPStore, world_size: int, late: int | None = None) -> list[Meeting]:
    """What the processes of an attempt get, one of which may come late."""

    def meet(rank: int) -> Meeting:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=TIMEOUT)
        time.sleep(0.3 * (rank == late))
        return Meeting(own, rank, world_size, TIMEOUT)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(meet, range(world_size)))


@pytest.mark.fault("R10")
@pytest.mark.parametrize("late", [0, 1, 3])
def test_processes_of_an_attempt_never_read_what_those_before_wrote(
    store: dist.TCPStore, late: int
) -> None:
    for attempt in range(3):
        meetings = met(store, 4, late)
        assert not any(one.store.check(["address"]) for one in meetings)
        meetings[0].store.set("address", str(attempt))
        assert [one.store.get("address") for one in meetings] == [str(attempt).encode()] * 4


@pytest.mark.fault("R10")
def test_the_greeting_of_a_dead_process_is_passed_over(store: dist.TCPStore) -> None:
    for dead in range(3):
        store.set(f"hello/{dead}", "left")
        store.set("welcome/left", "nowhere")
    first, second = met(store, 2, late=1)
    first.store.set("a", "b")
    assert second.store.get("a") == b"b"


def test_fewer_processes_meet_after_more(store: dist.TCPStore) -> None:
    met(store, 4)
    assert [one.world_size for one in met(store, 2)] == [2, 2]


def test_a_process_that_does_not_come_is_named(store: dist.TCPStore) -> None:
    with pytest.raises(dist.DistStoreError, match=r"processes \[1\] of 2 did not come"):
        Meeting(store, 0, 2, timedelta(seconds=0.2))


def test_the_first_failure_is_what_others_are_told(store: dist.TCPStore) -> None:
    first, second, third = met(store, 3)
    mistake, later = ValueError("lr must be above 0"), ValueError("later")
    assert second.explained(mistake) is mistake
    assert third.explained(later) is later
    told = first.explained(CLOSED)
    assert isinstance(told, MISTAKES)
    assert str(told).startswith("process 1 of 3 on ")
    assert str(told).endswith(" has ended: lr must be above 0")


def test_who_is_left_without_a_word_may_be_started_again(store: dist.TCPStore) -> None:
    (first, second) = met(store, 2)
    lost = first.explained(CLOSED)
    assert isinstance(lost, PeerLost) and not isinstance(lost, MISTAKES)
    assert "Connection closed by peer" in str(lost)
    # It failed because of another, and is no cause itself.
    assert isinstance(second.explained(CLOSED), PeerLost)


def test_one_process_is_the_first(store: dist.TCPStore) -> None:
    (first, second) = met(store, 2)
    assert second.is_first("a", False)
    assert not first.is_first("a", True)
    assert first.is_first("b", False)

"""One run at a time in a folder."""

import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from hstu_rec import distributed, hosts

LOCK = ".lock"
# A process that was killed may take so long to end; one on a host that is gone, until its file system knows.
WAIT_S, WAIT_OF_SAME_JOB_S = 5.0, 120.0


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder` while the block runs. Collective.

    Process 0 locks a file in it, and the system unlocks that when the process ends, however it does. Raises
    RankError on all processes where a run of another job has the folder.
    """
    held: list[IO[str]] = []
    hosts.on_main(lambda: held.append(_locked(folder)))
    try:
        yield
    finally:
        for file in held:
            file.close()


def folder_of(job: str, root: Path) -> Path | None:
    """The newest of the runs' folders in `root` that a launcher's job has begun, None when there is none."""
    begun = [
        (path.stat().st_mtime, path.parent)
        for path in root.glob(f"*/{LOCK}")
        if _owner(path).get("job") == job
    ]
    return max(begun)[1] if begun else None


def _locked(folder: Path) -> IO[str]:
    path, job = folder / LOCK, distributed.job()
    file = path.open("a+", encoding="utf-8")
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = _owner(path)
            is_same = job is not None and owner.get("job") == job
            if time.monotonic() - began > (WAIT_OF_SAME_JOB_S if is_same else WAIT_S):
                file.close()
                raise ValueError(_refusal(folder, owner)) from None
            time.sleep(0.1)
        except OSError as error:
            warnings.warn(
                f"{folder} is on a file system without locks ({error}): nothing keeps a second run out of it",
                stacklevel=2,
            )
            break
    file.truncate(0)
    began_at = datetime.now(UTC).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": began_at, "job": job}
    file.write(json.dumps(owner))
    file.flush()
    return file


def _owner(path: Path) -> dict[str, Any]:
    """What the run that has, or had, the folder wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is just being written
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(folder: Path, owner: dict[str, Any]) -> str:
    who = "another process"
    if owner:
        who = f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}"
    return (
        f"train.run_dir {folder} is that of a run that still goes on ({who}); wait for its end, end it "
        "(SIGTERM: it saves), or give another folder"
    )

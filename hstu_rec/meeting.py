"""Where the processes of one attempt meet, apart from those of attempts before it, and tell of failures.

torchrun starts the processes of a failed attempt again beside a store that still holds what those before
wrote: one that comes first would read the addresses of the dead.
"""

import json
import socket
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistError, DistStoreError

# What would come again: the user's to mend, not the launcher's.
MISTAKES = (
    ValueError, FloatingPointError, ImportError,
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
FAILURE = "failure"
POLL_S = 0.02


class PeerLost(RuntimeError):
    """Another process has ended, or is out of reach; started again, the run may go on."""


def is_mistake(error: BaseException) -> bool:
    """Whether an error would come again, until the user mends something."""
    return isinstance(error, MISTAKES) and not getattr(error, "is_of_system", False)


class Meeting:
    """The processes of one attempt, and a part of a store that they alone write to.

        rank r    hello/r = a name of its own      waits for welcome/<name>      session/r
        rank 0    welcome/<hello/r> = session, again and again, until session/r is there

    A name that was left by a dead process is welcomed in vain; a rank 0 that is dead answers no new name.
    Collective. Raises DistStoreError when a process does not come within `timeout`.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
        self.rank, self.world_size = rank, world_size
        if rank:
            name = uuid.uuid4().hex
            store.set(f"hello/{rank}", name)
            store.wait([f"welcome/{name}"], timeout)
            self.store = PrefixStore(store.get(f"welcome/{name}").decode(), store)
            self.store.set(str(rank), "")
        else:
            session = uuid.uuid4().hex
            self.store = PrefixStore(session, store)
            self._welcome(store, session, timeout)

    def _welcome(self, store: Store, session: str, timeout: timedelta) -> None:
        missing = list(range(1, self.world_size))
        deadline = time.monotonic() + timeout.total_seconds()
        while missing:
            for other in missing:
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", session)
            time.sleep(POLL_S)
            missing = [other for other in missing if not self.store.check([str(other)])]
            if missing and time.monotonic() > deadline:
                raise DistStoreError(
                    f"processes {missing} of {self.world_size} did not come within {timeout}"
                )

    def explained(self, error: Exception) -> Exception:
        """`error` itself, which others are told of, if it is this process's own; else what another told, a
        ValueError where that was a mistake, or PeerLost."""
        if isinstance(error, PeerLost):
            return error
        is_own = not is_of_peer(error)
        try:
            if self.store.check([FAILURE]):
                failure = json.loads(self.store.get(FAILURE))
            elif is_own:
                self._tell(error)
                return error
            else:
                failure = None
        except RuntimeError:  # the store was of a process that has ended
            failure = None
        if is_own:
            return error
        if failure is None:
            reason = str(error).strip().partition("\n")[0]
            return PeerLost(
                "another process of this run has ended, and tells why itself, or is out of reach; "
                f"started again, the run may go on ({reason})"
            )
        told = f"process {failure['rank']} of {self.world_size} on {failure['host']} has ended: "
        return (ValueError if failure["is_mistake"] else PeerLost)(told + failure["sentence"])

    def is_first(self, what: str, otherwise: bool) -> bool:
        """True in the first process that asks for `what`; `otherwise` where there is no store any more."""
        try:
            return self.store.add(what, 1) == 1
        except RuntimeError:
            return otherwise

    def _tell(self, error: Exception) -> None:
        would_return = is_mistake(error)
        failure = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "is_mistake": would_return,
            "sentence": str(error) if would_return else f"{type(error).__name__}: {error}",
        }
        self.store.set(FAILURE, json.dumps(failure))


def is_of_peer(error: Exception) -> bool:
    """Whether an error comes of a process that was waited for in vain."""
    # Gloo's errors have no class of their own.
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )

"""Being asked to stop: SIGTERM of a scheduler or launcher, Ctrl-C."""

import signal
import threading
import time
from types import FrameType
from typing import Any

# Exit codes of a run that was asked to stop: sysexits.h's "try again", and the shell's of Ctrl-C.
RETRY_CODE, INTERRUPTED_CODE = 75, 128 + signal.SIGINT
# torchrun passes on a Ctrl-C that its processes have had from the terminal already.
SAME_INTERRUPT_S = 2.0


class Stopped(Exception):
    """A run that was asked to stop has saved where it stands; raised on all ranks together."""

    def __init__(self, message: str, by: int | None) -> None:
        super().__init__(message)
        self.exit_code = INTERRUPTED_CODE if by == signal.SIGINT else RETRY_CODE


class StopRequest:
    """Whether this process was asked to stop, since `with` began; a second Ctrl-C interrupts at once.

    Only the main thread can be told of signals; elsewhere, as in a notebook's thread, it never is.
    """

    def __init__(self) -> None:
        self.by: int | None = None
        self._interrupted_at: float | None = None
        self._former: dict[int, Any] = {}

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self.by is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now > self._interrupted_at + SAME_INTERRUPT_S:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        self.by = self.by or number

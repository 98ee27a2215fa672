"""What a run tells while it works: metrics.jsonl, TensorBoard and services, a progress bar, lines of text.

    runs/<name>/metrics.jsonl      {"kind": "train", "step": 40, "time_s": 12.7, "loss": 8.31}
    runs/<name>/tensorboard/       scalars named kind/name, e.g. train/loss

Only rank 0 writes and prints. A resumed run appends: `read_metrics` keeps the newest row of each
(kind, step), so that steps done twice count once.
"""

import json
import math
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hstu_rec import trackers
from hstu_rec.signals import Stopped
from hstu_rec.trackers import TrackingConfig

METRICS_FILE = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 10.0
RESERVED = frozenset({"kind", "step", "time_s"})


class Tracker:
    """The record of one run in `folder`; on ranks other than 0 every method does nothing.

    `time_s` in the rows is seconds since this tracker was made (a resumed run starts at 0 again).
    """

    def __init__(self, folder: Path, is_main: bool, config: TrackingConfig | None = None) -> None:
        self._is_main, self._config = is_main, config or TrackingConfig()
        self._senders: list[trackers.Sender] = []
        self._summary: dict[str, float] = {}
        self._folder = folder
        self._began_at = time.monotonic()
        self._tensorboard: _EventFile | None = None
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(folder / METRICS_FILE)
            self._last_known_step = max((row["step"] for row in read_metrics(folder)), default=-1)
            self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        """Begins, or goes on with, the run in the services that are asked for. Raises ValueError."""
        if self._is_main:
            about = trackers.About(name, self._folder, self._config.project, settings)
            self._senders = trackers.begin(self._config.to, about)

    def summarise(self, values: Mapping[str, float]) -> None:
        """Keeps final figures, which services are told at the end."""
        self._summary |= values

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Appends one row and adds the scalars `kind/name` to TensorBoard and to services.

        `values` are plain numbers. JSON has no NaN or infinity: they become null.
        """
        if not self._is_main:
            return
        if clash := RESERVED & values.keys():
            raise ValueError(f"{sorted(clash)} cannot name a value of a metrics row; rename it")
        numbers = {name: _as_number(value) for name, value in values.items()}
        time_s = round(time.monotonic() - self._began_at, 3)
        row = {"kind": kind, "step": step, "time_s": time_s, **numbers}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        scalars = {f"{kind}/{name}": value for name, value in values.items()}
        for sender in self._senders:
            sender.log(step, scalars)
        if trackers.TENSORBOARD not in self._config.to:
            return
        if self._tensorboard is None:
            # After a resume TensorBoard hides the steps of the stopped run that are done again.
            purge_step = step if step <= self._last_known_step else None
            self._tensorboard = _EventFile(self._folder / "tensorboard", purge_step)
        self._tensorboard.add(step, scalars)

    def bar(self, total: int, description: str, unit: str, done: int = 0) -> "tqdm[Any]":
        """A progress bar, as `bar` makes it; shown by this tracker's rank 0 alone. What was `done` before
        counts as done, but not for the speed."""
        made = bar(total, description, unit, is_shown=self._is_main)
        made.n = made.initial = done
        return made

    def say(self, text: str) -> None:
        """Prints `text` on stdout, above the bar if one is shown."""
        if self._is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self, has_failed: bool = False) -> None:
        """Closes the files, and the run in services; may be called twice."""
        if not self._is_main:
            return
        for sender in self._senders:
            sender.close(self._summary, has_failed)
        self._senders = []
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A run that is asked to stop has saved where it stands.
        self.close(has_failed=kind is not None and not issubclass(kind, Stopped))


class _EventFile:
    """A file of scalars as TensorBoard reads them, written as they come.

    torch's SummaryWriter passes them to a thread: Ctrl-C in the midst of that can leave the thread asleep
    for ever (a waiter of threading.Condition is woken before it is forgotten, and the next call then wakes
    that one), and the process, which waits for it at its end, with it: 3 of 19 tries.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        name = (
            f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{time.time_ns()}"
        )
        self._file = RecordWriter((folder / name).open("xb"))
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            session = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(step=purge_step, session_log=session)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds values, by their whole names."""
        of = self._summaries.Summary
        values = [of.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step=step, summary=of(value=values))

    def _write(self, **content: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **content)
        self._file.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Closes the file; may be called twice."""
        self._file.close()


def bar(
    total: int, description: str, unit: str, *, is_shown: bool = True, after_s: float = 0.0
) -> "tqdm[Any]":
    """A progress bar on stderr: `update(n)`, `set_postfix_str(text)`, `close()`; a context as well.

    Where stderr is no terminal it prints whole lines instead: one at most every 10 s, and one on `close()`.
    One with `after_s` is shown when it takes longer than that, and wiped from a terminal at its end.
    """
    is_terminal = sys.stderr.isatty()
    return (_Bar if is_terminal else _LineBar)(
        total=total,
        desc=description,
        unit=unit,
        disable=not is_shown,
        delay=after_s,
        leave=not (is_terminal and after_s),
        dynamic_ncols=True,
        file=sys.stderr,
    )


# A bar of work that may be short is shown when it takes longer.
BAR_AFTER_S = 2.0


class Stages:
    """The stages of a long job on stderr: a bar on a terminal, elsewhere a line a stage.

    with Stages(2, is_shown=True) as stages:
        with stages.stage("read"):
            ...
    """

    def __init__(self, num_stages: int, *, is_shown: bool) -> None:
        self._has_lines = is_shown and not sys.stderr.isatty()
        self._bar = _Bar(
            total=num_stages,
            unit="stage",
            disable=not is_shown or self._has_lines,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One of the stages; it counts when the block ends without an error."""
        began_at = time.monotonic()
        self._bar.set_description(name)
        yield
        self._bar.update()
        if self._has_lines:
            print(f"{name:<14}{time.monotonic() - began_at:8.1f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step, the newest of each (kind, step); [] without the file.

    null becomes NaN. A last line without its end (the process was killed) is left out; any other
    line that is no row is a ValueError with its number.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    complete_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(complete_lines, start=1):
        try:
            row = json.loads(line)
            key = (row["kind"], row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no metrics row ({error}); remove that line"
            ) from error
        newest.pop(key, None)
        newest[key] = {name: math.nan if value is None else value for name, value in row.items()}
    return sorted(newest.values(), key=lambda row: row["step"])


def _as_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drop_torn_line(path: Path) -> None:
    """Cuts what a killed process left of its last line, so that the next row starts a line."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


class _Bar(tqdm):
    # tqdm's monitor thread would live on in forked loader workers.
    monitor_interval = 0


class _LineBar(_Bar):
    """The bar as whole lines, for logs; tqdm's own output uses carriage returns."""

    _printed_at: float | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        now = time.monotonic()
        if self._printed_at is None:
            self._printed_at = now
        if self.disable:  # close() sets this first, then displays, then ends the line itself
            self.fp.write(str(self))
        elif now - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._printed_at = now
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Nothing to wipe: lines stay."""

"""Services that are told a run's figures beside metrics.jsonl: one protocol, W&B and MLflow behind it.

    Tracker.log  --queue-->  a thread a service  -->  Service.log, in order

Their packages are imported when they are asked for, on the process that writes. How they are reached is
theirs to be told: WANDB_MODE, WANDB_API_KEY, MLFLOW_TRACKING_URI and the like.
"""

import json
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from hstu_rec.durable import write_file
from hstu_rec.settings import did_you_mean

IDS_FILE = "trackers.json"
TENSORBOARD = "tensorboard"
# What a service is given at the end to send what waits.
CLOSE_WITHIN_S = 60.0
MLFLOW_BATCH = 100  # parameters of a request, at most
MLFLOW_VALUE = 500  # characters of a parameter that every version takes


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the figures of a run go."""

    to: list[str] = field(default_factory=lambda: [TENSORBOARD])
    """Beside metrics.jsonl, any of tensorboard, wandb and mlflow; [] for none. The last two are packages to
    be installed, and configured by their own environment variables."""
    project: str = "hstu_rec"
    """W&B's project, or MLflow's experiment."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        allowed = [TENSORBOARD, *SERVICES]
        found = [
            f"to must hold any of {', '.join(allowed)}; got {one}{did_you_mean(one, allowed)}"
            for one in self.to
            if one not in allowed
        ]
        if len(set(self.to)) < len(self.to):
            found.append(f"to names one twice; got {', '.join(self.to)}")
        if not self.project.strip():
            found.append("project must not be empty")
        return found


@dataclass(frozen=True)
class About:
    """What a service is told of a run when it begins."""

    name: str
    folder: Path
    project: str
    settings: Mapping[str, Any]
    """Every setting, by its dotted key."""


class Service(Protocol):
    """A run in a service. Whatever it raises is of the service, not of the run."""

    run_id: str
    """By which the service knows the run, to go on with it."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds numbers of a step, by names such as train/loss; steps may come again after a resume."""

    def finish(self, summary: Mapping[str, float], has_failed: bool) -> None:
        """Adds the final figures, and ends the run there."""


class Wandb:
    """A run of Weights & Biases; its files are in RUN/wandb."""

    def __init__(self, about: About, run_id: str | None) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run: Any = wandb.init(
            project=about.project,
            name=about.name,
            id=run_id,
            resume="allow",
            dir=str(about.folder),
            config=dict(about.settings),
            allow_val_change=True,
        )
        # W&B's own steps may not fall, which they do after a resume.
        self._run.define_metric("*", step_metric="step")
        self.run_id = str(self._run.id)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """As `Service.log`."""
        self._run.log({"step": step, **scalars})

    def finish(self, summary: Mapping[str, float], has_failed: bool) -> None:
        """As `Service.finish`."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(has_failed))


class Mlflow:
    """A run of MLflow, by its client alone: its active run is left to who else uses it."""

    def __init__(self, about: About, run_id: str | None) -> None:
        from mlflow import MlflowClient, entities  # pyright: ignore[reportMissingImports]

        self._client: Any = MlflowClient()
        self._entities: Any = entities
        self._last_step = 0
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return
        known = self._client.get_experiment_by_name(about.project)
        experiment = known.experiment_id if known else self._client.create_experiment(about.project)
        self.run_id = str(self._client.create_run(experiment, run_name=about.name).info.run_id)
        settings = [
            self._entities.Param(key, str(value)[:MLFLOW_VALUE])
            for key, value in about.settings.items()
        ]
        for begin in range(0, len(settings), MLFLOW_BATCH):
            self._client.log_batch(self.run_id, params=settings[begin : begin + MLFLOW_BATCH])

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """As `Service.log`; names without what MLflow refuses: recall_at_10 for recall@10."""
        self._last_step, now_ms = step, int(time.time() * 1000)
        metrics = [
            self._entities.Metric(_mlflow_name(name), value, now_ms, step)
            for name, value in scalars.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def finish(self, summary: Mapping[str, float], has_failed: bool) -> None:
        """As `Service.finish`."""
        if summary:
            self.log(self._last_step, summary)
        self._client.set_terminated(self.run_id, "FAILED" if has_failed else "FINISHED")


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))


SERVICES: dict[str, Callable[[About, str | None], Service]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError for services whose package is not there."""
    missing = [name for name in names if name in SERVICES and find_spec(name) is None]
    if missing:
        packages = " ".join(missing)
        raise ValueError(
            f"tracking.to names {' and '.join(missing)}, which is not installed; pip install {packages}, or "
            "leave it out"
        )


def begin(names: Sequence[str], about: About) -> list["Sender"]:
    """The services among `names`, each with its run begun, or gone on with where about.folder knows it.

    Raises ValueError, with what the service says, where that cannot be done.
    """
    path = about.folder / IDS_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    senders = []
    for name in names:
        if name not in SERVICES:
            continue
        try:
            service = SERVICES[name](about, known.get(name))
        except Exception as error:
            for sender in senders:
                sender.close({}, has_failed=True)
            raise ValueError(
                f"tracking.to: {name} cannot begin: {_sentence(error)}; look at its settings, or leave it out"
            ) from error
        senders.append(Sender(name, service))
        known[name] = service.run_id
    if senders:
        write_file(path, (json.dumps(known) + "\n").encode())
    return senders


class Sender:
    """Sends to a service from a thread, so that training never waits for a network.

    The first thing that fails is told in a warning; nothing is sent after it, and the run goes on.
    """

    def __init__(self, name: str, service: Service) -> None:
        self._name, self._service, self._has_failed = name, service, False
        # Neither it nor the thread holds up a process that is interrupted.
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._send, name=f"to {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends numbers of a step, some time soon."""
        if not self._has_failed:
            self._waiting.put(lambda: self._service.log(step, scalars))

    def close(self, summary: Mapping[str, float], has_failed: bool) -> None:
        """Sends the rest and ends the service's run; waits CLOSE_WITHIN_S at most."""
        self._waiting.put(lambda: self._service.finish(summary, has_failed))
        self._waiting.put(None)
        self._thread.join(CLOSE_WITHIN_S)
        if self._thread.is_alive():
            self._warn(f"has not taken everything within {CLOSE_WITHIN_S:.0f} s")

    def _send(self) -> None:
        while (call := self._waiting.get()) is not None:
            if self._has_failed:
                continue
            try:
                call()
            except Exception as error:
                self._has_failed = True
                self._warn(f"failed: {_sentence(error)}")

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"{self._name} {what}; it gets no more of this run, which goes on: metrics.jsonl has all figures",
            stacklevel=3,
        )


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

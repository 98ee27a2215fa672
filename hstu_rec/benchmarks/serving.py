"""Time of a served bundle's answers over HTTP, as clients see it."""

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import torch

from hstu_rec.bundle import ITEMS
from hstu_rec.settings import at_least

TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class ServingTimes:
    """What is asked, of whom."""

    bundle: str = ""
    """The folder that is served."""
    url: str = "http://127.0.0.1:8000"
    """Where apps/serve.py listens."""
    clients: list[int] = field(default_factory=lambda: [1, 16])
    """Numbers of clients that ask at the same time, each when it has its answer."""
    num_requests: int = 1000
    """Requests of all clients, after a tenth as many to warm up."""
    num_events: int = 50
    """Events of a request, of items drawn evenly."""
    k: int = 10
    """Items that are asked for."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = at_least(self, 1, "num_requests", "num_events", "k")
        if not self.clients or min(self.clients) < 1:
            found.append(f"clients must be at least 1 each; got {self.clients}")
        return found


def serving_times(config: ServingTimes, device: torch.device) -> Iterator[str]:
    """A line for each number of clients: median and 99th percentile of the time of an answer, and requests a
    second. Raises ValueError for an answer that is none."""
    del device  # the server's own
    bodies = _bodies(config)
    for num_clients in config.clients:
        num_warm = max(len(bodies) // 10, num_clients)
        _times(config, bodies[:num_warm], num_clients)
        began = time.perf_counter()
        times_s = np.array(_times(config, bodies, num_clients))
        seconds = time.perf_counter() - began
        median, late = np.percentile(times_s, [50, 99]) * 1000
        yield (
            f"{num_clients:3} clients  median {median:7.1f} ms  p99 {late:7.1f} ms  "
            f"{len(bodies) / seconds:7.1f} requests/s"
        )


def _bodies(config: ServingTimes) -> list[bytes]:
    """Requests of made histories."""
    own = pq.read_table(Path(config.bundle) / ITEMS, columns=["item_id"]).column("item_id")
    random = np.random.default_rng(1)
    rows = random.integers(0, len(own), (config.num_requests, config.num_events))
    times = [*range(1_700_000_000, 1_700_000_000 + 60 * config.num_events, 60)]
    return [
        json.dumps(
            {"item_ids": own.take(one).to_pylist(), "timestamps": times, "k": config.k}
        ).encode()
        for one in rows
    ]


def _times(config: ServingTimes, bodies: list[bytes], num_clients: int) -> list[float]:
    """Seconds of each request, a client's one after another."""
    with ThreadPoolExecutor(num_clients) as clients:
        parts = [bodies[first::num_clients] for first in range(num_clients)]
        return [one for part in clients.map(lambda part: _ask(config, part), parts) for one in part]


def _ask(config: ServingTimes, bodies: list[bytes]) -> list[float]:
    connection = http.client.HTTPConnection(urlsplit(config.url).netloc, timeout=TIMEOUT_S)
    times_s = []
    for body in bodies:
        began = time.perf_counter()
        connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content: Any = json.loads(answer.read())
        times_s.append(time.perf_counter() - began)
        if answer.status != 200 or len(content["items"]) != config.k:
            raise ValueError(f"{config.url} answered {answer.status}, {str(content)[:200]}")
    connection.close()
    return times_s

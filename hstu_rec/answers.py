"""Requests for recommendations, answered together when they wait together.

    request ----------------------> [request]            first answers
    request, request (meanwhile) -> [request, request]   next, in one call of the model

Users that are scored together cost little more than one: what a server on few cores gains most by.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hstu_rec.data.histories import rows_of
from hstu_rec.serving import ServingModel
from hstu_rec.settings import at_least, within

MAX_K, MAX_EVENTS, MAX_CANDIDATES = 1000, 10_000, 100_000

OwnIds = list[int] | list[str]
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The server of apps/serve.py."""

    host: str = "127.0.0.1"
    """Address that is listened at; 0.0.0.0 for all of the machine. There is no password: keep it behind a
    proxy."""
    port: int = 8000
    """Port that is listened at."""
    use_index: bool = False
    """Finds items by the bundle's FAISS index, of a bundle whose maker is trusted (see load_bundle)."""
    max_together: int = 64
    """Requests that are answered in one call of the model, at most."""
    max_waiting: int = 1024
    """Connections beyond which requests are refused (503)."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        return at_least(self, 1, "max_together", "max_waiting") + within(self, "[1, 65535]", "port")


class Request(BaseModel):
    """Whom to recommend to, and what. Raises ValueError (pydantic's) for values that are none of it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    item_ids: OwnIds = Field(min_length=1, max_length=MAX_EVENTS)
    """Own ids of the events, in any order; those that the model does not know are left out."""
    timestamps: list[int] | list[str]
    """Of each event: unix time in s, ms, us or ns, or ISO text (UTC)."""
    k: int = Field(10, ge=1, le=MAX_K)
    """Items that are wanted."""
    filter_seen: bool = True
    """Leaves out items of the events."""
    candidates: OwnIds | None = Field(None, min_length=1, max_length=MAX_CANDIDATES)
    """Own ids of the items that may be recommended; all when null."""
    at: int | None = None
    """Unix seconds for which is recommended, for models that use it; now when null."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.timestamps) != len(self.item_ids):
            raise ValueError(
                f"give a timestamp for every item id; got {len(self.item_ids)} item_ids and "
                f"{len(self.timestamps)} timestamps"
            )
        return self


def answers(model: ServingModel, requests: Sequence[Request]) -> list[dict[str, Any] | ValueError]:
    """What each request gets: {"items": [{"item_id", "rank", "score"}, ...] best first, "num_unknown": events
    of unknown items}, with candidates also "num_unknown_candidates"; or ValueError, which says what is wrong
    with it."""
    alike: dict[Any, list[int]] = {}
    for place, one in enumerate(requests):
        chosen = None if one.candidates is None else tuple(one.candidates)
        alike.setdefault((one.k, one.filter_seen, chosen), []).append(place)
    found: dict[int, dict[str, Any] | ValueError] = {}
    for places in alike.values():
        found |= _answers_alike(model, {place: requests[place] for place in places})
    return [found[place] for place in range(len(requests))]


def _answers_alike(
    model: ServingModel, requests: dict[int, Request]
) -> dict[int, dict[str, Any] | ValueError]:
    """By number, of requests that differ in events and times alone."""
    try:
        return _answered(model, requests)
    except ValueError as error:
        if len(requests) == 1:
            return dict.fromkeys(requests, error)
    # Each alone, so that what is wrong with one is told to it only.
    found: dict[int, dict[str, Any] | ValueError] = {}
    for place, one in requests.items():
        found |= _answers_alike(model, {place: one})
    return found


def _answered(
    model: ServingModel, requests: dict[int, Request]
) -> dict[int, dict[str, Any] | ValueError]:
    first = next(iter(requests.values()))
    events = {
        "user_id": [place for place, one in requests.items() for _ in one.item_ids],
        "item_id": [item for one in requests.values() for item in one.item_ids],
        "timestamp": [at for one in requests.values() for at in one.timestamps],
    }
    now = int(time.time()) if model.uses_query_time else None
    given: dict[int, Any] = {
        place: now if one.at is None else one.at for place, one in requests.items()
    }
    is_timed = model.uses_query_time or any(at is not None for at in given.values())
    table = model.recommend(
        events,
        first.k,
        filter_seen=first.filter_seen,
        candidates=first.candidates,
        on_unknown="ignore",
        at=given if is_timed else None,
    )
    found: dict[int, Any] = {}
    for place, one in requests.items():
        num_known = len(rows_of(one.item_ids, model.items, "item_ids", "ignore"))
        found[place] = {"items": [], "num_unknown": len(one.item_ids) - num_known}
        if one.candidates is not None:
            num_chosen = len(rows_of(one.candidates, model.items, "candidates", "ignore"))
            found[place]["num_unknown_candidates"] = len(one.candidates) - num_chosen
    for row in table.to_pylist():
        found[row.pop("user_id")]["items"].append(row)
    return found


def sentence(error: Exception) -> str:
    """What is wrong with a request; of a pydantic error, its first five places."""
    told = getattr(error, "errors", lambda: [])()
    places = []
    for one in told:
        where = ".".join(str(part) for part in one["loc"][1:] if one["type"] != "json_invalid")
        what = one["msg"].removeprefix("Value error, ")
        if one["type"] in ("json_invalid", "model_attributes_type"):
            what = "give an object of JSON, with the header Content-Type: application/json"
        places.append(f"{where}: {what}" if where else what)
    return "; ".join(places[:5]) or str(error)


class Together(Generic[Asked, Answered]):
    """Calls of `answer` with all that wait, at most `max_together`, one call at a time, in a thread of its
    own; to be used in one event loop."""

    def __init__(
        self,
        answer: Callable[[list[Asked]], Sequence[Answered | ValueError]],
        max_together: int,
    ) -> None:
        self._answer, self._max_together = answer, max_together
        self._waiting: list[tuple[Asked, asyncio.Future[Answered]]] = []
        self._thread = ThreadPoolExecutor(1, "answers")
        self._task: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Answered:
        """The answer; raises what was answered instead."""
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            taken = self._waiting[: self._max_together]
            del self._waiting[: self._max_together]
            loop, asked = asyncio.get_running_loop(), [one for one, _ in taken]
            found: Sequence[Answered | Exception]
            try:
                found = await loop.run_in_executor(self._thread, self._answer, asked)
            except Exception as error:
                found = [error] * len(taken)
            for (_, future), answer in zip(taken, found, strict=True):
                if future.done():  # whoever asked is gone
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

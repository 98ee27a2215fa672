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
from typing import Annotated, Any, Generic, Self, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hstu_rec.data.dataset import LATEST_S
from hstu_rec.data.histories import rows_of, seconds_of
from hstu_rec.serving import ServingModel
from hstu_rec.settings import at_least, within

MAX_K, MAX_EVENTS, MAX_CANDIDATES = 1000, 10_000, 100_000

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


def one_kind(what: str, most: int) -> BeforeValidator:
    """Refuses a list in one sentence, where a union of kinds of lists would take one for each kind."""

    def check(values: Any) -> Any:
        kinds = sorted({type(one).__name__ for one in values}) if isinstance(values, list) else []
        if kinds in (["int"], ["str"]) and len(values) <= most:
            return values
        given = type(values).__name__
        if isinstance(values, list):
            given = f"a list of {len(values):,} {' and '.join(kinds)}" if kinds else "an empty one"
        raise ValueError(f"give a list of 1 to {most:,} {what}; got {given}")

    return BeforeValidator(check)


_events, _candidates = (
    Field(min_length=1, max_length=most) for most in (MAX_EVENTS, MAX_CANDIDATES)
)
PerEvent = Annotated[list[int], _events] | Annotated[list[str], _events]
Chosen = Annotated[list[int], _candidates] | Annotated[list[str], _candidates]
OWN_IDS = "own ids, all integers or all strings"
TIMES = "unix times (integers in s, ms, us or ns) or ISO texts"


class Request(BaseModel):
    """Whom to recommend to, and what. Raises ValueError (pydantic's) for values that are none of it."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    item_ids: Annotated[PerEvent, one_kind(OWN_IDS, MAX_EVENTS)]
    """Own ids of the events, in any order; those that the model does not know are left out."""
    timestamps: Annotated[PerEvent, one_kind(TIMES, MAX_EVENTS)]
    """Of each event: unix time in s, ms, us or ns, or ISO text (UTC)."""
    k: int = Field(10, ge=1, le=MAX_K)
    """Items that are wanted."""
    filter_seen: bool = True
    """Leaves out items of the events."""
    candidates: Annotated[Chosen, one_kind(OWN_IDS, MAX_CANDIDATES)] | None = None
    """Own ids of the items that may be recommended; all when null."""
    at: int | None = None
    """Unix seconds for which is recommended, for models that use it, not before the newest event; when null
    now, or the newest event where that is later."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.timestamps) != len(self.item_ids):
            raise ValueError(
                f"give a timestamp for every item id; got {len(self.item_ids)} item_ids and "
                f"{len(self.timestamps)} timestamps"
            )
        return self


class Item(BaseModel):
    """An item that is recommended."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    item_id: int | str
    """Its own id."""
    rank: int
    """1 for the best."""
    score: float
    """Higher is better; comparable within one answer."""


class Answer(BaseModel):
    """What is recommended."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    items: list[Item]
    """Best first; fewer than k where fewer are left, none where no event is of a known item."""
    num_unknown: int
    """Events of items that the model does not know."""
    num_unknown_candidates: int = 0
    """Candidates that the model does not know; only in answers to requests with candidates."""


class Refusal(BaseModel):
    """Why a request is not answered."""

    detail: str


class Health(BaseModel):
    """What is served."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str | None
    """Name of the model."""
    items: int
    """Items that it knows."""
    version: str
    """Of hstu_rec."""
    uses_query_time: bool
    """Whether recommendations depend on the time for which they are made."""


@dataclass(frozen=True)
class _Asked:
    """A request in the model's terms."""

    request: Request
    seconds: np.ndarray
    """int64 [n] unix seconds of its events."""
    at: int | None
    """Unix seconds for which is recommended, where the model uses them."""
    num_unknown: int
    """Events of unknown items."""

    @classmethod
    def of(cls, model: ServingModel, request: Request) -> Self:
        """Raises ValueError for what is wrong with it, so that it keeps no other from its answer."""
        seconds, item_ids = seconds_of(request.timestamps), request.item_ids
        num_known = len(rows_of(item_ids, model.items, "item_ids", "ignore"))
        at = _query_time(model, request.at, int(seconds.max()))
        return cls(request, seconds, at, len(item_ids) - num_known)


def answers(model: ServingModel, requests: Sequence[Request]) -> list[dict[str, Any] | ValueError]:
    """What each request gets: {"items": [{"item_id", "rank", "score"}, ...] best first, "num_unknown": events
    of unknown items}, with candidates also "num_unknown_candidates"; or ValueError, which says what is wrong
    with it."""
    alike: dict[Any, dict[int, _Asked]] = {}
    found: dict[int, dict[str, Any] | ValueError] = {}
    for place, one in enumerate(requests):
        chosen = None if one.candidates is None else tuple(one.candidates)
        try:
            asked = _Asked.of(model, one)
        except ValueError as error:
            found[place] = error
        else:
            alike.setdefault((one.k, one.filter_seen, chosen), {})[place] = asked
    for (_, _, chosen), group in alike.items():
        try:
            further = _about_candidates(model, chosen)
        except ValueError as error:
            found |= dict.fromkeys(group, error)
            continue
        for place, answer in _answers_alike(model, group).items():
            found[place] = answer if isinstance(answer, ValueError) else answer | further
    return [found[place] for place in range(len(requests))]


def _query_time(model: ServingModel, at: int | None, newest: int) -> int | None:
    """When it is for whoever asks with `at`, and a newest event."""
    if not model.uses_query_time:
        if at is not None:
            raise ValueError(
                "at has no effect on this model, which does not use the query time; leave it out"
            )
        return None
    if at is None:
        return max(int(time.time()), newest)  # the clock that the events are from may be ahead
    if not newest <= at < LATEST_S:
        raise ValueError(
            f"at must be unix seconds, not before the newest event, {newest}; got {at}; leave it out for now"
        )
    return at


def _about_candidates(model: ServingModel, candidates: Sequence[Any] | None) -> dict[str, int]:
    if candidates is None:
        return {}
    num_known = len(rows_of(candidates, model.items, "candidates", "ignore"))
    if not num_known:
        raise ValueError(
            f"none of {len(candidates)} candidates is known; give at least one that is"
        )
    return {"num_unknown_candidates": len(candidates) - num_known}


def _answers_alike(
    model: ServingModel, requests: dict[int, _Asked]
) -> dict[int, dict[str, Any] | ValueError]:
    """By number, of requests that differ in events and times alone."""
    try:
        return _answered(model, requests)
    except ValueError as error:
        if len(requests) == 1:
            return dict.fromkeys(requests, error)
    # By halves, so that what is wrong with one is told to it only and most others stay together.
    each, middle = [*requests.items()], len(requests) // 2
    return _answers_alike(model, dict(each[:middle])) | _answers_alike(model, dict(each[middle:]))


def _answered(
    model: ServingModel, requests: dict[int, _Asked]
) -> dict[int, dict[str, Any] | ValueError]:
    first = next(iter(requests.values())).request
    events = {
        "user_id": np.repeat([*requests], [len(one.seconds) for one in requests.values()]),
        "item_id": [item for one in requests.values() for item in one.request.item_ids],
        "timestamp": np.concatenate([one.seconds for one in requests.values()]),
    }
    times = {place: one.at for place, one in requests.items() if one.at is not None}
    table = model.recommend(
        events,
        first.k,
        filter_seen=first.filter_seen,
        candidates=first.candidates,
        on_unknown="ignore",
        at=times or None,
    )
    found: dict[int, Any] = {
        place: {"items": [], "num_unknown": one.num_unknown} for place, one in requests.items()
    }
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

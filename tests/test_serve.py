"""apps/serve.py answers over HTTP what the model recommends, to many at once, and tells what is wrong."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hstu_rec import __version__, export, load_bundle
from hstu_rec.answers import Request, Together, answers
from hstu_rec.benchmarks.serving import ServingTimes, serving_times
from hstu_rec.export import ExportConfig
from hstu_rec.serving import ServingModel
from tests.shared_models import train_run, write_data

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Of a model that does not use the query time, and of one that does."""
    folder = tmp_path_factory.mktemp("serve")
    write_data(folder / "data", 200)
    for name, settings in (("plain", ()), ("timed", ("encoder.query_time=next",))):
        train_run(folder / "data", folder / f"run {name}", "train.max_epochs=1", *settings)
        export.export(folder / f"run {name}", folder / name, ExportConfig(name=name))
    return folder


WITHOUT_TORCHREC = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchrec", "fbgemm_gpu", "torchx", "duckdb", "tensorboard", "matplotlib"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def url(bundles):
    """Where the plain model is served by the app, which is run without what trains."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [str(bundles / "plain"), f"port={port}"]
    command = [sys.executable, "-c", WITHOUT_TORCHREC, "apps/serve.py", *arguments]
    with (bundles / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            assert process.poll() is None, (bundles / "log").read_text()
            assert time.monotonic() - began < 90, "it does not answer"
            try:
                got(f"{url}/health")
                break
            except OSError:
                time.sleep(0.1)
        yield url
        assert process.poll() is None, (bundles / "log").read_text()
        assert "Traceback" not in (bundles / "log").read_text()
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("missing", ["uvicorn", "fastapi", "pydantic", "torch", "hstu_rec"])
def test_where_a_package_is_missing_the_app_ends_with_a_sentence(missing):
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_path('apps/serve.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"error: the package {missing} is missing" in done.stderr
    assert "run `python requirements/install.py serve.txt`" in done.stderr


def got(url, body=None):
    """(status, answer) of a request, `body` being what is sent as JSON, or bytes."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def requests_of(num_users):
    random = np.random.default_rng(3)
    return [
        {
            "item_ids": [f"item {n:04d}" for n in random.integers(0, 150, length)],
            "timestamps": sorted(random.integers(10**9, 10**9 + 10**6, length).tolist()),
            "k": int(random.integers(1, 12)),
            "filter_seen": bool(random.integers(2)),
        }
        for length in random.integers(1, 20, num_users)
    ]


def expected(model, request):
    events = {"item_id": request["item_ids"], "timestamp": request["timestamps"]}
    events["user_id"] = [1] * len(events["item_id"])
    table = model.recommend(events, request["k"], filter_seen=request["filter_seen"])
    return table.drop_columns("user_id").to_pylist()


def test_it_says_what_it_serves(url):
    about = {"name": "plain", "items": 150, "version": __version__, "uses_query_time": False}
    assert got(f"{url}/health") == (200, about)


def test_its_pages_tell_every_field(url):
    with urllib.request.urlopen(url, timeout=60) as page:  # which leads to the pages
        assert page.url == f"{url}/docs" and b"swagger" in page.read()
    status, told = got(f"{url}/openapi.json")
    assert status == 200 and told["info"] == {"title": "hstu_rec", "version": __version__}
    assert [*told["paths"]] == ["/recommend", "/health"]
    assert told["paths"]["/health"]["get"]["summary"] == "Health"
    schemas = told["components"]["schemas"]
    for path, method, code, name in (
        ("/recommend", "post", "200", "Answer"),
        ("/recommend", "post", "422", "Refusal"),
        ("/health", "get", "200", "Health"),
    ):
        content = told["paths"][path][method]["responses"][code]["content"]["application/json"]
        assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}
    for name in ("Request", "Answer", "Item", "Health"):
        assert all(one["description"] for one in schemas[name]["properties"].values())
    for kind in schemas["Request"]["properties"]["item_ids"]["anyOf"]:
        assert (kind["minItems"], kind["maxItems"]) == (1, 10_000)


def test_many_clients_at_once_get_what_each_gets_alone(url, bundles):
    model, asked = load_bundle(bundles / "plain"), requests_of(120)
    with ThreadPoolExecutor(16) as clients:
        given = [*clients.map(lambda one: got(f"{url}/recommend", one), asked)]
    for request, (status, answer) in zip(asked, given, strict=True):
        assert status == 200, answer
        assert answer["num_unknown"] == 0
        wanted = expected(model, request)
        assert [row["item_id"] for row in answer["items"]] == [row["item_id"] for row in wanted]
        assert [row["rank"] for row in answer["items"]] == [*range(1, len(wanted) + 1)]
        scores = [row["score"] for row in wanted]
        assert [row["score"] for row in answer["items"]] == pytest.approx(scores, abs=1e-6)


IDS = "give a list of 1 to 10,000 own ids, all integers or all strings"
TIMES = "give a list of 1 to 10,000 unix times (integers in s, ms, us or ns) or ISO texts"
GOOD = {"item_ids": ["item 0001", "item 0002"], "timestamps": [5, 6]}


def test_candidates_unknown_items_and_users_without_known_ones_are_answered(url):
    chosen = ["item 0009", "item 0004", "item 0001"]
    status, answer = got(f"{url}/recommend", GOOD | {"candidates": chosen})
    assert status == 200
    assert {row["item_id"] for row in answer["items"]} == {"item 0009", "item 0004"}
    assert answer["num_unknown_candidates"] == 0
    chosen[2] = "none such"
    assert got(f"{url}/recommend", GOOD | {"candidates": chosen})[1]["num_unknown_candidates"] == 1
    more = {"item_ids": [*GOOD["item_ids"], "new"], "timestamps": [5, 6, 7]}
    alone = got(f"{url}/recommend", GOOD)[1]
    assert got(f"{url}/recommend", more) == (200, alone | {"num_unknown": 1})
    unknown = {"item_ids": ["new"], "timestamps": ["2020-01-01"]}
    assert got(f"{url}/recommend", unknown) == (200, {"items": [], "num_unknown": 1})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "give an object of JSON"),
        ([1], "give an object of JSON"),
        ({}, "item_ids: Field required; timestamps: Field required"),
        (GOOD | {"kk": 3}, "kk: Extra inputs"),
        (GOOD | {"k": 0}, "k: Input should be greater than or equal to 1"),
        (GOOD | {"k": True}, "k: Input should be a valid integer"),
        (GOOD | {"k": 10**30}, "k: Input should be"),
        (GOOD | {"timestamps": [5]}, "a timestamp for every item id; got 2 item_ids and 1"),
        (GOOD | {"timestamps": [5, -6]}, "1 timestamps are outside 0"),
        (GOOD | {"timestamps": [5, 2**65]}, ""),
        (GOOD | {"timestamps": [5, "2020-01-01"]}, "ISO texts; got a list of 2 int and str"),
        (GOOD | {"timestamps": [5, 6.5]}, f"timestamps: {TIMES}; got a list of 2 float and int"),
        (GOOD | {"timestamps": "now"}, f"timestamps: {TIMES}; got str"),
        (GOOD | {"timestamps": ["yesterday", "today"]}, "ISO text; got string, such as 'yesterday"),
        (GOOD | {"item_ids": [1, 2]}, "item_ids holds integers, the model's items are strings"),
        (
            GOOD | {"item_ids": ["item 0001", None]},
            f"item_ids: {IDS}; got a list of 2 NoneType and",
        ),
        (GOOD | {"item_ids": ["item 0001", 2]}, f"item_ids: {IDS}; got a list of 2 int and str"),
        ({"item_ids": [], "timestamps": []}, f"item_ids: {IDS}; got an empty one; timestamps: "),
        (GOOD | {"item_ids": ["x"] * 10_001}, f"item_ids: {IDS}; got a list of 10,001 str"),
        (GOOD | {"candidates": ["new"]}, "none of 1 candidates is known"),
        (GOOD | {"candidates": []}, "candidates: give a list of 1 to 100,000 own ids"),
        (GOOD | {"candidates": [True]}, "got a list of 1 bool"),
        (GOOD | {"at": 7}, "at has no effect on this model"),
        (b'{"item_ids": ["\\ud800"], "timestamps": [1]}', ""),
        (b'{"item_ids": ["item 0001"], "timestamps": [NaN]}', ""),
    ],
)
def test_a_bad_request_is_told_in_a_sentence(url, body, told):
    status, answer = got(f"{url}/recommend", body)
    assert 400 <= status < 500 and isinstance(answer["detail"], str), answer
    assert answer["detail"] and told in answer["detail"]
    assert "list[" not in answer["detail"]  # as pydantic tells of a union


def test_the_time_of_answers_is_measured_for_each_number_of_clients(url, bundles):
    config = ServingTimes(bundle=str(bundles / "plain"), url=url, clients=[1, 3], num_requests=20)
    one, three = serving_times(config, torch.device("cpu"))
    for line, clients in ((one, 1), (three, 3)):
        assert line.split()[:3] == [str(clients), "clients", "median"]
        assert 0 < float(line.split()[3]) <= float(line.split()[6])
    with pytest.raises(ValueError, match="answered 200"):  # with fewer items than were asked for
        [*serving_times(replace(config, k=200), torch.device("cpu"))]
    assert ServingTimes(clients=[0]).problems() and ServingTimes(clients=[]).problems()


def test_what_is_wrong_with_one_request_is_told_to_it_alone(bundles):
    model = load_bundle(bundles / "plain")
    good, bad = Request(**GOOD), Request(item_ids=["item 0001"], timestamps=[-1])
    first, wrong, last = answers(model, [good, bad, good])
    assert first == last == answers(model, [good])[0] and len(first["items"]) == 10
    assert isinstance(wrong, ValueError) and "outside 0" in str(wrong)


@pytest.fixture
def calls(monkeypatch):
    """How many users each call of the model was for."""
    made, recommend = [], ServingModel.recommend

    def counted(self, events, *arguments, **options):
        made.append(len({*np.asarray(events["user_id"]).tolist()}))
        if "poison" in events["item_id"]:
            raise ValueError("of the poison")
        return recommend(self, events, *arguments, **options)

    monkeypatch.setattr(ServingModel, "recommend", counted)
    return made


def assert_as_alone(model, asked):
    """Held against what the requests get together; the scores of many are added in another order."""
    for one, answer in zip(asked, answers(model, asked), strict=True):
        (alone,) = answers(model, [one])
        if isinstance(alone, ValueError):
            assert str(answer) == str(alone)
            continue
        scores = [row.pop("score") for row in answer["items"]]
        assert scores == pytest.approx([row.pop("score") for row in alone["items"]], abs=1e-6)
        assert answer == alone


@pytest.mark.parametrize("kind", ["plain", "timed"])
def test_requests_of_other_forms_and_wrong_ones_leave_the_others_together(bundles, calls, kind):
    model, at = load_bundle(bundles / kind), 1_600_000_000
    forms = [[at, at + 1], [at * 1000, at * 1000 + 5], ["2020-09-13T12:26:40", "2020-09-14"]]
    forms += [
        ["2020-09-13T12:26:40+02:00", "2020-09-14T00:00:00Z"],
        [at * 10**9] * 2,
        ["2020-09-13"] * 2,
    ]
    good = [Request(**GOOD | {"timestamps": times}) for times in forms]
    wrong = [GOOD | {"item_ids": [1, 2]}, GOOD | {"timestamps": [-1, 5]}, GOOD | {"at": 3}]
    wrong += [GOOD | {"timestamps": ["today", "now"]}, GOOD | {"timestamps": [5, at * 1000]}]
    mixed = [*good, *(Request(**one) for one in wrong), *good]
    found = answers(model, mixed)
    assert calls == [2 * len(good)]
    assert [isinstance(one, ValueError) for one in found] == [False] * 6 + [True] * 5 + [False] * 6
    assert_as_alone(model, mixed)


def test_of_requests_that_fail_together_halves_are_tried(bundles, calls):
    model = load_bundle(bundles / "plain")
    poison = Request(item_ids=["poison"], timestamps=[5])
    found = answers(model, [Request(**GOOD)] * 40 + [poison] + [Request(**GOOD)] * 23)
    assert str(found.pop(40)) == "of the poison" and calls[0] == 64 and len(calls) == 1 + 2 * 6
    assert all(len(one["items"]) == 10 for one in found)


def test_candidates_that_are_wrong_for_all_of_a_group_are_tried_once(bundles, calls):
    model = load_bundle(bundles / "plain")
    for candidates, told in ((["new"], "none of 1 candidates is known"), ([1], "candidates holds")):
        asked = [Request(**GOOD, candidates=candidates)] * 9
        assert all(told in str(one) for one in answers(model, asked)) and not calls


def test_a_model_that_uses_the_query_time_takes_now_or_the_time_that_is_given(bundles, monkeypatch):
    model = load_bundle(bundles / "timed")
    monkeypatch.setattr(time, "time", lambda: 1e9 + 0.5)
    now, same, later = answers(model, [Request(**GOOD, at=at) for at in (None, 10**9, 2 * 10**9)])
    assert now == same != later
    ahead = GOOD | {"timestamps": [10**9 - 5, 10**9 + 1]}
    from_the_future, then = answers(model, [Request(**ahead, at=at) for at in (None, 10**9 + 1)])
    assert from_the_future == then and len(then["items"]) == 10
    for at in (5, 10**12):
        (refused,) = answers(model, [Request(**GOOD, at=at)])
        assert f"not before the newest event, 6; got {at}" in str(refused)


def test_those_that_wait_are_answered_together_and_a_failure_ends_none_but_theirs():
    calls, gate = [], threading.Event()

    def answer(asked):
        calls.append(asked)
        assert gate.wait(20)
        if 5 in asked:
            raise RuntimeError("of 5")
        return [ValueError(f"of {one}") if one == 2 else one * 10 for one in asked]

    async def ask():
        together = Together(answer, 3)
        asked = [asyncio.create_task(together.ask(0))]
        while not calls:
            await asyncio.sleep(0.001)
        asked += [asyncio.create_task(together.ask(one)) for one in range(1, 8)]
        await asyncio.sleep(0)
        asked[7].cancel()
        gate.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        return [*found, await together.ask(9)]

    found = asyncio.run(ask())
    assert calls == [[0], [1, 2, 3], [4, 5, 6], [7], [9]]
    assert [found[0], found[1], found[3], found[8]] == [0, 10, 30, 90]
    assert repr(found[2]) == "ValueError('of 2')"
    assert [repr(found[place]) for place in (4, 5, 6)] == ["RuntimeError('of 5')"] * 3
    assert isinstance(found[7], asyncio.CancelledError)

"""Recipes over seeds: what is run, what is not run again, what the tables say."""

import fcntl
import json
import os
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_rec import runs as runs_module
from hstu_rec.comparison import METRICS, Measured, compared, draw, page, read_published
from hstu_rec.config import RunConfig, load
from hstu_rec.quality import PUBLISHED, planned, quality
from hstu_rec.runs import TRAIN_APP, Run, finished, identity
from tests.datasets import write_dataset
from tests.results import PROTOCOL

ROOT = Path(__file__).parent.parent
SEEN = ("seen_masked", "seen_allowed")
# In the place of apps/train.py: the same arguments and files, at once. A rate of 0.5 fails.
FAKE_APP = """
import json, sys
from pathlib import Path
import yaml

recipe, *settings = sys.argv[1:]
given = dict(one.removeprefix("train.").split("=", 1) for one in settings)
config = yaml.safe_load(Path(recipe).read_text())
config["train"] |= {**given, "seed": int(given["seed"])}
folder = Path(given["run_dir"])
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent / "calls").open("a") as calls:
    calls.write(given["seed"])
if config["optim"]["lr"] == 0.5:
    print("epoch 1")
    sys.exit("error: the loss is not finite")
(folder / "config.yaml").write_text(yaml.safe_dump(config))
result = json.loads((Path(__file__).parent / "result.json").read_text())
stats = json.loads((Path(config["data"]["path"]) / "stats.json").read_text())
split = {"split": stats["split"]["kind"]}
result["protocol"]["data"] = {k: v for k, v in stats.items() if not isinstance(v, dict)} | split
(folder / "result.json").write_text(json.dumps(result))
"""


def result_of(value: float, **versions: str) -> dict[str, Any]:
    """A result.json whose metrics are around `value`."""
    part = {name: value + index / 100 for index, name in enumerate((*METRICS, "mrr"))}
    parts = {seen: {k: v + (seen == "seen_masked") for k, v in part.items()} for seen in SEEN}
    return {
        "protocol": {**PROTOCOL, "data": {}},
        "test": parts,
        "valid": {seen: {"ndcg@10": value / 2} for seen in SEEN},
        "baselines": {"popularity": parts, "co_occurrence": parts},
        "timing": {"train_s": 600 * value, "processes": 2, "device": "CPU"},
        "versions": versions,
    }


def measured(name: str, values: list[float], **changes: Any) -> Measured:
    given = {
        "name": name,
        "file": f"configs/{name}.yaml",
        "data_path": "data/beauty",
        "uses_query_time": False,
        "given": [],
        "changes": {"encoder.dim": 32},
        "folder": Path("runs") / name,
        "results": {s: result_of(v, commit="abc1234") for s, v in enumerate(values, start=1)},
        "failures": {},
    }
    return Measured(**{**given, **changes})


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe on a tiny data set called beauty."""
    random = np.random.default_rng(0)
    write_dataset(tmp_path / "beauty", random.integers(0, 12, (40, 6)).tolist(), num_items=12)
    (tmp_path / "tiny.yaml").write_text(f"data: {{path: {tmp_path}/beauty}}\n")
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """quality() with runs that are done at once."""
    (tmp_path / "fake.py").write_text(FAKE_APP)
    (tmp_path / "result.json").write_text(json.dumps(result_of(0.25)))
    command = runs_module._command

    def fake(*given: Any) -> list[str]:
        real = command(*given)
        return [sys.executable, str(tmp_path / "fake.py"), *real[real.index(str(TRAIN_APP)) + 1 :]]

    monkeypatch.setattr(runs_module, "_command", fake)
    monkeypatch.setattr(runs_module, "POLL_S", 0.01)
    return lambda *arguments: quality([*arguments, f"quality.folder={tmp_path / 'out'}"])


def calls(tmp_path: Path) -> list[str]:
    """Seeds that were run, by recipe folder."""
    return sorted(path.read_text() for path in (tmp_path / "out").glob("*/calls"))


def test_a_table_has_mean_and_sample_deviation_over_the_seeds() -> None:
    values = [0.07, 0.09, 0.085]
    for table in compared([measured("a", values), measured("b", [0.1])], {}):
        first, alone = table.rows[:2]
        for index, name in enumerate(METRICS):
            here = np.array(values) + index / 100 + (table.seen == "seen_masked")
            assert first.means[name] == pytest.approx(here.mean(), rel=1e-12)
            assert first.stds[name] == pytest.approx(here.std(ddof=1), rel=1e-9)
        assert first.seeds == [1, 2, 3] and first.commits == ["abc1234"]
        assert first.train_s == pytest.approx(600 * np.mean(values))
        assert alone.stds == {} and alone.means["recall@5"] == pytest.approx(
            0.1 + (table.seen == "seen_masked")
        )


def test_published_figures_stand_beside_their_own_data_set_and_protocol_only() -> None:
    recipes = [
        measured("a", [0.1]),
        measured("b", [0.1], uses_query_time=True),
        measured("c", [0.1], data_path="elsewhere/sports"),
        measured("d", [0.1], data_path="data/other"),
    ]
    published = read_published(PUBLISHED)
    published["beauty"] += [{**published["beauty"][0], "model": "timed", "query_time": True}]
    found = {
        (Path(table.data_path).name, table.uses_query_time, table.seen): [
            row.label for row in table.rows if row.kind == "published"
        ]
        for table in compared(recipes, published)
    }
    beauty = found["beauty", False, "seen_allowed"]
    assert beauty == ["LC-Rec", "RecBole SASRec with CE", "genrec HSTU", "genrec SASRec"]
    assert found["beauty", False, "seen_masked"][0] == "BSARec"
    assert found["beauty", True, "seen_allowed"] == ["timed"]
    assert found["beauty", True, "seen_masked"] == []
    assert found["sports", False, "seen_allowed"] == ["genrec HSTU", "genrec SASRec"]
    assert found["sports", False, "seen_masked"][-1] == "BSARec"  # its NDCG was not told
    assert found["other", False, "seen_masked"] == []
    assert len(found) == 8


def test_a_learned_seen_bias_is_told_where_seen_items_are_allowed() -> None:
    recipes = [measured("a", [0.1], changes={"loss.use_seen_bias": True}), measured("b", [0.1])]
    labels = {table.seen: [row.label for row in table.rows[:2]] for table in compared(recipes, {})}
    assert labels == {"seen_masked": ["a", "b"], "seen_allowed": ["a (seen bias)", "b"]}


def test_the_page_has_rows_of_the_recipes_the_published_and_the_baselines() -> None:
    recipes = [
        measured("a", [0.07, 0.09]),
        measured("b", [0.1], failures={2: "error: a | b", 3: "error: a | b"}),
        measured("c", [], failures={1: "killed"}),
    ]
    text = page(recipes, compared(recipes, read_published(PUBLISHED)), "Opening.")
    rows = rows_of(text.replace("\\|", "/"))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Quality",
        "## beauty",
        "### Seen items masked, query time not used",
        "### Seen items allowed, query time not used",
    ]
    assert text.count("Test: 22,363 users") == 1
    spread = f"{statistics.stdev([0.07, 0.09]):.4f}"
    cells = [f"{value:.4f} ± {spread}" for value in (0.08, 0.09, 0.10, 0.11)]
    valid = f"0.0400 ± {statistics.stdev([0.035, 0.045]):.4f}"
    assert ["a", valid, *cells, "1, 2", "48.0 s, 2 x CPU", "abc1234", "configs/a.yaml"] in rows
    told = {row[0]: row[-1] for row in rows if len(row) > 2}
    assert told["b"] == "configs/b.yaml; failed with seed 2, 3: error: a / b"
    assert told["c"] == "configs/c.yaml; failed with seed 1: killed"
    assert ["genrec HSTU", "", "", "0.0708", "", "0.0412", "", "", "", "genrec README"] in rows
    assert {"popularity", "co-occurrence"} <= told.keys()


def test_recipes_of_other_protocols_get_a_line_of_their_own() -> None:
    other = result_of(0.1)
    other["protocol"]["max_history_len"] = 200
    recipes = [measured("a", [0.1]), measured("b", []), measured("c", [], results={1: other})]
    lines = page(recipes, compared(recipes, {}), "").splitlines()
    assert [line[:9] for line in lines if "Test:" in line] == ["a: Test: ", "c: Test: "]


def test_the_picture_is_a_png_that_grows_with_the_tables() -> None:
    sizes = []
    for recipes in ([measured("a", [])], [measured(n, [0.07, 0.09]) for n in "abcdefgh"]):
        drawn = draw(compared(recipes, read_published(PUBLISHED) if len(recipes) > 1 else {}))
        assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(struct.unpack(">II", drawn[16:24]))
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]


def test_runs_that_are_done_are_not_run_again(
    tmp_path: Path, recipe: str, measure: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(recipe, "quality.seeds=[1,2]")
    assert calls(tmp_path) == ["12"]
    first = (tmp_path / "out" / "quality.json").read_text()
    assert measure(recipe, "quality.seeds=[1,2]", "quality.jobs=3")
    assert calls(tmp_path) == ["12"]
    assert (tmp_path / "out" / "quality.json").read_text() == first
    assert "2 runs, 2 of them done already" in capsys.readouterr().out
    assert measure(recipe, "quality.seeds=[2,3]")
    assert calls(tmp_path) == ["123"]
    content = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert content["tables"][0]["rows"][0]["seeds"] == [2, 3]
    assert content["recipes"][0]["changes"] == {"data.path": str(tmp_path / "beauty")}
    assert (tmp_path / "out" / "quality.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "out" / "quality.md").read_text()
    assert "eSASRec" in text and "(quality.png)" in text and "## Details" in text


def test_another_configuration_or_other_data_runs_again_elsewhere(
    tmp_path: Path, recipe: str, measure: Callable[..., bool]
) -> None:
    assert measure(recipe, "quality.seeds=[1]")
    assert measure(recipe, "quality.seeds=[1]", "optim.lr=0.25")
    assert calls(tmp_path) == ["1", "1"]
    stats = tmp_path / "beauty" / "stats.json"
    content = json.loads(stats.read_text())
    stats.write_text(json.dumps({**content, "prepare_s": 3.5}))
    assert measure(recipe, "quality.seeds=[1]")
    assert calls(tmp_path) == ["1", "1"]
    stats.write_text(json.dumps({**content, "item_map_hash": "other"}))
    assert measure(recipe, "quality.seeds=[1]")
    assert calls(tmp_path) == ["1", "1", "1"]


def test_every_variant_is_a_row_of_its_own_beside_the_recipe(
    tmp_path: Path, recipe: str, measure: Callable[..., bool]
) -> None:
    gate, both = "encoder.use_gate=false", "encoder.attention=softmax encoder.dropout=0.1"
    assert measure(recipe, "quality.seeds=[4]", f"quality.variants=['{gate}', '{both}']")
    assert calls(tmp_path) == ["4"] * 3
    content = json.loads((tmp_path / "out" / "quality.json").read_text())
    changes = {one["name"]: one["changes"] for one in content["recipes"]}
    assert list(changes) == ["tiny", f"tiny, {gate}", f"tiny, {both}"]
    shared = changes["tiny"]
    assert changes[f"tiny, {gate}"] == shared | {"encoder.use_gate": False}
    softmax = {"encoder.attention": "softmax", "encoder.dropout": 0.1}
    assert changes[f"tiny, {both}"] == shared | softmax


def test_a_stopped_run_goes_on_in_its_folder(
    tmp_path: Path, recipe: str, measure: Callable[..., bool]
) -> None:
    assert measure(recipe, "quality.seeds=[1,2]")
    [folder] = [path.parent for path in (tmp_path / "out").glob("*/calls")]
    (folder / "seed_2" / "result.json").unlink()
    assert measure(recipe, "quality.seeds=[1,2]")
    assert calls(tmp_path) == ["122"]
    written = load(RunConfig, [str(folder / "seed_2" / "config.yaml")]).train
    assert (written.resume, written.run_dir) == ("auto", str(folder / "seed_2"))


def test_a_folder_with_another_run_is_named_and_nothing_is_run(
    tmp_path: Path, recipe: str, measure: Callable[..., bool]
) -> None:
    assert measure(recipe, "quality.seeds=[1]")
    written = next((tmp_path / "out").glob("*/seed_1/config.yaml"))
    written.write_text(written.read_text().replace("max_epochs: 60", "max_epochs: 61"))
    with pytest.raises(ValueError, match=r"seed_1 holds another run than tiny seed 1.*remove"):
        measure(recipe, "quality.seeds=[1,2]")
    assert calls(tmp_path) == ["1"]


def test_a_failing_run_is_told_and_the_others_finish(
    tmp_path: Path, recipe: str, measure: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"{Path(recipe).read_text()}optim: {{lr: 0.5}}\n")
    assert not measure(str(bad), recipe, "quality.seeds=[1,2]", "quality.jobs=2")
    assert sorted("".join(sorted(seeds)) for seeds in calls(tmp_path)) == ["12", "12"]
    printed = capsys.readouterr().out
    assert "failed  bad seed 1" in printed and "done    tiny seed 2" in printed
    told = {row[0]: row[-1] for row in rows_of(printed) if len(row) > 2}
    assert told["bad"] == f"{bad}; failed with seed 1, 2: error: the loss is not finite"
    assert told["tiny"] == recipe


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("epoch 1\nRuntimeError: bang\nTraceback:\nx.ChildFailedError: \n=====\n", "bang"),
        ("epoch 1\n  traceback : Signal 9 (SIGKILL) received by PID 7\n====\n", "Signal 9 "),
        ("epoch 1\nepoch 2\n\n", "epoch 2"),
        ("", "it printed nothing"),
    ],
)
def test_the_reason_of_a_failure_is_the_line_that_tells_it(
    log: str, reason: str, tmp_path: Path, recipe: str
) -> None:
    settings, (one,) = planned([recipe, f"quality.folder={tmp_path}"])
    run = Run(one, settings.seeds[0])
    run.log.parent.mkdir()
    run.log.write_text(log)
    assert reason in runs_module._reason(run, 1)


def test_a_run_that_another_process_trains_is_left_to_it(
    tmp_path: Path, recipe: str, measure: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planned([recipe, f"quality.folder={tmp_path / 'out'}"])[1][0].folder
    folder.mkdir(parents=True)
    with (folder / "seed_2.log").open("wb") as log:
        log.write(b"of the other process")
        log.flush()
        fcntl.flock(log, fcntl.LOCK_EX)
        assert not measure(recipe, "quality.seeds=[1,2]")
    assert "failed  tiny seed 2  another process is training it" in capsys.readouterr().out
    assert (folder / "seed_2.log").read_bytes() == b"of the other process"
    assert calls(tmp_path) == ["1"]
    assert measure(recipe, "quality.seeds=[1,2]")
    assert calls(tmp_path) == ["12"]


def test_what_ends_the_measure_ends_its_runs(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    launch, sleep = runs_module._launch, runs_module.time.sleep

    def sleeping(*_: Any) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(600)"]

    def kept(*given: Any) -> subprocess.Popen[bytes]:
        started.append(launch(*given))
        return started[-1]

    def interrupt(_: float) -> None:
        monkeypatch.setattr(runs_module.time, "sleep", sleep)
        os.kill(os.getpid(), runs_module.signal.SIGTERM)

    monkeypatch.setattr(runs_module, "_command", sleeping)
    monkeypatch.setattr(runs_module, "_launch", kept)
    monkeypatch.setattr(runs_module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quality([recipe, f"quality.folder={tmp_path / 'out'}", "quality.jobs=2"])
    assert [process.poll() for process in started] == [-15, -15]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give at least one recipe"),
        (["quality.seeds=[1]"], "give at least one recipe"),
        (["{recipe}", "nowhere.yaml"], "nowhere.yaml: 'nowhere.yaml' is neither a key=value"),
        (["{recipe}", "quality.seeds=[]"], r"quality.seeds must be distinct .* got \[\]"),
        (["{recipe}", "quality.seeds=[1,-1]"], r"seeds must be in 0.*; got \[-1\]"),
        (["{recipe}", "quality.jobs=0"], "quality.jobs must be at least 1; got 0"),
        (["{recipe}", "quality.job=2"], "'quality.job'; did you mean 'quality.jobs'"),
        (["{recipe}", "seeds=[1]"], "unknown key 'seeds'; did you mean 'quality.seeds'"),
        (["{recipe}", "train.seed=1"], "train.seed is set for every run; give quality.seeds"),
        (["{recipe}", "optm.lr=1"], r"tiny.yaml: .*\s.*'optm.lr'; did you mean 'optim.lr'"),
        (["{recipe}", "eval.ks=[5]"], "eval.ks must hold 10"),
        (
            ["{recipe}", "quality.variants=[encoder.dim=64]"],
            "'tiny, encoder.dim=64' has the same settings as 'tiny'; leave one of them out",
        ),
        (["{recipe}", "quality.variants=['']"], "variants must be distinct and not empty"),
        (["{recipe}", "quality.variants=[train.seed=3]"], "train.seed is set for every run"),
        (["{recipe}", "quality.variants=[encoder.dmi=3]"], r"encoder.dmi=3: .*\s.*'encoder.dim'"),
        (["{recipe}", "{recipe}"], "recipes are told apart by the names of their files"),
        (["{recipe}", "data.path=no/data"], "no/data is no prepared dataset"),
        (["{recipe}", "quality.published=no.yaml"], "quality.published 'no.yaml' does not exist"),
        (["{recipe}", "quality.published={recipe}"], "must hold a list of figures"),
    ],
)
def test_a_mistake_is_a_sentence_before_anything_is_run(
    arguments: list[str], sentence: str, recipe: str, measure: Callable[..., bool], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        measure(*[one.format(recipe=recipe) for one in arguments])
    assert not (tmp_path / "out").exists()


def test_under_a_launcher_it_says_how_to_start_it(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"start it with python.*quality\.processes=N"):
        planned([recipe])


def test_all_problems_of_published_figures_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(
        "beauty:\n"
        "  - {model: a, recall@10: 7, seen_items: hidden, query_time: maybe, source: s}\n"
        "  - {model: b, ndcg@11: 0.1}\n"
        "  - c\n"
    )
    with pytest.raises(ValueError) as failure:
        read_published(path)
    for part in (
        "beauty, entry 1: recall@10 must be a number in [0, 1]; got 7",
        "entry 1: seen_items must be masked or allowed; got hidden",
        "entry 1: query_time must be true or false; got maybe",
        "entry 2: source is missing",
        "entry 2: unknown key 'ndcg@11'",
        "entry 2: recall@10 or ndcg@10 is missing",
        "entry 3: it must be a mapping",
    ):
        assert part in str(failure.value)


def test_a_real_recipe_is_trained_and_then_known_as_done(tmp_path: Path, recipe: str) -> None:
    arguments = [recipe, "quality.seeds=[5]", f"quality.folder={tmp_path / 'out'}"]
    arguments += ["encoder.dim=8", "encoder.num_heads=2", "train.max_epochs=1", "train.device=cpu"]
    command = [sys.executable, "apps/benchmark.py", "quality", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done    tiny seed 5" in done.stdout
    _, (one,) = planned(arguments)
    result = finished(Run(one, 5))
    assert result is not None and result["timing"]["processes"] == 2
    [ours] = [row for row in rows_of(done.stdout) if row[:1] == ["tiny"]][:1]
    chosen = result["valid"]["seen_allowed"]["ndcg@10"]
    tested = [result["test"]["seen_masked"][name] for name in METRICS]
    assert ours[1:6] == [f"{value:.4f}" for value in (chosen, *tested)]
    assert ours[7].endswith("2 x CPU") and ours[8] == result["versions"].get("commit", "unknown")
    assert ours[9].startswith(f"{recipe} encoder.dim=8 encoder.num_heads=2")


def test_a_setting_that_a_later_version_adds_leaves_the_folders(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [recipe, f"quality.folder={tmp_path}"]
    before = planned(arguments)[1][0].folder
    monkeypatch.setattr(
        "hstu_rec.quality.identity", lambda config: {**identity(config), "encoder.new": 1}
    )
    assert planned(arguments)[1][0].folder == before
    assert planned([*arguments, "encoder.dim=24"])[1][0].folder != before

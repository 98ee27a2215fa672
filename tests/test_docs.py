"""The documentation: its python runs, its commands are what the programs accept, its links lead somewhere.

A block is `python` (run, one page in one namespace), `sh` (each command is run, or held against what its
program accepts), `text` (no code) or `console` (not tried; listed in NOT_TRIED with the reason).
"""

import contextlib
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from torch.distributed.run import get_args_parser

import hstu_rec
from hstu_rec.answers import ServeConfig
from hstu_rec.benchmarks import MEASURES
from hstu_rec.config import RunConfig, load
from hstu_rec.data.check import CheckConfig
from hstu_rec.data.prepare import PrepareConfig, prepare
from hstu_rec.export import ExportConfig
from hstu_rec.planning import PlannedRun
from hstu_rec.quality import QualitySettings
from hstu_rec.ranker.config import RankRunConfig
from hstu_rec.ranker.training import train_ranker
from hstu_rec.recommending import RecommendConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted(DOCS.glob("*.md"))
NOTEBOOK = DOCS / "example.ipynb"

NOT_TRIED = {
    "pip install -r requirements/cuda.txt": "downloads CUDA's packages",
    "pip install --config-settings editable_mode=compat -e . torchx": "the same environment",
}
# Sections whose blocks are indented.
INDENTED = {
    "Path of the data": "a drawing",
    "Over HTTP": "another environment, a server and its answer; tests/test_serve.py asks one",
    "Smaller, faster, elsewhere": "a program of 1000 users; tests/test_program.py runs one",
}
# Commands that are run as they stand, on made events; training is run for an epoch by one process.
IS_RUN = {"prepare", "train", "evaluate", "recommend", "export"}
RUN_ON = {"README.md"}
SHORTER = ["train.max_epochs=1", "train.device=cpu"]
# Which argument is a folder that must not be there yet.
MAKES = {"prepare": 1, "export": 1}
SETTINGS_OF = {
    "train": (0, RunConfig),
    "train_ranker": (0, RankRunConfig),
    "plan": (0, PlannedRun),
    "prepare": (2, PrepareConfig),
    "export": (2, ExportConfig),
    "serve": (1, ServeConfig),
    "recommend": (3, RecommendConfig),
}


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line is, its kind, its text."""

    page: Path
    line: int
    kind: str
    text: str


def blocks(page: Path, kind: str | None = None) -> list[Block]:
    """The fenced blocks of a page, of one kind or all."""
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number, line[3:]
        else:
            start, name = opened
            found.append(Block(page, start + 1, name, "\n".join(lines[start + 1 : number])))
            opened = None
    assert opened is None, f"{page.name}: a block is not closed"
    return [block for block in found if kind in (None, block.kind)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell text as words, without comments; a quoted word may span lines."""
    waiting = ""
    for line in text.replace("\\\n", " ").splitlines():
        waiting += f"{line}\n"
        with contextlib.suppress(ValueError):  # No closing quotation: the next line is needed.
            if words := shlex.split(waiting, comments=True):
                yield words
            waiting = ""
    assert not waiting, f"a quote is not closed: {waiting}"


def each_page(*kinds: str) -> pytest.MarkDecorator:
    """One case for every page that has a block of one of the kinds, or for every page."""
    pages = [
        page for page in PAGES if not kinds or any(block.kind in kinds for block in blocks(page))
    ]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it: apps/, configs/ with one of their own, events of theirs."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "apps").symlink_to(ROOT / "apps")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").iterdir():
        (folder / "configs" / path.name).symlink_to(path)
    (folder / "configs" / "mine.yaml").write_text("name: mine\n")
    people = ["A1YJEY40YUW4SE", "A3NHUQ33CFH3VM", *(f"user {number}" for number in range(38))]
    names = ["B004756YJA", *(f"item {number}" for number in range(1, 40))]
    rows = [
        (user, names[(number * 7 + place) % len(names)], 1_388_534_400 + 86_400 * place)
        for number, user in enumerate(people)
        for place in range(4 + number % 9)
    ]
    users, items, times = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    pq.write_table(table, folder / "events.parquet")
    pyarrow.csv.write_csv(table.rename_columns(["user", "item", "ts"]), folder / "events.csv")
    train_shop(folder, table)
    return folder


def train_shop(folder: Path, table: pa.Table) -> None:
    """The ranker of the guide, whose events now and then lack a device."""
    count = range(table.num_rows)
    table = table.append_column("action", pa.array(["buy" if n % 3 else "view" for n in count]))
    devices = [("phone", "tv", None)[n % 7 % 3] for n in count]
    pq.write_table(table.append_column("device", pa.array(devices)), folder / "shop.parquet")
    config = PrepareConfig(feature_columns=["action", "device"], split="share")
    prepare(config, folder / "shop.parquet", folder / "data" / "shop")
    settings = ["ranker.tasks=[action==buy]", "ranker.context=[device]", "train.max_epochs=1"]
    place = [f"data.path={folder}/data/shop", f"train.run_dir={folder}/runs/shop"]
    train_ranker(load(RankRunConfig, [*settings, *place, "train.device=cpu", "encoder.dim=16"]))


# What the pages are made of.


@each_page()
def test_every_block_is_of_a_kind_that_is_tried_or_has_no_code(page: Path) -> None:
    starts = ("python ", "torchrun ", "torchx ", "make ", "pip ", ">>> ", "import ", "from ")
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.kind in ("python", "sh", "text", "console"), where
        if block.kind == "text":
            assert not [line for line in block.text.splitlines() if line.startswith(starts)], where
        if block.kind == "console":
            for line in block.text.splitlines():
                assert line.removeprefix("$ ") in NOT_TRIED, (
                    f"{where} has no reason not to be tried"
                )


@each_page()
def test_blocks_are_fenced(page: Path) -> None:
    section = ""
    for line in prose(page).splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        is_code = line.startswith("    ") and line.strip()
        assert not is_code or section in INDENTED, f"{page.name}, {section}: {line}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page()
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for path, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {path}"
        assert not heading or heading in anchors(target), f"{page.name}: {path}#{heading}"


def test_the_tree_of_the_readme_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text().split("## Path of the data")[1]
    words = set(re.findall(r"\w+", tree))
    sources = (path.relative_to(ROOT / "hstu_rec") for path in (ROOT / "hstu_rec").rglob("*.py"))
    names = {path.parts[0].removesuffix(".py") for path in sources} - {"__init__"}
    apps = {path.stem for path in (ROOT / "apps").glob("*.py")}
    assert not (names | apps) - words


def test_the_reference_has_every_public_name() -> None:
    told = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    public = {f"hstu_rec.{name}" for name in hstu_rec.__all__}
    # The same class, where the sections of the configuration are.
    assert public - {"hstu_rec.EncoderConfig"} <= told


# What they say, done.


@each_page("python")
def test_the_python_of_a_page_runs(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        # As many empty lines before it as the page has, so that a traceback names the page's line.
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    if page.name == "README.md":
        assert "A1YJEY40YUW4SE" in capfd.readouterr().out


@each_page("sh")
def test_the_commands_of_a_page_are_run_or_accepted(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    for block in blocks(page, "sh"):
        for words in commands(block.text):
            app, arguments = accepted(words)
            if page.name in RUN_ON and app in IS_RUN:
                carry_out(app, arguments)


@each_page()
def test_the_commands_in_sentences_are_accepted(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    for text in re.findall(
        r"`((?:python |torchrun |torchx run )?[^`\s]*\s?apps/[^`]+)`", prose(page)
    ):
        if text.split()[0].startswith(("python", "torchrun", "torchx", "apps/")) and ".py" in text:
            words = shlex.split(re.sub(r"\s+", " ", text))
            accepted(["python", *words] if words[0].startswith("apps/") else words)


def accepted(words: list[str]) -> tuple[str, list[str]]:
    """(app or "", its arguments) of a command, after what launches it and its settings are checked."""
    program = words[0].rsplit("/")[-1]
    if program == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        words = ["python", given.training_script, *given.training_script_args]
    elif program == "torchx":
        words = ["python", *of_torchx(words)]
    elif program == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return "", []
    elif program == ".":
        assert words[1:] == [".venv/bin/activate"]
        return "", []
    else:
        assert program == "python", words
    if words[1] == "-m":
        assert words[2:4] == ["pytest", "-q"] and (ROOT / words[4]).is_file(), words
        return "", []
    path = Path(words[1])
    assert (ROOT / path).is_file() and path.parent.name == "apps", words
    arguments = [placed(word) for word in words[2:]]
    if arguments and "help" not in arguments:
        check(path.stem, arguments)
    return path.stem, arguments


def of_torchx(words: list[str]) -> list[str]:
    """The script and its arguments of a `torchx run` command, as torchx itself understands it."""
    from torchx.runner import get_runner

    at = words.index("dist.ddp")
    options = words[2:at]
    assert words[1] == "run" and set(options[::2]) <= {"-s", "-cfg"}, words
    given = words[at + 1 :]
    if "--script" not in given:
        script = next(index for index, word in enumerate(given) if word.endswith(".py"))
        given = [*given[:script], "--script", given[script], "--", *given[script + 1 :]]
    kept = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    with get_runner() as runner:
        job = runner.dryrun_component("dist.ddp", given, "local_cwd").request
    for one, handler in kept.items():  # torchx takes them for this process
        signal.signal(one, handler)
    assert job.role_params, words
    script = given.index("--script") + 1
    return [given[script], *given[script + 2 :]]


def placed(word: str) -> str:
    """A word with what the reader is to put in its place."""
    if "<time>" in word:
        found = sorted(Path().glob(word.replace("<time>", "*")))
        return str(found[-1]) if found else word
    return re.sub(r"^(CONFIG|RECIPE)\.yaml$", "configs/demo.yaml", word)


def check(app: str, arguments: list[str]) -> None:
    """Raises ValueError for arguments that the app would refuse before it looks at any data."""
    if app in SETTINGS_OF and arguments[:1] != ["check=data/mine"]:
        num_positional, schema = SETTINGS_OF[app]
        assert not [word for word in arguments[:num_positional] if "=" in word], arguments
        load(schema, arguments[num_positional:])
    elif app == "prepare":
        load(CheckConfig, arguments)
    elif app == "evaluate":
        load(RunConfig, arguments[1:])
    elif app == "make_events":
        kinds = runpy.run_path("apps/make_events.py")["KINDS"]
        load(kinds[arguments[0]][0], arguments[2:])
    elif arguments[0] == "quality":
        own = [word for word in arguments[1:] if word.startswith("quality.")]
        load(QualitySettings, own)
        for variant in load(QualitySettings, own).quality.variants or [""]:
            rest = [word for word in arguments[1:] if word not in own]
            load(RunConfig, [*rest, *variant.split()])
    else:
        assert app == "benchmark", app
        load(MEASURES[arguments[0]][0], arguments[1:])


def carry_out(app: str, arguments: list[str]) -> None:
    """Runs an app in this process, in the folder as it is."""
    if app in MAKES and len(arguments) > MAKES[app]:
        shutil.rmtree(arguments[MAKES[app]], ignore_errors=True)
    runpy.run_path(f"apps/{app}.py")["main"]([*arguments, *(SHORTER if app == "train" else [])])


def test_what_the_readme_runs_leaves_what_it_says(world: Path) -> None:
    """After its commands, which the test above has run."""
    (run,) = (world / "runs").glob("*-mine")
    assert {"report.md", "curves.png", "result.json", "metrics.jsonl", "config.yaml"} <= {
        path.name for path in run.iterdir()
    }
    parts = [pq.read_table(part) for part in (world / "recommendations").glob("*.parquet")]
    assert sum(part.num_rows for part in parts) == 40 * 10


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("python apps/train.py optm.lr=1", "optim.lr"),
        ("torchrun --nproc-per-node 2 apps/train.py train.sed=1", "train.seed"),
        ("torchx run -s local_cwd dist.ddp -j 1x2 apps/train.py optm.lr=1", "optim.lr"),
        ("python apps/prepare.py in out kcor=5", "kcore"),
        ("python apps/benchmark.py quality configs/beauty.yaml quality.seed=1", "quality.seeds"),
        ("python apps/benchmark.py loss no.such.key=1", "no.such.key"),
    ],
)
def test_a_command_that_is_wrong_would_be_found(
    text: str, sentence: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        accepted(shlex.split(text))


# The notebook.

SHOWN = "\nimport matplotlib\nmatplotlib.use('agg')\n"
REACHED = (
    "\nprint(json.dumps({name: of['seen_masked']['recall@1'] for name, of in methods.items()}))"
)


def test_the_notebook_runs_from_top_to_bottom_and_learns_its_rule(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([SHOWN, *code, REACHED])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    reached = json.loads(done.stdout.splitlines()[-1])
    assert reached["model"] > 0.7 > reached["co_occurrence"] > reached["popularity"]


def test_the_notebook_shows_what_its_cells_give_and_is_small() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 200_000 and str(Path.home()) not in text and "/tmp/" not in text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [
        one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"
    ]
    assert any("image/png" in one.get("data", {}) for one in outputs)

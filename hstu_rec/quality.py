"""quality(arguments): recipes trained with several seeds, and one table of them beside published figures.

    recipes (YAML) x seeds --planned--> Runs --train_all--> a result.json each --compared--> quality.md

A run is a process group of its own, launched as a user launches apps/train.py, in

    quality.folder/<recipe>-<digest>/seed_<seed>/      and seed_<seed>.log beside it

The digest is of the resolved configuration and of the data, so that a changed recipe is another folder and
what is done is never run again. Of the code the tables tell the commit that each row was made with: after a
change of it, give another quality.folder. A stopped run goes on.
"""

import fcntl
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from hstu_rec import distributed
from hstu_rec.checkpoint import write_file
from hstu_rec.comparison import Measured, Table, compared, details, draw, page, read_published
from hstu_rec.config import RunConfig, leaves, load, save
from hstu_rec.data.dataset import Dataset
from hstu_rec.data.synthetic import prepare_if_demo
from hstu_rec.learner import resolved
from hstu_rec.versions import commit

TREE = Path(__file__).parent.parent
TRAIN_APP = TREE / "apps" / "train.py"
PUBLISHED = TREE / "configs" / "published.yaml"
# What quality sets itself in every run.
OWN_KEYS = ("train.seed", "train.run_dir", "train.resume")
POLL_S = 0.2
# torchrun gives its processes 30 s to end.
STOP_S = 40.0
# The last of the first pattern that a log has: an error's own line, a killed process in torchrun's report.
REASONS = (r"^(?:error|[\w.]+(?:Error|Exception)): \S.*", r"Signal \d+ .*", r"\S.*")


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """How recipes are measured."""

    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds that every recipe is trained with."""
    variants: list[str] = field(default_factory=list)
    """Changes that every recipe is also trained with, each alone: key=value, or several with spaces."""
    folder: str = "runs/quality"
    """Folder of the runs, quality.md, quality.json and quality.png."""
    processes: int = 0
    """Processes of a run; 0 takes 1 on CUDA and 2 on CPU."""
    jobs: int = 1
    """Runs at a time, dealt to the GPUs; more than one on the same hardware make each other's time longer."""
    published: str = ""
    """YAML file of published figures; configs/published.yaml when empty."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a sentence each."""
        found = []
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            found.append(f"seeds must be distinct numbers, one at least; got {list(self.seeds)}")
        if len(set(self.variants)) != len(self.variants) or "" in self.variants:
            found.append(f"variants must be distinct and not empty; got {list(self.variants)}")
        if outside := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            found.append(f"seeds must be in 0..{2**32 - 1}; got {outside}")
        if not self.folder:
            found.append("folder must not be empty; give one such as runs/quality")
        if self.processes < 0:
            found.append(f"processes must be at least 0; got {self.processes}")
        if self.jobs < 1:
            found.append(f"jobs must be at least 1; got {self.jobs}")
        return found


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """The keys of quality itself; all others are the runs' own."""

    quality: QualityConfig = field(default_factory=QualityConfig)


@dataclass(frozen=True, eq=False)
class Recipe:
    """A YAML file, resolved with the overrides of all runs; equal to itself alone."""

    file: str
    variant: str  # of quality.variants, or ""
    config: RunConfig
    facts: dict[str, Any]  # of the data, as a result's protocol.data has them
    folder: Path

    @property
    def name(self) -> str:
        """What the recipe is called in tables."""
        return ", ".join(filter(None, [Path(self.file).stem, self.variant]))


@dataclass(frozen=True)
class Run:
    """One seed of a recipe."""

    recipe: Recipe
    seed: int

    @property
    def folder(self) -> Path:
        """The run's folder, train.run_dir."""
        return self.recipe.folder / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        """What the run's processes print."""
        return self.recipe.folder / f"seed_{self.seed}.log"

    def __str__(self) -> str:
        return f"{self.recipe.name} seed {self.seed}"


class Active(NamedTuple):
    """A run in progress."""

    process: subprocess.Popen[bytes]
    began_at: float
    slot: int  # of quality.jobs; it has GPUs of its own where there are enough


def quality(arguments: Sequence[str]) -> bool:
    """Trains what is not done yet, writes and prints the tables; False when a run failed.

    Raises ValueError or FileNotFoundError, before anything is run, for what no run could be made of.
    """
    settings, recipes = planned(arguments)
    published = read_published(Path(settings.published or PUBLISHED))
    runs = [Run(recipe, seed) for recipe in recipes for seed in settings.seeds]
    waiting = [run for run in runs if finished(run) is None]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done already", flush=True)
    failures = train_all(waiting, settings)
    measured = [_measured(recipe, settings.seeds, failures) for recipe in recipes]
    tables = compared(measured, published)
    print("\n" + _write(Path(settings.folder), measured, tables))
    return not failures


def planned(arguments: Sequence[str]) -> tuple[QualityConfig, list[Recipe]]:
    """The settings and the recipes that `arguments` give, all problems told at once."""
    if distributed.is_launched():
        raise ValueError(
            "quality launches the processes of its runs itself; start it with python: "
            "python apps/benchmark.py quality RECIPE.yaml, and give quality.processes=N"
        )
    words = [word for one in arguments if (word := one.removeprefix("--"))]
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    own = [word for word in words if word.startswith("quality.") and word not in files]
    shared = [word for word in words if word not in files and word not in own]
    settings = load(QualitySettings, own).quality
    if not files:
        raise ValueError(
            "give at least one recipe: python apps/benchmark.py quality configs/beauty.yaml"
        )
    problems = list(_argument_problems(files, [*shared, *" ".join(settings.variants).split()]))
    recipes: list[Recipe] = []
    wanted = [(file, variant) for file in files for variant in ("", *settings.variants)]
    for file, variant in wanted if not problems else []:
        try:
            recipes.append(_recipe(file, variant, shared, Path(settings.folder)))
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"{' '.join(filter(None, [file, variant]))}: {error}")
    problems += _equal_recipes(recipes)
    if problems:
        raise ValueError("no run was started:\n  " + "\n  ".join(problems))
    return settings, recipes


def _argument_problems(files: Sequence[str], shared: Sequence[str]) -> Iterator[str]:
    """What is wrong with recipes and overrides taken together."""
    names = [Path(file).stem for file in files]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        same = ", ".join(f for f in files if Path(f).stem == name)
        yield f"recipes are told apart by the names of their files; got {same}: rename one"
    for key in (word.split("=", 1)[0] for word in shared):
        if key in OWN_KEYS:
            yield f"{key} is set for every run; give quality.seeds and quality.folder instead"
        if f"quality.{key}" in leaves(QualitySettings()):
            yield f"unknown key '{key}'; did you mean 'quality.{key}'?"


def _equal_recipes(recipes: Sequence[Recipe]) -> Iterator[str]:
    """Recipes that would be the same runs: a variant that changes nothing."""
    by_folder: dict[Path, str] = {}
    for recipe in recipes:
        first = by_folder.setdefault(recipe.folder, recipe.name)
        if first != recipe.name:
            yield f"'{recipe.name}' has the same settings as '{first}'; leave one of them out"


def _recipe(file: str, variant: str, shared: Sequence[str], folder: Path) -> Recipe:
    """The recipe with its data looked at, and the folder that its digest names."""
    config = load(RunConfig, [file, *shared, *variant.split()])
    if 10 not in config.eval.ks:
        raise ValueError(f"eval.ks must hold 10, which tables compare; got {config.eval.ks}")
    prepare_if_demo(config.data.path)
    dataset = Dataset(config.data.path)
    config, facts = resolved(config, dataset), _identity_of_data(dataset.facts)
    content = json.dumps([_identity(config), facts], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return Recipe(file, variant, config, facts, folder / f"{Path(file).stem}-{digest}")


def _identity(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run what it is, but for its seed."""
    return {key: value for key, value in leaves(config).items() if key not in OWN_KEYS}


def _identity_of_data(facts: dict[str, Any]) -> dict[str, Any]:
    """Statistics without the time that they took."""
    return {name: value for name, value in facts.items() if name != "prepare_s"}


def finished(run: Run) -> dict[str, Any] | None:
    """The run's result.json, None while there is none.

    Raises ValueError when the folder holds a run of another configuration, seed or data.
    """
    written = run.folder / "config.yaml"
    if not written.is_file():
        return None
    there = load(RunConfig, [str(written)])
    is_other = _identity(there) != _identity(run.recipe.config) or there.train.seed != run.seed
    path = run.folder / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if result is not None:
        is_other |= _identity_of_data(result["protocol"]["data"]) != run.recipe.facts
    if is_other:
        raise ValueError(
            f"{run.folder} holds another run than {run}, changed by hand or cut short; remove that "
            "folder, or give another quality.folder"
        )
    return result


def train_all(runs: Sequence[Run], settings: QualityConfig) -> dict[Run, str]:
    """Trains the runs, quality.jobs at a time; the reason of each that failed.

    Whatever ends this function early, Ctrl-C or a signal, ends the runs that are in progress.
    """
    waiting, active = list(runs), dict[Run, Active]()
    free, failures = list(range(settings.jobs)), {}
    with _signals_as_interrupts():
        try:
            while waiting or active:
                while waiting and free:
                    run = waiting.pop(0)
                    print(f"begins  {run}  {run.log}", flush=True)
                    try:
                        process = _launch(run, settings, free[0])
                    except BlockingIOError:
                        failures[run] = "another process is training it"
                        print(f"failed  {run}  {failures[run]}", flush=True)
                        continue
                    active[run] = Active(process, time.monotonic(), free.pop(0))
                time.sleep(POLL_S)
                for run in [run for run, one in active.items() if one.process.poll() is not None]:
                    process, began_at, slot = active.pop(run)
                    free.append(slot)
                    spent = f"{time.monotonic() - began_at:.0f} s"
                    if reason := _reason(run, process.returncode):
                        failures[run] = reason
                        print(f"failed  {run}  {spent}  {reason}", flush=True)
                    else:
                        print(f"done    {run}  {spent}", flush=True)
        finally:
            _stop([one.process for one in active.values()])
    return failures


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP, unless they are ignored or handled already, act as Ctrl-C does."""
    plain = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for one in plain:
        signal.signal(one, signal.default_int_handler)
    try:
        yield
    finally:
        for one in plain:
            signal.signal(one, signal.SIG_DFL)


def _launch(run: Run, settings: QualityConfig, slot: int) -> subprocess.Popen[bytes]:
    """The run's launcher, started. The recipe is given as resolved now: its file may change meanwhile.

    Raises BlockingIOError while another process trains the same run: its log is locked for as long as any
    process of the run has it open.
    """
    run.recipe.folder.mkdir(parents=True, exist_ok=True)
    save(run.recipe.config, run.recipe.folder / "recipe.yaml")
    with run.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.truncate(0)
        # In a session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
        return subprocess.Popen(
            _command(run, settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=distributed.environment_of(slot, _num_processes(run, settings)),
            start_new_session=True,
        )


def _num_processes(run: Run, settings: QualityConfig) -> int:
    is_cuda = distributed.uses_cuda(run.recipe.config.train.device)
    return settings.processes or (1 if is_cuda else 2)


def _command(run: Run, settings: QualityConfig) -> list[str]:
    """A run as a user would start it, on a free port; with nothing to resume, auto begins anew."""
    processes = str(_num_processes(run, settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [
        sys.executable,
        *launcher,
        str(TRAIN_APP),
        str(run.recipe.folder / "recipe.yaml"),
        f"train.seed={run.seed}",
        f"train.run_dir={run.folder}",
        "train.resume=auto",
    ]


def _reason(run: Run, code: int) -> str:
    """Why an ended run failed, by the line of its log that tells it; "" when it did not."""
    try:
        if code == 0 and finished(run) is not None:
            return ""
    except ValueError as error:
        return str(error)
    text = run.log.read_text(encoding="utf-8", errors="replace")
    found = (re.findall(pattern, text, re.MULTILINE) for pattern in REASONS)
    return next((lines[-1].strip() for lines in found if lines), "it printed nothing")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends launchers, which end their processes."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _measured(recipe: Recipe, seeds: Sequence[int], failures: dict[Run, str]) -> Measured:
    """The recipe's results and failures."""
    runs = {seed: Run(recipe, seed) for seed in seeds}
    defaults = leaves(RunConfig())
    results = {seed: finished(run) for seed, run in runs.items() if run not in failures}
    return Measured(
        name=recipe.name,
        file=recipe.file,
        data_path=recipe.config.data.path,
        uses_query_time=recipe.config.encoder.query_time == "next",
        changes={k: v for k, v in _identity(recipe.config).items() if v != defaults[k]},
        folder=recipe.folder,
        results={seed: result for seed, result in results.items() if result is not None},
        failures={seed: failures[run] for seed, run in runs.items() if run in failures},
    )


def _write(folder: Path, measured: Sequence[Measured], tables: Sequence[Table]) -> str:
    """Writes quality.md, quality.json and quality.png; the tables as text."""
    made_of = commit()
    opening = (
        f"{date.today()}{f', at commit {made_of}' if made_of else ''}. Test figures of this package: mean "
        "± sample standard deviation over seeds. Training is the mean time of a run's steps, validations "
        "not counted; commit is what the runs were made with."
    )
    shown = page(measured, tables, opening)
    picture = "![Recall@10 and NDCG@10 by protocol](quality.png)"
    content = {
        "date": str(date.today()),
        "commit": made_of,
        "tables": [{**asdict(table), "protocol": table.protocol} for table in tables],
        "recipes": [{**asdict(one), "folder": str(one.folder)} for one in measured],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "quality.png", draw(tables))
    write_file(folder / "quality.json", (json.dumps(content, indent=2) + "\n").encode())
    write_file(folder / "quality.md", f"{shown}\n{picture}\n\n{details(measured)}".encode())
    return f"{shown}\nwritten: {folder}/quality.md, quality.json, quality.png"

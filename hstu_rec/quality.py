"""quality(arguments): recipes trained with several seeds, and one table of them beside published figures.

recipes (YAML) x seeds --planned--> Runs --train_all--> a result.json each --compared--> quality.md
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from hstu_rec import distributed
from hstu_rec.comparison import Measured, Table, compared, details, draw, page, read_published
from hstu_rec.config import RunConfig, leaves, load
from hstu_rec.data.demo import prepare_if_demo
from hstu_rec.data.stream import open_dataset
from hstu_rec.durable import write_file
from hstu_rec.learner import resolved
from hstu_rec.runs import (
    OWN_KEYS,
    TREE,
    Recipe,
    Run,
    finished,
    identity,
    identity_of_data,
    train_all,
)
from hstu_rec.settings import at_least
from hstu_rec.versions import commit

PUBLISHED = TREE / "configs" / "published.yaml"


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
        return found + at_least(self, 0, "processes") + at_least(self, 1, "jobs")


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """The keys of quality itself; all others are the runs' own."""

    quality: QualityConfig = field(default_factory=QualityConfig)


def quality(arguments: Sequence[str]) -> bool:
    """Trains what is not done yet, writes and prints the tables; False when a run failed.

    Raises ValueError or FileNotFoundError, before anything is run, for what no run could be made of.
    """
    settings, recipes = planned(arguments)
    published = read_published(Path(settings.published or PUBLISHED))
    runs = [Run(recipe, seed) for recipe in recipes for seed in settings.seeds]
    waiting = [run for run in runs if finished(run) is None]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done already", flush=True)
    failures = train_all(waiting, settings.jobs, settings.processes)
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
    dataset = open_dataset(config.data)
    config, facts = resolved(config, dataset), identity_of_data(dataset.facts)
    content = json.dumps([_changes(config), facts], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return Recipe(
        file, tuple(shared), variant, config, facts, folder / f"{Path(file).stem}-{digest}"
    )


def _changes(config: RunConfig) -> dict[str, Any]:
    """The settings that are not the defaults: one that a later version adds leaves the folders' names."""
    defaults = identity(RunConfig())
    return {key: value for key, value in identity(config).items() if value != defaults[key]}


def _measured(recipe: Recipe, seeds: Sequence[int], failures: dict[Run, str]) -> Measured:
    """The recipe's results and failures."""
    runs = {seed: Run(recipe, seed) for seed in seeds}
    results = {seed: finished(run) for seed, run in runs.items() if run not in failures}
    return Measured(
        name=recipe.name,
        file=recipe.file,
        given=[*recipe.given, *recipe.variant.split()],
        data_path=recipe.config.data.path,
        uses_query_time=recipe.config.encoder.query_time == "next",
        changes=_changes(recipe.config),
        folder=recipe.folder,
        results={seed: result for seed, result in results.items() if result is not None},
        failures={seed: failures[run] for seed, run in runs.items() if run in failures},
    )


def _write(folder: Path, measured: Sequence[Measured], tables: Sequence[Table]) -> str:
    """Writes quality.md, quality.json and quality.png; the tables as text."""
    made_of = commit()
    opening = (
        f"{date.today()}{f', at commit {made_of}' if made_of else ''}. Test figures of this package: mean "
        "± sample standard deviation over seeds. Validation is what chose the models; choose variants by it. "
        "Training is the mean time of a run's steps, validations "
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

"""Recipes over several seeds, beside published figures and baselines: a table a protocol, and a picture.

    result.json of every seed  --compared-->  Table(data set, query time, seen items) of Rows
    configs/published.yaml  ------^              --page, draw-->  quality.md, quality.png

Figures under different protocols never meet in one table: seen items masked and allowed are two, and so
are query time used and not used.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError, safe_load

from hstu_rec.drawing import BLUE, GREY, INK, dress, new_figure, png
from hstu_rec.report import (
    SEEN_ITEMS,
    duration,
    listing,
    markdown_table,
    protocol_line,
    query_time_used,
    words,
)

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
DRAWN = {"recall@10": "Recall@10", "ndcg@10": "NDCG@10"}
LIGHT_GREY = "#d8dde3"
COLOURS = {"ours": BLUE, "published": GREY, "baseline": LIGHT_GREY}
LEGEND = {"ours": "hstu_rec", "published": "published", "baseline": "baselines"}
PUBLISHED_KEYS = ("model", "seen_items", "query_time", "source")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A recipe, and what its seeds gave: a result (that of result.json) or the reason why there is none."""

    name: str
    file: str
    data_path: str
    uses_query_time: bool
    given: list[str]  # settings given besides the file
    changes: dict[str, Any]  # settings that are not the defaults
    folder: Path
    results: dict[int, dict[str, Any]]
    failures: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method under one protocol; `stds` is empty where there is one seed or no seed."""

    kind: Literal["ours", "published", "baseline"]
    label: str
    means: dict[str, float]
    source: str
    stds: dict[str, float] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    valid: list[float] = field(
        default_factory=list
    )  # of each seed, the metric that chose the model
    train_s: float | None = None
    trained_on: str = ""
    commits: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Table:
    """All methods of one data set that were measured in the same way."""

    data_path: str
    uses_query_time: bool
    seen: str  # as in result.json: seen_masked, seen_allowed
    rows: list[Row]

    @property
    def protocol(self) -> str:
        """What sets this table apart from the others of its data set."""
        return f"seen items {SEEN_ITEMS[self.seen]}, {query_time_used(self.uses_query_time)}"


def read_published(path: Path, key: str = "quality.published") -> dict[str, list[dict[str, Any]]]:
    """Published figures by the name of the dataset folder; configs/published.yaml shows the form.

    Raises FileNotFoundError without the file, ValueError that names every entry that is not of the form.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{key} '{path}' does not exist; give a YAML file like configs/published.yaml"
        )
    try:
        content = safe_load(path.read_text(encoding="utf-8")) or {}
    except YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise ValueError(f"{path} must hold a list of figures under each data set's name")
    problems = [
        f"{name}, entry {number}: {problem}"
        for name, figures in content.items()
        for number, figure in enumerate(figures, start=1)
        for problem in _figure_problems(figure)
    ]
    if problems:
        raise ValueError(f"{path} has problems:\n  " + "\n  ".join(problems))
    return content


def _figure_problems(figure: Any) -> Iterator[str]:
    if not isinstance(figure, dict):
        yield f"it must be a mapping of {', '.join(PUBLISHED_KEYS)} and figures; got {figure}"
        return
    yield from (f"{key} is missing" for key in PUBLISHED_KEYS if key not in figure)
    for key in figure.keys() - {*PUBLISHED_KEYS, *METRICS}:
        yield f"unknown key '{key}'; allowed are {', '.join((*PUBLISHED_KEYS, *METRICS))}"
    if not figure.keys() & DRAWN.keys():
        yield f"{' or '.join(DRAWN)} is missing"
    for key in figure.keys() & set(METRICS):
        if not isinstance(figure[key], int | float) or not 0 <= figure[key] <= 1:
            yield f"{key} must be a number in [0, 1]; got {figure[key]}"
    if figure.get("seen_items", "masked") not in SEEN_ITEMS.values():
        yield f"seen_items must be masked or allowed; got {figure['seen_items']}"
    if not isinstance(figure.get("query_time", False), bool):
        yield f"query_time must be true or false; got {figure['query_time']}"


def rows_beside(
    paths: Sequence[str], data_path: str, facts: Mapping[str, Any], uses_query_time: bool
) -> dict[str, Any]:
    """Rows for `further` of a result.json: of the runs and published figures in `paths` that were measured on
    the same data (`facts`, or for published figures the name of the dataset folder) with the same use of the
    query time.

    Raises ValueError, or FileNotFoundError, for a path that gives none.
    """
    rows: dict[str, Any] = {}
    for path in map(Path, paths):
        found = (
            _rows_of_run(path, facts, uses_query_time)
            if path.is_dir()
            else _rows_published(path, data_path, uses_query_time)
        )
        if twice := rows.keys() & found.keys():
            raise ValueError(f"eval.compare_with gives {', '.join(twice)} twice; leave one out")
        rows |= found
    return rows


def _rows_of_run(
    folder: Path, facts: Mapping[str, Any], uses_query_time: bool
) -> dict[str, dict[str, Any]]:
    path = folder / "result.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"eval.compare_with: {folder} has no {path.name}; give a run folder that is through"
        )
    result = json.loads(path.read_text(encoding="utf-8"))
    there = result["protocol"]
    if "use_query_time" not in there:
        raise ValueError(
            f"eval.compare_with: {folder} is no run of apps/train.py; give one, or leave it out"
        )
    changed = [
        name
        for name, value in facts.items()
        if name not in ("prepare_s", "format_version") and there["data"].get(name) != value
    ]
    if changed or there["use_query_time"] != uses_query_time:
        what = (
            f"other data ({', '.join(changed[:3])})" if changed else "another use of the query time"
        )
        raise ValueError(
            f"eval.compare_with: {folder} was measured with {what}, and cannot stand in the same table; "
            "leave it out"
        )
    return {f"run {folder.resolve().name}": result["test"]}


def _rows_published(path: Path, data_path: str, uses_query_time: bool) -> dict[str, dict[str, Any]]:
    name = Path(data_path).name
    parts = {label: seen for seen, label in SEEN_ITEMS.items()}
    rows: dict[str, dict[str, Any]] = {}
    for one in read_published(path, "eval.compare_with").get(name, []):
        if one["query_time"] == uses_query_time:
            label = f"{one['model']} ({one['source']})".replace("|", "/")
            figures = {metric: float(one[metric]) for metric in METRICS if metric in one}
            rows.setdefault(label, {})[parts[one["seen_items"]]] = figures
    if not rows:
        raise ValueError(
            f"eval.compare_with: {path} has no figure of a data set '{name}' with "
            f"{query_time_used(uses_query_time)}; leave it out"
        )
    return rows


def compared(
    measured: Sequence[Measured], published: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Table]:
    """A table for each data set, use of the query time and treatment of seen items that a recipe has.

    In each: the recipes as given, published figures by NDCG@10, the baselines of the first result.
    """
    tables = []
    groups = dict.fromkeys((one.data_path, one.uses_query_time) for one in measured)
    for data_path, uses_query_time in groups:
        group = [
            one
            for one in measured
            if (one.data_path, one.uses_query_time) == (data_path, uses_query_time)
        ]
        figures = [
            one
            for one in published.get(Path(data_path).name, [])
            if one["query_time"] == uses_query_time
        ]
        for seen, label in SEEN_ITEMS.items():
            rows = [_own_row(one, seen) for one in group]
            rows += _published_rows(one for one in figures if one["seen_items"] == label)
            rows += _baseline_rows(group, seen)
            tables.append(
                Table(data_path=data_path, uses_query_time=uses_query_time, seen=seen, rows=rows)
            )
    return tables


def _own_row(one: Measured, seen: str) -> Row:
    """Mean and sample standard deviation over the recipe's seeds.

    Told in the label where it counts: a model that learned how likely repeats are has ranked seen items by
    it, where they are allowed; those published have not.
    """
    has_bias = seen == "seen_allowed" and one.changes.get("loss.use_seen_bias", False)
    results = list(one.results.values())
    values = {
        name: [result["test"][seen][name] for result in results]
        for name in METRICS
        if results and all(name in result["test"][seen] for result in results)
    }
    timings = [result["timing"] for result in results]
    failed = [
        f"failed with seed {_listed(str(s) for s, why in one.failures.items() if why == reason)}: "
        + reason
        for reason in dict.fromkeys(one.failures.values())
    ]
    return Row(
        kind="ours",
        label=f"{one.name} (seen bias)" if has_bias else one.name,
        means={name: statistics.fmean(numbers) for name, numbers in values.items()},
        stds={name: statistics.stdev(v) for name, v in values.items() if len(v) > 1},
        source="; ".join([" ".join([one.file, *one.given]), *failed]),
        valid=[_selected(result) for result in results],
        seeds=list(one.results),
        train_s=statistics.fmean(t["train_s"] for t in timings) if timings else None,
        trained_on=_listed(
            f"{t['processes']} x {t['device']}" for t in timings if "processes" in t
        ),
        commits=list(dict.fromkeys(r["versions"].get("commit") or "unknown" for r in results)),
    )


def _published_rows(figures: Iterable[Mapping[str, Any]]) -> list[Row]:
    rows = [
        Row(
            kind="published",
            label=str(one["model"]),
            means={name: float(one[name]) for name in METRICS if name in one},
            source=str(one["source"]),
        )
        for one in figures
    ]
    return sorted(rows, key=lambda row: row.means.get("ndcg@10", 0), reverse=True)


def _baseline_rows(group: Sequence[Measured], seen: str) -> list[Row]:
    """The baselines are a matter of the data alone: any result of the group has the same."""
    results = (result for one in group for result in one.results.values())
    baselines = next((result["baselines"] for result in results if result["baselines"]), {})
    return [
        Row(
            kind="baseline",
            label=words(name),
            means={metric: parts[seen][metric] for metric in METRICS if metric in parts[seen]},
            source="counted on the training part",
        )
        for name, parts in baselines.items()
    ]


def page(measured: Sequence[Measured], tables: Sequence[Table], opening: str) -> str:
    """The tables as markdown, by data set, each with the protocol of its recipes."""
    names = {path: Path(path).name for path in dict.fromkeys(one.data_path for one in measured)}
    parts = ["# Quality", opening]
    for path, name in names.items():
        is_alone = list(names.values()).count(name) == 1
        parts += [f"## {name if is_alone else path}", *_protocols(measured, path)]
        for table in tables:
            if table.data_path == path:
                parts.append(f"### {table.protocol[0].upper()}{table.protocol[1:]}")
                parts.append(markdown_table(list(_cells(table))))
    return "\n\n".join(parts) + "\n"


def details(measured: Sequence[Measured]) -> str:
    """What each recipe changes, and where its runs are, as markdown."""
    parts = ["## Details"]
    for one in measured:
        parts.append(f"### {one.name}")
        command = " ".join([one.file, *one.given])
        parts.append(f"`{command}`, runs in `{one.folder}`. Settings that are not the defaults:")
        parts.append(listing(one.changes, "setting") or "none")
    return "\n\n".join(parts) + "\n"


def _protocols(measured: Sequence[Measured], path: str) -> list[str]:
    """The protocol of the data set's recipes: one line, or one for each that differs, with its recipes."""
    lines: dict[str, list[str]] = {}
    for one in measured:
        for result in list(one.results.values())[:1]:
            if one.data_path == path:
                line = f"{protocol_line(result['protocol'])} Ties with the target are never hits."
                lines.setdefault(line, []).append(one.name)
    if len(lines) == 1:
        return list(lines)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def _cells(table: Table) -> Iterator[list[str]]:
    """The header, then one row for each method."""
    measured = [name for name in METRICS if any(name in row.means for row in table.rows)]
    yield ["model", "validation", *measured, "seeds", "training", "commit", "source"]
    for row in table.rows:
        yield [
            row.label,
            _mean_and_spread(row.valid),
            *(_value(row, name) for name in measured),
            _listed(map(str, row.seeds)) or ("none" if row.kind == "ours" else ""),
            _trained(row),
            _listed(row.commits),
            row.source.replace("|", "\\|"),
        ]


def _selected(result: Mapping[str, Any]) -> float:
    """The validation value that chose a run's model."""
    seen, metric = result["protocol"]["selection_metric"].split("/")
    return result["valid"][seen][metric]


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _value(row: Row, metric: str) -> str:
    if metric not in row.means:
        return ""
    spread = f" ± {row.stds[metric]:.4f}" if metric in row.stds else ""
    return f"{row.means[metric]:.4f}{spread}"


def _trained(row: Row) -> str:
    """How long and on what, as far as it is known."""
    if row.train_s is None:
        return ""
    return ", ".join([duration(row.train_s), *([row.trained_on] if row.trained_on else [])])


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def draw(tables: Sequence[Table]) -> bytes:
    """A PNG of bars: a panel a table and metric, the best Recall@10 on top, errors of one deviation."""
    from matplotlib.patches import Patch

    ranked = [sorted((r for r in t.rows if r.means), key=_by_recall) for t in tables]
    # In inches: of the bars, and what title, axis and gap of a panel take.
    heights = [0.27 * max(len(rows), 1) for rows in ranked]
    figure = new_figure(12, sum(heights) + len(tables) + 0.5)
    grid = figure.subplots(len(tables), len(DRAWN), squeeze=False, height_ratios=heights)
    for table, rows, panels in zip(tables, ranked, grid, strict=True):
        for axes, (metric, name) in zip(panels, DRAWN.items(), strict=True):
            is_first = axes is panels[0]
            title = f"{Path(table.data_path).name}: {table.protocol}" if is_first else ""
            dress(axes, title, name)
            _draw_bars(axes, rows, metric, is_first)
    kinds = [kind for kind in LEGEND if any(row.kind == kind for rows in ranked for row in rows)]
    figure.legend(
        handles=[Patch(color=COLOURS[kind], label=LEGEND[kind]) for kind in kinds],
        loc="outside lower center",
        ncols=max(len(kinds), 1),
        frameon=False,
        labelcolor=INK,
    )
    return png(figure)


def _by_recall(row: Row) -> float:
    return row.means.get("recall@10", 0.0)


def _draw_bars(axes: Any, rows: Sequence[Row], metric: str, has_labels: bool) -> None:
    """Horizontal bars with their values; the last row is on top."""
    axes.grid(visible=False)
    axes.xaxis.get_major_locator().set_params(integer=False, nbins=6)
    axes.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    axes.set_yticks(range(len(rows)), [row.label if has_labels else "" for row in rows])
    ends = [row.means.get(metric, 0.0) + row.stds.get(metric, 0.0) for row in rows]
    # Room for the values behind the bars.
    axes.set_xlim(0, max([1e-6, *ends]) * 1.4)
    for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
        is_given = metric in row.means
        value = row.means.get(metric, 0.0)
        axes.barh(place, value, height=0.72, color=COLOURS[row.kind])
        if metric in row.stds:
            axes.errorbar(value, place, xerr=row.stds[metric], color=INK, capsize=2.5, linewidth=1)
        axes.annotate(
            _value(row, metric) if is_given else "not given",
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK if is_given else GREY,
            fontweight="bold" if row.kind == "ours" else "normal",
        )

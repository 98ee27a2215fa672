"""What a finished run leaves to read: result.json, report.md, its pictures, and the table it prints.

`result` is the dict of result.json:

    protocol   use_query_time (bool), max_history_len, num_candidates (all items), num_users,
               test_history_includes_valid (bool), selection_metric ("seen_allowed/ndcg@10");
               optional: data (statistics by name), further settings
    test       {"seen_masked": PART, "seen_allowed": PART}, where PART has mrr, any recall@k and any
               ndcg@k; mrr and, at 5 and 10, what one part has all have, and these are shown first
    valid      the same two parts, or the metrics themselves
    baselines  {"popularity": {"seen_masked": PART, "seen_allowed": PART}, "own_history": ...,
               "co_occurrence": ...}
               or {}
    further    optional: rows as in baselines, of which parts and metrics may be missing
    groups     optional: {METHOD: {GROUPING: {BIN: {"num_users", "seen_masked": {"recall@10", "ndcg@10"},
               "seen_allowed"}}}}, the model first; GROUPING: history_length (events before the target) and
               target_train_count (how often the target occurs in training); bins without users have
               num_users alone
    recommended  optional: num_users, k, coverage, num_items, novelty, target_novelty, as
               top_lists.beyond_accuracy defines them
    examples   optional: [{"user", "num_events", "history": [ITEM, ...], "target": ITEM,
               "recommended": [ITEM, ...]}, ...], where ITEM has item_id and, where there is one, title;
               optional of each: place (the target's in the whole list, from 1, or None), is_repeat
    timing     prepare_s (None when the dataset does not tell), train_s, events_per_s;
               optional: epochs, best_epoch, max_epochs, processes, device
    versions   {"torch": "2.13.0", ...}

The curves are drawn from the run's metrics.jsonl: rows "train" with `loss`, and rows "valid" with
the selection metric and, if it has one, `epoch`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hstu_rec.drawing import draw_curves, draw_groups
from hstu_rec.durable import write_file
from hstu_rec.tracking import read_metrics

SECTIONS = ("protocol", "test", "valid", "baselines", "timing", "versions")
FIRST_METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")
OPTIONAL = ("further", "groups", "recommended", "examples")
# What Markdown, GitHub's too, takes for more than text.
MARKUP = re.compile(r"[\\`*_\[\]<>()#|~!&$@:{}]")
MAX_TITLE = 80
SEEN_ITEMS = {"seen_masked": "masked", "seen_allowed": "allowed"}
PROTOCOL = (
    "use_query_time",
    "max_history_len",
    "num_candidates",
    "num_users",
    "test_history_includes_valid",
    "selection_metric",
)
GROUPS = {
    "history_length": "length of the history",
    "target_train_count": "the target's events in training",
}
TIMING = ("prepare_s", "train_s", "events_per_s")
# What a page calls the names of stats.json and result.json.
NAMES = {
    "format_version": "version of the folder's format",
    "rows_read": "rows read",
    "users_read": "users read",
    "items_read": "items read",
    "density": "density, events / (users x items)",
    "tie_share": "share of events at the time of another of their user",
    "tie_last_two_share": "share of users whose last two events have one time",
    "duplicates": "events of the user, item and second of another",
    "first_timestamp": "first event",
    "last_timestamp": "last event",
    "valid_targets": "validation targets",
    "test_targets": "test targets",
    "item_map_hash": "hash of the item ids",
    "time_unit": "unit of the times read",
    "prepare_s": "preparation, s",
    "num_repeated_targets": "test targets that are repeats",
    "seen_bias": "learned bias of seen items",
    "num_frequent_targets": "test targets that are frequent",
    "min_train_count": "events in training that make a target frequent",
    "split.kind": "split",
    "split.valid_time": "validation begins",
    "split.test_time": "test begins",
    "split.valid_fraction": "share for validation",
    "split.test_fraction": "share for test",
}
TIMES = ("first_timestamp", "last_timestamp", "split.valid_time", "split.test_time")
CURVES = "![Training loss by step; validation metric by epoch](curves.png)"


def write_report(folder: Path, result: dict[str, Any], config_text: str) -> None:
    """Writes result.json, curves.png, groups.png (where there are groups) and report.md into `folder`, each
    in one move.

    `config_text` is the resolved configuration, shown in report.md. Called on rank 0 only.
    Raises ValueError that names every missing part of `result`.
    """
    _check(result)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, allow_nan=False)
    curves = draw_curves(read_metrics(folder), result["protocol"]["selection_metric"])
    write_file(folder / "result.json", (text + "\n").encode())
    write_file(folder / "curves.png", curves)
    if groups := result.get("groups"):
        titles = {grouping: f"By {title}" for grouping, title in GROUPS.items()}
        picture = draw_groups(groups, "recall@10", "seen_masked", titles)
        write_file(folder / "groups.png", picture)
    write_file(folder / "report.md", _markdown(folder.name, result, config_text).encode())


def metric_table(result: dict[str, Any]) -> str:
    """The test metrics as aligned text: the protocol, then the model, then the baselines."""
    _check(result)
    header, *rows = _metric_cells(result)
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([protocol_line(result["protocol"]), "", lines[0], rule, *lines[1:]])


def summary(result: dict[str, Any]) -> str:
    """`metric_table`, and what is told of lists, where there are some."""
    lines = [metric_table(result)]
    if lists := result.get("recommended"):
        lines.append(
            f"\nlists of {lists['k']} for {lists['num_users']:,} users: coverage {lists['coverage']:.1%}, "
            f"novelty {lists['novelty']:.2f} bits (targets {lists['target_novelty']:.2f})"
        )
    return "\n".join(lines)


def _check(result: Mapping[str, Any]) -> None:
    """All that is missing, in one message."""
    problems = [f"{name} is missing" for name in SECTIONS if name not in result]
    problems += [
        f"{name} is not a section" for name in result if name not in (*SECTIONS, *OPTIONAL)
    ]
    problems += [
        f"protocol.{name} is missing" for name in PROTOCOL if name not in result.get("protocol", {})
    ]
    problems += [
        f"timing.{name} is missing" for name in TIMING if name not in result.get("timing", {})
    ]
    measured = {name for part in result.get("test", {}).values() for name in part}
    needed = [name for name in FIRST_METRICS if name in measured | {"mrr"}]
    rows = {"test": result.get("test", {})}
    rows |= {f"baselines.{name}": row for name, row in result.get("baselines", {}).items()}
    problems += [
        f"{place}.{seen}.{metric} is missing"
        for place, row in rows.items()
        for seen in SEEN_ITEMS
        for metric in needed
        if metric not in row.get(seen, {})
    ]
    if problems:
        raise ValueError(f"no report of this result: {'; '.join(problems)}")


def _metric_cells(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """The header, then one row for each method and treatment of seen items."""
    measured = result["test"]["seen_masked"]
    metrics = [name for name in FIRST_METRICS if name in measured]
    metrics += [name for name in measured if name not in FIRST_METRICS]
    yield ["method", "seen items", *metrics]
    rows = {"model": result["test"], **result.get("further", {}), **result["baselines"]}
    for method, parts in rows.items():
        for seen, label in SEEN_ITEMS.items():
            if seen in parts:
                values = [parts[seen].get(name) for name in metrics]
                yield [words(method), label, *("" if v is None else f"{v:.4f}" for v in values)]


def words(method: str) -> str:
    """A method's name in result.json as it is shown."""
    return method.replace("_", "-")


def query_time_used(is_used: bool) -> str:
    """The protocol's use of the query time in words."""
    return "query time used" if is_used else "query time not used"


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """The protocol as sentences on one line."""
    verb = "includes" if protocol["test_history_includes_valid"] else "excludes"
    return (
        f"Test: {protocol['num_users']:,} users, each ranked against all "
        f"{protocol['num_candidates']:,} items; {query_time_used(protocol['use_query_time'])}; "
        f"newest {protocol['max_history_len']} events of the history, which {verb} the validation "
        f"item; model chosen by validation {protocol['selection_metric']}.{_of_repeats(protocol)}"
        f"{_of_frequent(protocol)}"
    )


def _of_repeats(protocol: Mapping[str, Any]) -> str:
    """What masking means where targets were seen before."""
    share = protocol.get("num_repeated_targets", 0) / max(protocol["num_users"], 1)
    if not share:
        return ""
    return (
        f" {share:.1%} of the targets are repeats: targets are never masked, so that with seen items masked "
        "these are easier to find than for a system that offers no repeats; hold that one against the rows "
        "with seen items allowed."
    )


def _of_frequent(protocol: Mapping[str, Any]) -> str:
    """What the rows over some targets are over."""
    if not (least := protocol.get("min_train_count", 0)):
        return ""
    return (
        f" {least}+ events: over the {protocol['num_frequent_targets']:,} users whose target occurs at least "
        f"{least} times in training."
    )


def _markdown(title: str, result: Mapping[str, Any], config_text: str) -> str:
    protocol, timing = result["protocol"], result["timing"]
    further = {k: v for k, v in protocol.items() if k not in PROTOCOL and k != "data"}
    sections = {
        f"# {title}": protocol_line(protocol) + " Ties with the target are never hits.",
        "## Test": f"{markdown_table(list(_metric_cells(result)))}\n\n{_below(result)}".rstrip(),
        "## Validation": markdown_table(_validation_cells(result["valid"])),
        "## Training": f"{_training(timing)}\n\n{CURVES}".lstrip(),
        "## By group": _groups(result.get("groups", {})),
        "## Recommended": _recommended(result.get("recommended", {})),
        "## Examples": _examples(result.get("examples", [])),
        "## Data": listing(protocol.get("data", {}), "statistic"),
        "## Protocol": listing(further, "setting"),
        "## Timing": listing(
            {
                "preparation": duration(timing["prepare_s"]),
                "training": duration(timing["train_s"]),
                "events/s in training": f"{timing['events_per_s']:,.0f}",
            },
            "part",
        ),
        "## Versions": listing(result["versions"], "package"),
        "## Configuration": _fenced(config_text),
    }
    return "\n\n".join(f"{head}\n\n{body}" for head, body in sections.items() if body) + "\n"


def _below(result: Mapping[str, Any]) -> str:
    """The baselines that the model does not reach by the metric that chose it, "" where it does."""
    part, _, metric = result["protocol"]["selection_metric"].partition("/")
    own = result["test"].get(part, {}).get(metric)
    if own is None:  # not a metric of the test
        return ""
    found = {
        name: rows.get(part, {}).get(metric, 0.0) for name, rows in result["baselines"].items()
    }
    above = [f"{words(name)} ({value:.4f})" for name, value in found.items() if value > own]
    if not above:
        return ""
    return (
        f"**The model is below {' and '.join(above)}** by the metric that chose it, {metric} with seen items "
        f"{SEEN_ITEMS[part]} ({own:.4f})."
    )


def _training(timing: Mapping[str, Any]) -> str:
    """How training ended, "" for a result that does not tell it."""
    epochs, best, most = (timing.get(name) for name in ("epochs", "best_epoch", "max_epochs"))
    if epochs is None or best is None or most is None:
        return ""
    ended = (
        "all epochs are done"
        if epochs >= most
        else f"no validation since epoch {best} was better (train.patience)"
    )
    return (
        f"Trained {epochs:,} of at most {most:,} epochs in {duration(timing['train_s'])}: {ended}. The model "
        f"of epoch {best:,}, the best by validation, is kept."
    )


def _groups(groups: Mapping[str, Any]) -> str:
    """A table a grouping and treatment of seen items, "" without groups."""
    if not groups:
        return ""
    parts = ["![Recall@10 of each method by group of users, seen items masked](groups.png)"]
    for grouping, title in GROUPS.items():
        for seen, label in SEEN_ITEMS.items():
            parts.append(f"By {title}, seen items {label}:")
            parts.append(markdown_table(_group_cells(groups, grouping, seen)))
    return "\n\n".join(parts)


def _group_cells(groups: Mapping[str, Any], grouping: str, seen: str) -> list[list[str]]:
    metrics = ("recall@10", "ndcg@10")
    heads = [f"{words(method)} {metric}" for method in groups for metric in metrics]
    rows = [["events", "users", *heads]]
    for name, one in next(iter(groups.values()))[grouping].items():
        if not one["num_users"]:
            continue
        found = [groups[method][grouping][name].get(seen, {}) for method in groups]
        cells = [_cell(values[m]) if values else "" for values in found for m in metrics]
        rows.append([name, _cell(one["num_users"]), *cells])
    return rows


def _recommended(found: Mapping[str, Any]) -> str:
    """Coverage and novelty in sentences, "" where no lists were made."""
    if not found:
        return ""
    users, k = f"{found['num_users']:,} test users", found["k"]
    return (
        f"The {k} best items, seen items masked, of {users}: {found['num_items']:,} items are in any of the "
        f"lists, **{found['coverage']:.1%}** of the catalogue (coverage). Novelty, the mean of -log2 of an "
        f"item's share of the training events: **{found['novelty']:.2f}** bits; of the same users' targets "
        f"{found['target_novelty']:.2f} bits."
    )


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    """A table a user: the newest events, the target, and what is recommended."""
    parts = []
    for one in examples:
        target = one["target"]
        rows = [["", "item", "title"]]
        rows += [["history", *_item_cells(item)] for item in one["history"]]
        rows.append(["**target**", *_item_cells(target)])
        for rank, item in enumerate(one["recommended"], start=1):
            hit = " (the target)" if item == target else ""
            rows.append([f"{rank} recommended{hit}", *_item_cells(item)])
        if not any(cells[2] for cells in rows[1:]):
            rows = [cells[:2] for cells in rows]
        told = f"User {plain(str(one['user']))}, the newest of {one['num_events']:,} events. "
        parts.append(f"{told}{_target_told(one)}\n\n{markdown_table(rows)}")
    return "\n\n".join(parts)


def _target_told(example: Mapping[str, Any]) -> str:
    """Where the target is in the list, and whether it is a repeat."""
    target, listed = example["target"], example["recommended"]
    is_repeat = example.get("is_repeat", target in example["history"])
    kind = "The target, a repeat of an item of the history," if is_repeat else "The target"
    place = example.get("place", listed.index(target) + 1 if target in listed else None)
    if place is None:
        return f"{kind} is not in the list{', which has no seen items' if is_repeat else ''}:"
    return f"{kind} is in place {place} of the list:"


def _item_cells(item: Mapping[str, Any]) -> list[str]:
    return [plain(str(item["item_id"])), plain(item.get("title", ""))]


def plain(text: str) -> str:
    """Someone's text on one line, cut to MAX_TITLE characters, nothing of which Markdown reads."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    cut = line if len(line) <= MAX_TITLE else line[: MAX_TITLE - 3] + "..."
    return MARKUP.sub(r"\\\g<0>", cut)


def _validation_cells(valid: Mapping[str, Any]) -> list[list[str]]:
    parts = {label: valid[seen] for seen, label in SEEN_ITEMS.items() if seen in valid}
    named = parts or {"": valid}
    metrics = list(dict.fromkeys(name for values in named.values() for name in values))
    rows = [
        [label, *(_cell(values.get(name, "")) for name in metrics)]
        for label, values in named.items()
    ]
    return [["seen items", *metrics], *rows]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Numbers to the right; the columns padded, so that the source reads as well as the page."""
    header, *body = rows
    is_number = [
        all(re.fullmatch(r"[-\d.,± ]*", row[c]) for row in body) for c in range(len(header))
    ]
    widths = [max(3, *(len(row[c]) for row in rows)) for c in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, is_number, strict=True)
        return "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in cells) + " |"

    rule = ["-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, is_number, strict=True)]
    return "\n".join(map(line, [header, rule, *body]))


def listing(values: Mapping[str, Any], name: str) -> str:
    """A two-column table, "" when there is nothing to list; nested names are joined by dots, and those of
    NAMES are told in words."""
    rows = [
        [NAMES.get(key, key), _moment(value) if key in TIMES else _cell(value)]
        for key, value in _flat(values)
    ]
    return markdown_table([[name, "value"], *rows]) if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _moment(value: Any) -> str:
    """Unix seconds as a date and time."""
    return f"{datetime.fromtimestamp(int(value), UTC):%Y-%m-%d %H:%M:%S} UTC"


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if 0 < abs(value) < 1e-3 else f"{value:,.4f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def duration(seconds: float | None) -> str:
    """Minutes and seconds, in words."""
    if seconds is None:
        return "not told by the dataset"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _fenced(text: str) -> str:
    """A YAML fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"

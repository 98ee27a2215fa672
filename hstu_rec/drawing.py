"""The pictures of a report: PNGs by matplotlib, which is imported when one is drawn."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

INK, BLUE, ORANGE, GREY = "#24292f", "#1f6feb", "#d1570b", "#8b949e"
# Of methods side by side, the model first.
METHOD_COLOURS = (BLUE, GREY, "#c9a227", "#57a773")
# Users of a bin whose mean says little, and how solid its bars are.
FEW_USERS, PALE = 10, 0.25


def draw_curves(rows: Sequence[Mapping[str, Any]], selection_metric: str) -> bytes:
    """A PNG of two panels: training loss by step; validation by epoch, the best marked."""
    losses = [
        (row["step"], row["loss"]) for row in rows if row["kind"] == "train" and "loss" in row
    ]
    valid = [row for row in rows if row["kind"] == "valid"]
    chosen = [row for row in valid if selection_metric in row]
    if valid and not chosen:
        raise ValueError(
            f"protocol.selection_metric is {selection_metric!r}; the validation rows "
            f"of metrics.jsonl have {sorted(set(valid[0]) - {'kind', 'step', 'time_s'})}"
        )
    has_epoch = bool(chosen) and all("epoch" in row for row in chosen)
    points = [(row["epoch" if has_epoch else "step"], row[selection_metric]) for row in chosen]

    figure = new_figure(11, 4.2, wspace=0.05)
    left, right = figure.subplots(1, 2)
    dress(left, "Training loss", "step")
    dress(right, f"Validation {selection_metric}", "epoch" if has_epoch else "step")
    _draw_loss(left, losses)
    _draw_metric(right, points)
    return png(figure)


def new_figure(width: float, height: float, wspace: float | None = None) -> Any:
    """An empty matplotlib Figure of so many inches; `wspace` as its constrained layout has it."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=wspace)
    return Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")


def png(figure: Any) -> bytes:
    """The figure as a PNG file's content."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def dress(axes: Any, title: str, unit: str) -> None:
    """The look of every panel: its title, the unit of x, a grid, no frame."""
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=10)
    axes.set_xlabel(unit, color=INK)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_loss(axes: Any, losses: Sequence[tuple[int, float]]) -> None:
    if not losses:
        _draw_absence(axes, "no training rows")
        return
    steps, values = zip(*losses, strict=True)
    if len(values) < 40:
        axes.plot(steps, values, color=BLUE, linewidth=1.8, marker="o", markersize=3)
    else:
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.3, label="logged")
        axes.plot(steps, _smooth(values), color=BLUE, linewidth=2, label="smoothed")
        axes.legend(frameon=False, labelcolor=INK)


def _draw_metric(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    if not points:
        _draw_absence(axes, "no validation rows")
        return
    positions, values = zip(*points, strict=True)
    best = max(range(len(values)), key=values.__getitem__)
    axes.plot(positions, values, color=BLUE, linewidth=1.8, marker="o", markersize=3.5)
    axes.plot(positions[best], values[best], "o", color=ORANGE, markersize=9, zorder=3)
    # Room above the curve, so that the label covers none of it.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.16 * (high - low))
    is_late = positions[best] > (positions[0] + positions[-1]) / 2
    axes.annotate(
        f"best {values[best]:.4f} at {axes.get_xlabel()} {positions[best]:g}",
        (positions[best], values[best]),
        xytext=(8 if not is_late else -2, 10),
        textcoords="offset points",
        ha="right" if is_late else "left",
        color=ORANGE,
        fontweight="bold",
    )


def _draw_absence(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of a centred window, a twentieth of the curve wide, cut at the ends."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_groups(
    groups: Mapping[str, Any], metric: str, seen: str, titles: Mapping[str, str]
) -> bytes:
    """A PNG of a panel a grouping: bars of `metric` by bin, a method beside the other, bins with their users.

    Bars of fewer than FEW_USERS users are pale, and the panel says so.
    groups: as in result.json; seen: seen_masked or seen_allowed; titles: of a panel, by grouping.
    """
    from matplotlib.patches import Patch

    figure = new_figure(11, 4.6, wspace=0.05)
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, (grouping, title) in zip(panels, titles.items(), strict=True):
        of_methods = {method: one[grouping] for method, one in groups.items()}
        _draw_bins(axes, title, of_methods, metric, seen)
    treatment = "masked" if seen == "seen_masked" else "allowed"
    title = f"{metric.capitalize()}, seen items {treatment}"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    figure.legend(
        # Not the bars, the first of which may be pale.
        [Patch(color=_colour_of(number)) for number in range(len(groups))],
        [method.replace("_", "-") for method in groups],
        loc="outside upper right",
        ncols=len(groups),
        frameon=False,
        labelcolor=INK,
    )
    return png(figure)


def _colour_of(number: int) -> str:
    return METHOD_COLOURS[number % len(METHOD_COLOURS)]


def _draw_bins(
    axes: Any, title: str, of_methods: Mapping[str, Any], metric: str, seen: str
) -> None:
    """Bars of a grouping's bins that have users; of_methods: {METHOD: {BIN: figures}}."""
    first = next(iter(of_methods.values()))
    counts = {name: one["num_users"] for name, one in first.items() if one["num_users"]}
    width = 0.8 / len(of_methods)
    alphas = [PALE if count < FEW_USERS else 1.0 for count in counts.values()]
    for number, bins in enumerate(of_methods.values()):
        values = [bins[name].get(seen, {}).get(metric, 0.0) for name in counts]
        places = [at - 0.4 + (number + 0.5) * width for at in range(len(counts))]
        bars = axes.bar(places, values, width * 0.9, color=_colour_of(number))
        for bar, alpha in zip(bars, alphas, strict=True):
            bar.set_alpha(alpha)
    unit = "events, users below them"
    dress(axes, title, unit + (f"; pale: fewer than {FEW_USERS} users" if PALE in alphas else ""))
    axes.set_xticks(range(len(counts)), [f"{name}\n{count:,}" for name, count in counts.items()])

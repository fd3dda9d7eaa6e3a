"""The plots, as Matplotlib figures that touch no global state."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression

from hybrid_jax.report import formatting
from hybrid_jax.report.rows import Number, finite

# Okabe and Ito's palette: distinct under every common form of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ROLES = {
    "parent": {"color": "#000000", "marker": "s", "markersize": 6},
    "parent_int8": {"color": "#777777", "marker": "s", "markersize": 6},
    "single": {"color": "#009E73", "marker": "D", "markersize": 6},
    "expert": {"color": "#0072B2", "marker": "o", "markersize": 6},
    "mixture": {"color": "#D55E00", "marker": "*", "markersize": 13},
    "control": {"color": "#E69F00", "marker": "^", "markersize": 7},
    "bound": {"color": "#CC79A7", "marker": "_", "markersize": 9},
}
MOST_CLASSES = 20  # of a confusion matrix that is drawn
_SMALL = 9
_GREY = "#666666"


class Point(NamedTuple):
    """A model in a plot of what it reaches against what it costs; either may be missing."""

    name: str
    role: str
    cost: Number
    accuracy: Number


def accuracy_against(points: Sequence[Point], label: str, unit: str, metric: str) -> Figure | None:
    """Accuracy against one cost on a log axis, each point labelled, the Pareto front drawn.

    `label` and `unit` are the cost's. A mean over runs gets error bars. A point without a positive
    cost or without an accuracy is left out; None where those that are left cost all the same.
    """
    points = [p for p in points if p.accuracy is not None and (p.cost or 0) > 0]
    if len({float(point.cost) for point in points}) < 2:
        return None
    axes = _labelled_axes(height=max(4.2, 1.4 + 1.4 * _SMALL / 72 * len(points)), width=0.47)
    scale = 100 if metric == "accuracy" else 1
    x = np.array([float(point.cost) for point in points])
    y = scale * np.array([float(point.accuracy) for point in points])
    front = pareto_front(x, np.where([p.role == "bound" for p in points], -np.inf, y))
    axes.step(x[front], y[front], where="post", color=_GREY, linewidth=1, zorder=1)
    for point, x_own, y_own in zip(points, x, y, strict=True):
        spread = scale * (getattr(point.accuracy, "std", None) or 0)
        axes.errorbar(
            x_own, y_own, spread or None, elinewidth=1, capsize=2,
            markeredgecolor=None if point.role == "bound" else "white",
            zorder=3 if point.role == "mixture" else 2.5, **ROLES[point.role],
        )  # fmt: skip
    middle, reach = np.sqrt(x.min() * x.max()), max(np.sqrt(x.max() / x.min()) * 1.2, 2.5)
    axes.set_xscale("log")
    axes.set_xlim(middle / reach, middle * reach)
    axes.margins(y=0.08)
    steps = (1.0, 2.0, 5.0) if reach < 8 else (1.0, 3.0) if reach < 40 else (1.0,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=5))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(unit, sep=" " if unit else ""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(f"{label} (log scale)", fontsize=_SMALL)
    axes.set_ylabel(f"{metric} (%)" if metric == "accuracy" else metric, fontsize=_SMALL)
    names = [f"{_shorten(p.name)}  {formatting.score(metric, float(p.accuracy))}" for p in points]
    _label_right(axes, x, y, names, [ROLES[point.role]["color"] for point in points])
    handles = [
        Line2D([], [], linestyle="", label=role.replace("_", " in "), **style)
        for role, style in ROLES.items()
        if any(point.role == role for point in points)
    ]
    handles.append(Line2D([], [], color=_GREY, linewidth=1, label="best so far"))
    axes.figure.legend(
        handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=_SMALL - 1,
        handletextpad=0.3, columnspacing=1.2,
    )  # fmt: skip
    return axes.figure


def confusion(counts, class_names: Sequence[str]) -> Figure:
    """Heat map (N, N) of how many images of each class (down) are taken for which (across)."""
    counts = np.asarray(counts)
    size, names = len(counts), [_shorten(str(name), 14) for name in class_names]
    figure = Figure(figsize=(1.8 + 0.36 * size, 1.4 + 0.3 * size), layout="constrained")
    axes = figure.subplots()
    labels = np.where(counts > 0, counts, "").astype(object)
    _heat_map(axes, counts / np.maximum(counts.sum(1, keepdims=True), 1), names, names, labels)
    axes.set_xlabel("answer", fontsize=_SMALL)
    axes.set_ylabel("class", fontsize=_SMALL)
    return figure


def pareto_front(costs, scores) -> np.ndarray:
    """Indices of the points that no other point beats in both, by rising cost.

    Costs are the better the smaller, scores the larger; −inf keeps a point off the front. The
    result is (m,) int indices into `costs`.

    Example:
        >>> pareto_front([1, 2, 3, 4], [0.5, 0.9, 0.8, 0.95])
        array([0, 1, 3])
    """
    scores = np.asarray(scores, float)
    order = np.lexsort((-scores, costs))  # by cost; at equal cost the better score first
    best = np.concatenate([[-np.inf], np.maximum.accumulate(scores[order])[:-1]])
    return order[scores[order] > best]


def spread_labels(positions, gap: float, low: float, high: float) -> np.ndarray:
    """Positions at least `gap` apart that move as little as possible (least squares), in order.

    Subtracting i·gap from the i-th turns "at least gap apart" into "not decreasing": an isotonic
    regression.

    `positions` rise; room for n·gap between `low` and `high` is the caller's to give.

    Example:
        >>> spread_labels([0.5, 0.5, 0.9], gap=0.2, low=0.0, high=1.0)
        array([0.4, 0.6, 0.9])
    """
    steps = gap * np.arange(len(positions))
    fitted = isotonic_regression(np.asarray(positions, float) - steps).x
    return np.clip(fitted, low, max(low, high - steps[-1])) + steps


def layers(rows: Sequence[dict]) -> Figure | None:
    """Width, sparsity and bits of each layer (down) in each model (across), as heat maps."""
    if not rows:
        return None
    models = list(dict.fromkeys(row["model"] for row in rows))
    sites = list(dict.fromkeys(row["site"] for row in rows))
    panels = (
        ("kept width", lambda row: row["width"] / row["dense_width"], "{width}", None),
        ("sparsity", lambda row: row["sparsity"], "{sparsity:.0%}", None),
        ("weight bits", lambda row: row["weight_bits"], "{weight_bits}", "bits"),
        ("activation bits", lambda row: row["activation_bits"], "{activation_bits}", "bits"),
    )
    size = max(6.4, 2.4 + 1.1 * len(models)), 1.3 + 0.2 * len(sites)
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True)
    names = [model.removeprefix("expert ") for model in models]
    for axes, (title, value, text, norm) in zip(all_axes, panels, strict=True):
        values = np.full((len(sites), len(models)), np.nan)
        labels = np.full(values.shape, "", object)
        for row in rows:
            where = sites.index(row["site"]), models.index(row["model"])
            if (number := value(row)) is not None:
                values[where], labels[where] = number, text.format(**row)
        _heat_map(axes, values, [_site(site) for site in sites], names, labels, norm)
        axes.set_title(title, fontsize=_SMALL)
    figure.supxlabel("model", fontsize=_SMALL)
    return figure


def gate_usage(usage, class_names) -> Figure | None:
    """Heat map (N, E) of the fraction of each class that goes to each expert."""
    values = np.asarray(usage or [], float)
    if values.ndim != 2 or not values.size:
        return None
    classes, experts = values.shape
    few = classes <= 40
    size = max(4.2, 1.8 + 0.7 * experts), 1.2 + (0.26 * classes if few else 10)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    labels = np.vectorize(lambda v: f"{100 * v:.0f}" if np.isfinite(v) else "", otypes=[object])
    names = [str(name) for name in class_names or range(classes)] if few else []
    _heat_map(axes, values, names, map(str, range(experts)), labels(values) if few else None)
    axes.set_xlabel("expert", fontsize=_SMALL)
    axes.set_ylabel("class", fontsize=_SMALL)
    axes.set_title("images of a class routed to each expert (%)", fontsize=_SMALL)
    return figure


def gate_entropy(entropies, experts: int) -> Figure | None:
    """Entropy of the gate's usage by epoch (nats), with the entropy of an even split."""
    values = np.array([finite(value) for value in entropies or ()], float)
    if experts < 1 or not np.isfinite(values).any():
        return None
    epochs, even = np.arange(1, len(values) + 1), np.full(len(values), math.log(experts))
    return _lines({"gate": (epochs, values), "even use": (epochs, even)}, "epoch", "entropy (nats)")


def training_curve(history: Mapping, metric: str) -> Figure | None:
    """One metric ("loss" or "accuracy") against the step, one labelled line per stage.

    A stage that trains experts together may record a list, one number per expert: one line each.
    """
    curves = {}
    for stage, records in history.items():
        records = [r for r in records if r.get("step") is not None and r.get(metric) is not None]
        x = np.array([record["step"] for record in records])
        values = np.array([record[metric] for record in records], float)
        if metric == "accuracy":
            values = 100 * values
        for expert, y in enumerate(values.T if values.ndim == 2 else [values]):
            if np.isfinite(y).any():
                name = f"{stage} {expert}" if values.ndim == 2 else stage
                curves[name] = x[np.isfinite(y)], y[np.isfinite(y)]
    if not curves:
        return None
    log = metric == "loss" and min(y.min() for _, y in curves.values()) > 0
    return _lines(curves, "step", "accuracy (%)" if metric == "accuracy" else metric, log)


def sensitivity(losses: dict, sparsities, dense: float | None = None, ylabel="loss") -> Figure:
    """Loss against the sparsity of one layer alone, a line for each, coloured by its place.

    `losses` are those of `pruning.sensitivity`, {name of a layer or a group: (S,)}, in the order of
    the legend: that in which the sites of a graph run, say. `sparsities` are (S,) fractions
    removed, in any order; `dense` is the loss with nothing removed, drawn as a dashed line.
    """
    order = np.argsort(sparsities)
    x = 100 * np.asarray(sparsities, float)[order]
    curves = {_site(name): (x, np.asarray(own, float)[order]) for name, own in losses.items()}
    if dense is not None:
        curves["nothing removed"] = x, np.full(len(x), dense)
    return _lines(curves, "sparsity of the one layer (%)", ylabel)


def _lines(curves: Mapping[str, tuple], xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """A line for each curve, {name: (x, y)}, named beside it."""
    axes = _labelled_axes(height=max(3.2, 0.8 + 0.2 * len(curves)), width=0.62)
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(curves))]
    styles = ["-", "--", ":", "-."]
    for i, (x, y) in enumerate(curves.values()):
        axes.plot(
            x, y, color=colors[i], linewidth=1.4, marker="." if len(x) < 30 else "",
            linestyle=styles[i // len(PALETTE) % len(styles)],
        )  # fmt: skip
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.set_xlabel(xlabel, fontsize=_SMALL)
    axes.set_ylabel(ylabel, fontsize=_SMALL)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.LogFormatter())
        axes.tick_params(axis="y", which="minor", labelsize=_SMALL)
    last = np.array([(x[-1], y[-1]) for x, y in curves.values()])
    _label_right(axes, *last.T, [_shorten(name) for name in curves], colors)
    return axes.figure


def _labelled_axes(height: float, width: float):
    """Axes over a fraction of the figure's width, with room on the right for _label_right."""
    figure = Figure(figsize=(6, height))
    axes = figure.add_axes((0.115, 0.52 / height, width, 1 - 1.02 / height))
    axes.tick_params(labelsize=_SMALL)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _label_right(axes, x, y, labels, colors):
    """Label points in the right margin, spread so that no two labels overlap."""
    figure = axes.figure
    height = axes.get_position().height * figure.get_figheight()
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = to_axes.transform(np.column_stack([x, y]))[:, 1]
    order = np.argsort(wanted, kind="stable")
    gap = 1.3 * _SMALL / 72 / height
    for i, place in zip(order, spread_labels(wanted[order], gap, 0.0, 1.0), strict=True):
        axes.annotate(
            labels[i], (x[i], y[i]), (1.06, place), textcoords="axes fraction", va="center",
            fontsize=_SMALL, annotation_clip=False, zorder=2,
            arrowprops={"arrowstyle": "-", "color": colors[i], "alpha": 0.4, "linewidth": 0.7,
                        "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip


def _heat_map(axes, values, rows, columns, labels=None, norm=None):
    """Draws values from 0 to 1, or bits; `rows` and `columns` are names, none of many."""
    limits = {"norm": LogNorm(1, 32)} if norm == "bits" else {"vmin": 0, "vmax": 1}
    image = axes.imshow(np.ma.masked_invalid(values), cmap="Blues", aspect="auto", **limits)
    axes.tick_params(length=0, labelsize=_SMALL)
    axes.spines[:].set_visible(False)
    rows, columns = ([_shorten(name, 20) for name in names] for names in (rows, columns))
    axes.set_yticks(range(len(rows)), rows)
    turned = max(map(len, columns)) > 3
    axes.set_xticks(range(len(columns)), columns, rotation=90 if turned else 0)
    dark = image.norm(np.nan_to_num(values)) > 0.6
    for i, j in np.ndindex(values.shape) if labels is not None else ():
        color = "white" if dark[i, j] else "black"
        axes.text(j, i, labels[i, j], ha="center", va="center", color=color, fontsize=_SMALL - 1)


def _site(path: str) -> str:
    return path.removeprefix("params/").replace("/kernel", "")


def _shorten(text: str, length: int = 24) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

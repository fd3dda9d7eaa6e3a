"""The plots, as Matplotlib figures that touch no global state."""

import math

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression

from hybrid_jax.report import comparison, formatting

# Okabe and Ito's palette: distinct under every common form of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
KINDS = {
    "dense": {"color": "#000000", "marker": "s", "markersize": 6},
    "expert": {"color": "#0072B2", "marker": "o", "markersize": 6},
    "control": {"color": "#E69F00", "marker": "^", "markersize": 7},
    "mixture": {"color": "#D55E00", "marker": "*", "markersize": 11},
}
COSTS = {"bytes": ("size", "B"), "macs": ("active MACs", ""), "bops": ("active BOPs", "")}
_SMALL = 8
_GREY = "#666666"


def accuracy_against(cost: str, rows: list[dict]) -> Figure | None:
    """Accuracy against one cost on a log axis, each row labelled, the Pareto front drawn.

    `cost` is "bytes", "macs" or "bops"; `accuracy_std` of a row adds error bars. A row without a
    positive cost or without an accuracy is left out; None where no row is left.
    """
    rows = [row for row in rows if _drawable(row, cost)]
    if not rows:
        return None
    axes = _labelled_axes(height=max(4.2, 1.3 + 0.2 * len(rows)), width=0.475)
    x = np.array([row[cost] for row in rows])
    y = np.array([100 * row["accuracy"] for row in rows])
    front = pareto_front(x, np.where([comparison.is_oracle(row) for row in rows], -np.inf, y))
    axes.step(x[front], y[front], where="post", color=_GREY, linewidth=1, zorder=1)
    for row, x_row, y_row in zip(rows, x, y, strict=True):
        spread = 100 * (formatting.finite(row.get("accuracy_std")) or 0)
        axes.errorbar(
            x_row, y_row, spread or None, elinewidth=1, capsize=2, markeredgecolor="white",
            zorder=3 if row["kind"] == "mixture" else 2.5, **KINDS[row["kind"]],
        )  # fmt: skip
    middle, reach = np.sqrt(x.min() * x.max()), max(np.sqrt(x.max() / x.min()) * 1.2, 2.5)
    axes.set_xscale("log")
    axes.set_xlim(middle / reach, middle * reach)
    axes.margins(y=0.08)
    name, unit = COSTS[cost]
    steps = (1.0, 2.0, 5.0) if reach < 12 else (1.0,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=6))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(unit))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(f"{name} (log scale)")
    axes.set_ylabel("test accuracy (%)")
    names = [f"{_shorten(row['name'])}  {formatting.percent(row['accuracy'])}" for row in rows]
    _label_right(axes, x, y, names, [KINDS[row["kind"]]["color"] for row in rows])
    handles = [
        Line2D([], [], linestyle="", label=kind, **style)
        for kind, style in KINDS.items()
        if any(row["kind"] == kind for row in rows)
    ]
    handles.append(Line2D([], [], color=_GREY, linewidth=1, label="Pareto front"))
    axes.figure.legend(
        handles=handles, loc="upper center", ncols=5, frameon=False, fontsize=_SMALL,
        handletextpad=0.3, columnspacing=1.2,
    )  # fmt: skip
    return axes.figure


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


def layers(rows: list[dict]) -> Figure | None:
    """Width, sparsity and bits of each layer (down) in each model (across), as heat maps."""
    if not rows:
        return None
    models = list(dict.fromkeys(row["model"] for row in rows))
    sites = list(dict.fromkeys(row["site"] for row in rows))
    where = {(row["site"], row["model"]): row for row in rows}
    panels = (
        ("kept width", _kept_width, lambda row: f"{row['width']}", None),
        ("sparsity (%)", lambda r: r.get("sparsity"), lambda r: f"{100 * r['sparsity']:.0f}", None),
        ("weight bits", lambda r: r.get("weight_bits"), lambda r: f"{r['weight_bits']}", "bits"),
        (
            "activation bits",
            lambda r: r.get("activation_bits"),
            lambda r: f"{r['activation_bits']}",
            "bits",
        ),
    )
    height = 1.3 + 0.2 * len(sites)
    figure = Figure(figsize=(max(6.4, 2.4 + 1.1 * len(models)), height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, value, text, norm) in zip(all_axes, panels, strict=True):
        values = np.full((len(sites), len(models)), np.nan)
        labels = np.full(values.shape, "", object)
        for i, site in enumerate(sites):
            for j, model in enumerate(models):
                row = where.get((site, model), {})
                number = formatting.finite(value(row))
                if number is not None:
                    values[i, j], labels[i, j] = number, text(row)
        _heat_map(axes, values, labels, norm)
        axes.set_title(title, fontsize=_SMALL + 1)
        axes.set_xticks(range(len(models)), [_expert_number(m) for m in models], fontsize=_SMALL)
        if any(not label.isdigit() for label in map(_expert_number, models)):
            axes.tick_params(axis="x", rotation=90)
    all_axes[0].set_yticks(range(len(sites)), [_site(s) for s in sites], fontsize=_SMALL - 1)
    figure.supxlabel("expert", fontsize=_SMALL + 1)
    return figure


def gate_usage(usage, class_names) -> Figure | None:
    """Heat map (N, E) of the fraction of each class that goes to each expert."""
    values = np.asarray(usage or [], float)
    if values.ndim != 2 or not values.size:
        return None
    classes, experts = values.shape
    row_height = 0.26 if classes <= 40 else 10 / classes
    figure = Figure(figsize=(max(4.2, 1.8 + 0.7 * experts), 1.2 + row_height * classes))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    labels = np.vectorize(lambda v: f"{100 * v:.0f}" if np.isfinite(v) else "", otypes=[object])
    _heat_map(axes, values, labels(values) if classes <= 40 else None)
    axes.set_xticks(range(experts))
    axes.set_xlabel("expert", fontsize=_SMALL + 1)
    names = list(class_names or range(classes))
    if classes <= 40:
        axes.set_yticks(range(classes), [_shorten(str(name), 20) for name in names])
    axes.set_ylabel("class", fontsize=_SMALL + 1)
    axes.set_title("images of a class routed to each expert (%)", fontsize=_SMALL + 1)
    return figure


def gate_entropy(entropies, experts: int) -> Figure | None:
    """Entropy of the gate's usage by epoch (nats), with the entropy of an even split."""
    values = [formatting.finite(value) for value in entropies or ()]
    if experts < 1 or not any(value is not None for value in values):
        return None
    figure = Figure(figsize=(5.6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        range(1, len(values) + 1), np.array(values, float), color=PALETTE[0], marker="o",
        markersize=4,
    )  # fmt: skip
    axes.axhline(math.log(experts), color=_GREY, linewidth=1, linestyle="--")
    axes.annotate(
        f"all {experts} experts alike", (0.02, math.log(experts)), color=_GREY, va="bottom",
        xycoords=("axes fraction", "data"), fontsize=_SMALL,
    )  # fmt: skip
    axes.set_ylim(0, 1.15 * max(math.log(experts), 0.1))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("usage entropy (nats)")
    _despine(axes)
    return figure


def training_curve(history: dict, metric: str) -> Figure | None:
    """One metric ("loss" or "accuracy") against the step, one labelled line per stage.

    A stage that trains experts together may record a list, one number per expert: one line each.
    """
    curves = {}
    for stage, records in history.items():
        records = [r for r in records if r.get("step") is not None and r.get(metric) is not None]
        x = np.array([record["step"] for record in records])
        values = np.array([record[metric] for record in records], float)
        experts = values.T if values.ndim == 2 else [values]
        for expert, y in enumerate(experts):
            name = f"{stage} {expert}" if values.ndim == 2 else stage
            if np.isfinite(y).any():
                curves[name] = np.array([x, y])[:, np.isfinite(y)]
    if not curves:
        return None
    axes = _labelled_axes(height=max(3.2, 0.8 + 0.2 * len(curves)), width=0.62)
    scale = 100 if metric == "accuracy" else 1
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(curves))]
    styles = ["-", "--", ":", "-."]
    for i, (x, y) in enumerate(curves.values()):
        axes.plot(
            x, scale * y, color=colors[i], linewidth=1.4, marker="." if len(x) < 30 else "",
            linestyle=styles[i // len(PALETTE) % len(styles)],
        )  # fmt: skip
    if metric == "loss" and min(y.min() for _, y in curves.values()) > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy (%)" if metric == "accuracy" else metric)
    last = np.array([curve[:, -1] for curve in curves.values()])
    _label_right(axes, last[:, 0], scale * last[:, 1], [_shorten(name) for name in curves], colors)
    return axes.figure


def sensitivity(losses: dict, sparsities, dense: float | None = None, ylabel="loss") -> Figure:
    """Loss against the sparsity of one layer alone, a line for each, coloured by its place.

    `losses` are those of `pruning.sensitivity`, {name of a layer or a group: (S,)}, in the order of
    the legend: that in which the sites of a graph run, say. `sparsities` are (S,) fractions
    removed, in any order; `dense` is the loss with nothing removed, drawn as a dashed line.
    """
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    order = np.argsort(sparsities)
    x = 100 * np.asarray(sparsities, float)[order]
    colors = colormaps["viridis"](np.linspace(0, 0.93, len(losses)))
    for i, (name, own) in enumerate(losses.items()):
        # Neighbours have nearly the same colour, and are told apart by their markers.
        axes.plot(
            x, np.asarray(own, float)[order], color=colors[i], linewidth=1.2, markersize=4,
            marker="os^DvPX"[i % 7], markeredgecolor="white", markeredgewidth=0.3,
            label=_shorten(_site(name)),
        )  # fmt: skip
    if dense is not None:
        axes.axhline(dense, color=_GREY, linewidth=1, linestyle="--", label="nothing removed")
    rows = 28
    columns = -(-(len(losses) + 1) // rows)
    height = max(3.2, 0.9 + 0.17 * min(len(losses) + 1, rows))
    figure.set_size_inches(4.6 + 1.9 * columns, height)
    figure.legend(
        loc="outside right upper", ncols=columns, frameon=False, fontsize=_SMALL - 1,
        handlelength=1.4,
    )  # fmt: skip
    axes.set_xlabel("sparsity of the one layer (%)")
    axes.set_ylabel(ylabel)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    _despine(axes)
    return figure


def _labelled_axes(height: float, width: float):
    """Axes over a fraction of the figure's width, with room on the right for _label_right."""
    figure = Figure(figsize=(6, height))
    axes = figure.add_axes((0.115, 0.52 / height, width, 1 - 0.88 / height))
    axes.tick_params(labelsize=_SMALL)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    _despine(axes)
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


def _heat_map(axes, values, labels=None, norm=None):
    limits = {"norm": LogNorm(1, 32)} if norm == "bits" else {"vmin": 0, "vmax": 1}
    image = axes.imshow(np.ma.masked_invalid(values), cmap="Blues", aspect="auto", **limits)
    axes.tick_params(length=0, labelsize=_SMALL)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if labels is None:
        return
    dark = image.norm(np.nan_to_num(values)) > 0.6
    for i, j in np.ndindex(values.shape):
        color = "white" if dark[i, j] else "black"
        axes.text(j, i, labels[i, j], ha="center", va="center", color=color, fontsize=_SMALL - 1)


def _kept_width(row):
    width, dense = formatting.finite(row.get("width")), formatting.finite(row.get("dense_width"))
    return width / dense if width is not None and dense else None


def _drawable(row, cost) -> bool:
    accuracy, price = formatting.finite(row.get("accuracy")), formatting.finite(row.get(cost))
    return row.get("kind") in KINDS and accuracy is not None and price is not None and price > 0


def _despine(axes):
    axes.spines[["top", "right"]].set_visible(False)


def _site(path: str) -> str:
    return path.removeprefix("params/").replace("/kernel", "")


def _expert_number(model: str) -> str:
    return _shorten(model.removeprefix("expert").strip() or model, 14)


def _shorten(text: str, length: int = 26) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

"""What a specialist asks of a run: confusions, every model, its rivals, files, gate and layers."""

import numpy as np

from hybrid_jax.report import choice, comparison, plots
from hybrid_jax.report.document import Plot, Section, Table
from hybrid_jax.report.formatting import (
    MISSING,
    change,
    listing,
    milliseconds,
    p_value,
    percent,
    score,
    si,
)
from hybrid_jax.report.rows import Results, difference

_ROLES = {"parent_int8": "parent in int8"}
_PAIRS = 12


def confusion(results: Results) -> Section:
    """A heat map of up to 20 classes, of more those that are mistaken most."""
    names = [own.row.name for own in choice.choose(results).values()] + list(results.confusion)
    name = next((name for name in names if name in results.confusion), None)
    if name is None:
        return Section("Confusion by class")
    counts = np.asarray(results.confusion[name], int)
    labels = [str(c) for c in results.dataset.get("class_names") or range(len(counts))]
    text = f"Of “{name}”: how many test images of each class (down) are taken for which (across)."
    if len(counts) <= plots.MOST_CLASSES:
        figure = plots.confusion(counts, labels)
        return Section("Confusion by class", plots=drawn(("confusion", text, figure)))
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape)) if wrong[i, j]]
    rows = [
        (labels[i], labels[j], str(wrong[i, j]), percent(wrong[i, j] / counts[i].sum()))
        for i, j in pairs
    ]
    text = f"Of “{name}”, the {len(rows)} pairs of classes that are mistaken most."
    header = ("class", "taken for", "images", "of the class")
    return Section("Confusion by class", (text,), Table(header, rows))


def models(results: Results) -> Section:
    """All rows, controls and bounds among them."""
    parent = results.first("parent")
    columns = {
        "model": lambda row: row.name,
        "role": lambda row: _ROLES.get(row.role, row.role),
        results.metric: lambda row: score(results.metric, row.accuracy),
        "Δ": lambda row: change(
            results.metric, difference(row.accuracy, parent and parent.accuracy)
        ),
        "params": lambda row: si(row.parameters_total),
        "active": lambda row: si(row.parameters_active),
        "MACs": lambda row: si(row.macs),
        "worst": lambda row: si(row.macs_worst),
        "BOPs": lambda row: si(row.bops),
        "note": lambda row: row.note,
    }
    table = Table.of(results.rows, columns, lambda row: row is comparison.subject(results))
    text = (
        "The models before they are written, with the controls and bounds that nobody ships: "
        f"{results.metric} on the test images, parameters that are stored and that run (active) "
        "for one image, and what one image costs."
    )
    costs = {"MACs": lambda row: row.macs, "BOPs": lambda row: row.bops}
    plotted = [
        tradeoff(
            name.lower(), name, "", results.metric, [(r, cost(r), r.accuracy) for r in results.rows]
        )
        for name, cost in costs.items()
    ]
    return Section("Every model, control and bound", (text,), table, drawn(*plotted))


def rivals(results: Results) -> Section:
    """The mixture, or the single network, against all that it has to beat."""
    comparisons, own = comparison.compare(results), comparison.subject(results)
    if own is None:
        return Section("Rivals")
    columns = {
        "rival": lambda c: c.rival,
        results.metric: lambda c: score(results.metric, c.accuracy),
        "difference": lambda c: change(results.metric, c.difference),
        "ahead in": lambda c: c.ahead,
        "p of each run": lambda c: ", ".join(f"{p:.3f}" for p in c.p_values),
        "only this": lambda c: str(c.test.only_a) if c.test else MISSING,
        "only rival": lambda c: str(c.test.only_b) if c.test else MISSING,
        "McNemar": lambda c: p_value(c.test.p_value) if c.test else MISSING,
        "verdict": lambda c: c.verdict,
    }
    text = (
        f"Difference is “{own.name}” minus rival. “Only this” and “only rival” count the test "
        "images on which one alone is right, or better; p is McNemar's exact two-sided test, over "
        "several runs pooled by image, and a rival counts as beaten where p < 0.05. The best "
        "expert, where it is one of several rows, is taken on the test images, which favours it."
    )
    paragraphs = text, comparison.gate_skill(results)
    return Section(f"“{own.name}” against each rival", paragraphs, Table.of(comparisons, columns))


def files(results: Results) -> Section:
    """What each file holds, and how it differs from its model."""
    made = [(row, file) for row in results.rows for file in row.files.values()]
    columns = {
        "file": lambda own: own[1].artifact,
        "model": lambda own: own[0].name,
        "size": lambda own: si(own[1].bytes, "B"),
        "images": lambda own: MISSING if own[1].images is None else f"{own[1].images:,}",
        "same top-1": lambda own: percent(own[1].agreement),
        "largest difference": lambda own: _digits(own[1].max_difference),
        "kernel bits": lambda own: listing([*map(str, own[1].kernel_bits)] or [MISSING]),
        "flash": lambda own: si(own[1].flash, "B"),
        "time": lambda own: milliseconds(own[1].milliseconds, own[1].milliseconds_quartiles),
        "note": lambda own: own[1].error,
    }
    text = (
        "Each file beside its model on the test images. Kernel bits are those in which the file "
        "holds kernels: 8 also for fewer where the runtime has no integer kernels of these. The "
        "size of C, which is text, is that of its constants. All files of a target are run on the "
        "same images, the first ones where all would take too long."
    )
    if {"mean", "std"} <= set(results.dataset):
        mean, std = (listing(f"{v:.6g}" for v in results.dataset[k]) for k in ("mean", "std"))
        text += (
            " All files take float32 images, (pixel / 255 − mean) / deviation, with mean "
            f"{mean} and deviation {std}."
        )
    return Section("Files", (text,), Table.of(made, columns))


def gate(results: Results) -> Section:
    """Which experts the gate uses, and how often they differ."""
    share, matrix = comparison.usage_share(results.gate), results.disagreement
    usage, count = results.gate.get("usage") or [], len(matrix) if share is None else len(share)
    names = results.dataset.get("class_names")
    entropy = plots.gate_entropy(results.gate.get("per_epoch"), count)
    plotted = drawn(
        ("gate_usage", "Use of the experts by class", plots.gate_usage(usage, names)),
        ("gate_entropy", "Entropy of the gate's use of the experts, by epoch", entropy),
    )
    text = ""
    if share is not None:
        effective = comparison.effective_experts(share)
        text = f"The gate uses {effective:.2f} of {count} experts (exp of its usage entropy). "
    if matrix:
        text += "The table gives the share of test images on which two experts disagree."
    rows = [(f"expert {e}", *map(percent, row)) for e, row in enumerate(matrix)]
    table = Table(("disagreement", *(row[0] for row in rows)), rows)
    title = "The experts" if share is None else "The gate and its experts"
    return Section(title, (text,), table, plotted)


def layers(results: Results) -> Section:
    """What each layer of each model keeps."""
    text = "Colour of a width is the share of the parent's that is kept; the number is the width."
    plot = "layers", "Widths, sparsity and bits", plots.layers(results.layers)
    return Section("Layers", (text,), plots=drawn(plot))


def training(results: Results) -> Section:
    """Loss and accuracy of every stage."""
    curves = (
        (f"training_{key}", f"Training {key}", plots.training_curve(results.history, key))
        for key in ("loss", "accuracy")
    )
    return Section("Training", plots=drawn(*curves))


def tradeoff(name: str, label: str, unit: str, metric: str, points) -> tuple:
    """Name, caption and figure of accuracy against a cost; `points` are (row, cost, accuracy)."""
    points = [plots.Point(row.name, row.role, cost, accuracy) for row, cost, accuracy in points]
    figure = plots.accuracy_against(points, label, unit, metric)
    return f"accuracy_{name}", f"{metric.capitalize()} against {label}", figure


def drawn(*candidates: tuple) -> tuple[Plot, ...]:
    """The plots of (name, caption, figure), without those that have no figure."""
    return tuple(Plot(*candidate) for candidate in candidates if candidate[-1] is not None)


def _digits(value):
    return MISSING if value is None else f"{value:.2g}"

"""The report of one run."""

import json
import math
import pathlib

from hybrid_jax.report import comparison, exports, plots
from hybrid_jax.report.document import Document, Plot, Section, Table, publish
from hybrid_jax.report.formatting import (
    MISSING,
    duration,
    finite,
    p_value,
    percent,
    points,
    si,
    times,
)

GLOSSARY = (
    "Size is that of the packed file in deploy/: kernels in their bits, scales, biases and the "
    "graph. A mixture's holds its gate and all its experts; what does not ship has none. MACs, "
    "BOPs (MACs × weight bits × activation bits) and active parameters are those of one image. "
    "Latency is at batch 1, relative to dense in the same run, both in floats: below 1 is faster. "
    "Δ is against dense, in percentage points. 1 kB = 1000 bytes."
)
TEST = (
    "Difference is mixture minus rival, in percentage points. “Only mixture” and “only rival” "
    "count the test images that one alone gets right; p is McNemar's exact two-sided test, and "
    "a rival counts as beaten where p < 0.05."
)


def write(results: dict, directory) -> pathlib.Path:
    """Write the report of one run: report.md, report.html and the plots as PNG.

    Whatever is missing or not finite in `results` is shown as a dash, and a section with nothing
    in it is left out.

    Args:
        results: What a run leaves in results.json: `rows` with one entry per model (accuracies
            and deltas as fractions, sizes in bytes) and optionally `config`, `dataset`, `layers`,
            `gate`, `disagreement`, `exports`, `history`, `environment`, `command`, `seconds`.
            The first row of kind "mixture" is the one that is compared; `correct` (n,) of zeros
            and ones in a row allows the tests; `gate["usage"]` is (N, E), `gate["share"]` (E,) and
            `gate["per_epoch"]` the usage entropy of each epoch in nats; a record of `history`
            holds `step` and, as numbers or lists of one per expert, `loss` and `accuracy`.
        directory: Where to write; made where it does not exist. Files are replaced atomically.

    Returns:
        The path of report.html, one file with everything inside.

    Example:
        >>> import tempfile
        >>> rows = [{"name": "dense", "kind": "dense", "accuracy": 0.9, "bytes": 1000}]
        >>> write({"rows": rows}, tempfile.mkdtemp()).name
        'report.html'
    """
    return publish(describe(results), directory)


def describe(results: dict) -> Document:
    """The report of one run as a Document."""
    if not results.get("rows"):
        raise ValueError(
            f"results must hold a non-empty list 'rows', got keys {sorted(map(str, results))}"
        )
    sections = [
        Section(
            "Results", GLOSSARY, results_table(results["rows"]), tradeoff_plots(results["rows"])
        ),
        _comparison_section(results),
        _gate_section(results),
        _layer_section(results),
        _training_section(results),
        exports.section(results.get("exports") or (), results.get("dataset")),
        _run_section(results),
    ]
    return Document(
        title=title(results),
        summary=comparison.summary(results),
        warnings=comparison.warnings(results),
        sections=[section for section in sections if section],
    )


def title(results: dict) -> str:
    """The heading, with the data set where it is known."""
    name = (results.get("dataset") or {}).get("name")
    return f"Compression report: {name}" if name else "Compression report"


def tradeoff_plots(rows: list[dict]) -> tuple[Plot, ...]:
    """Accuracy against each cost."""
    figures = {cost: plots.accuracy_against(cost, rows) for cost in plots.COSTS}
    return tuple(
        Plot(f"accuracy_{cost}", f"Test accuracy against {plots.COSTS[cost][0]}", figure)
        for cost, figure in figures.items()
        if figure
    )


def results_table(rows: list[dict]) -> Table:
    """One line per model; a field with its spread next to it (`<field>_std`) shows both."""

    def cell(write, row, field, *unit):
        return write(row.get(field), *unit, spread=row.get(f"{field}_std"))

    notes = any(row.get("note") for row in rows)
    header = (
        "model",
        "kind",
        "accuracy",
        "Δ",
        "params",
        "active",
        "size",
        "MACs",
        "BOPs",
        "latency",
    )
    cells = [
        (
            row["name"],
            row["kind"],
            cell(percent, row, "accuracy"),
            cell(points, row, "delta"),
            cell(si, row, "parameters_total"),
            cell(si, row, "parameters_active"),
            cell(si, row, "bytes", "B"),
            cell(si, row, "macs"),
            cell(si, row, "bops"),
            cell(times, row, "latency_ratio"),
            *([row.get("note") or ""] if notes else []),
        )
        for row in rows
    ]
    strong = frozenset(i for i, row in enumerate(rows) if row["kind"] == "mixture")
    return Table((*header, "note") if notes else header, cells, strong)


def _comparison_section(results) -> Section | None:
    comparisons = comparison.compare(results)
    if not comparisons:
        return None
    rows = [
        (
            c.rival,
            percent(c.accuracy),
            points(c.difference),
            str(c.test.only_a) if c.test else MISSING,
            str(c.test.only_b) if c.test else MISSING,
            p_value(c.test.p_value) if c.test else MISSING,
            c.verdict,
        )
        for c in comparisons
    ]
    header = (
        "rival", "accuracy", "difference", "only mixture", "only rival", "McNemar", "verdict",
    )  # fmt: skip
    return Section("The mixture against each control", TEST, Table(header, rows))


def _gate_section(results) -> Section | None:
    gate, matrix = results.get("gate") or {}, results.get("disagreement") or []
    usage = gate.get("usage") or []
    experts = len(usage[0]) if usage else len(matrix)
    names = (results.get("dataset") or {}).get("class_names")
    drawn = _drawn(
        ("gate_usage", "Use of the experts by class", plots.gate_usage(usage, names)),
        (
            "gate_entropy",
            "Entropy of the gate's use of the experts",
            plots.gate_entropy(gate.get("per_epoch"), experts),
        ),
    )
    if not drawn and not matrix:
        return None
    text = ""
    share = comparison.usage_share(gate)
    if share is not None:
        effective = comparison.effective_experts(share)
        text = f"The gate uses {effective:.2f} of {experts} experts (exp of its usage entropy). "
    if entropies := [e for e in map(finite, gate.get("per_epoch") or ()) if e is not None]:
        text += (
            f"Over {len(entropies)} epochs of training its usage entropy went from "
            f"{entropies[0]:.2f} to {entropies[-1]:.2f} nats; even use is {math.log(experts):.2f}. "
        )
    table = None
    if matrix:
        text += "The table gives the share of test images on which two experts disagree."
        header = ("disagreement", *(f"expert {e}" for e in range(len(matrix))))
        table = Table(header, [(f"expert {e}", *map(percent, row)) for e, row in enumerate(matrix)])
    return Section("The gate and its experts", text.strip(), table, drawn)


def _layer_section(results) -> Section | None:
    figure = plots.layers(results.get("layers") or [])
    if not figure:
        return None
    text = (
        "Colour of a width is the share of the dense width that is kept; the number is the width."
    )
    return Section("Layers", text, plots=_drawn(("layers", "Widths, sparsity and bits", figure)))


def _training_section(results) -> Section | None:
    history = results.get("history") or {}
    drawn = _drawn(
        *(
            (f"training_{metric}", f"Training {metric}", plots.training_curve(history, metric))
            for metric in ("loss", "accuracy")
        )
    )
    return Section("Training", plots=drawn) if drawn else None


def _run_section(results) -> Section | None:
    facts = [(str(k), str(v)) for k, v in (results.get("environment") or {}).items()]
    sizes = (results.get("dataset") or {}).get("sizes") or {}
    facts += [(f"images, {split}", f"{size:,}") for split, size in dict(sizes).items()]
    facts += [(f"time, {k}", duration(v)) for k, v in (results.get("seconds") or {}).items()]
    config = results.get("config")
    code = (results.get("command") or "").strip()
    if config:
        code += "\n\n" + json.dumps(config, indent=2, default=str)
    if not facts and not code:
        return None
    table = Table(("fact", "value"), facts) if facts else None
    return Section("This run", "", table, code=code.strip(), folded=True)


def _drawn(*candidates) -> tuple[Plot, ...]:
    return tuple(Plot(*candidate) for candidate in candidates if candidate[-1] is not None)

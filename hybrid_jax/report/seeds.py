"""Several runs that differ in nothing but their seed, as one: means with their deviations."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from flax import traverse_util

from hybrid_jax.report import comparison, page, warnings
from hybrid_jax.report.document import Section, Table, publish
from hybrid_jax.report.formatting import MISSING, listing, percent
from hybrid_jax.report.rows import File, Mean, Number, Results, Row


def average(runs: Sequence[Results]) -> Results:
    """The results of runs that differ in nothing but their seed as those of one.

    Each number of a row and of its files is a `Mean` over the runs, None where a run lacks it;
    `correct` is (runs, n), and counts of confusion are added. What only a single run can show, as
    its gate and its training, is left out.

    Example:
        >>> run = lambda seed, accuracy: Results(
        ...     (Row('net', 'parent', accuracy),), config={'seed': seed})
        >>> row, = average([run(0, 0.90), run(1, 0.92)]).rows
        >>> round(row.accuracy, 4), round(row.accuracy.std, 4)
        (0.91, 0.0141)
    """
    if not runs:
        raise ValueError("runs must hold at least one, got none")
    _check_same_but_seed([run.config for run in runs])
    names = [[row.name for row in run.rows] for run in runs]
    for number, other in enumerate(names):
        if other != names[0]:
            odd = sorted(set(other) ^ set(names[0])) or other
            raise ValueError(f"runs must hold the same rows, got run {number} differing in {odd}")
    first = runs[0]
    return Results(
        rows=tuple(_row(rows) for rows in zip(*(run.rows for run in runs), strict=True)),
        metric=first.metric,
        allowed_loss=first.allowed_loss,
        confusion={
            name: sum(np.asarray(run.confusion[name]) for run in runs).tolist()
            for name in first.confusion
            if all(name in run.confusion for run in runs)
        },
        dataset=first.dataset,
        environment=first.environment,
        config=first.config,
        command=first.command,
    )


def write_average(runs: Sequence[Results], directory) -> pathlib.Path:
    """Write the report over seeds: report.md, report.html and plots; the directory is made.

    Returns the path of report.html.
    """
    document = page.describe(average(runs))
    seeds = [run.config.get("seed") for run in runs]
    gate = [_gate_section(runs, seeds)] if any(run.gate for run in runs) else []
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    document = dataclasses.replace(
        document,
        title=f"{document.title}, {count}",
        subtitle=f"Mean ± sample standard deviation over {count}; a cost that is the same in every "
        f"run stands alone. {document.subtitle}",
        warnings=document.warnings
        + [
            f"Seed {seed}: {text}"
            for seed, run in zip(seeds, runs, strict=True)
            for text in warnings.of_gate(run)
        ],
        sections=document.sections + gate,
    )
    return publish(document, directory)


def _gate_section(runs, seeds) -> Section:
    """How evenly each run uses its experts, and how much these differ."""
    rows = []
    for seed, run in zip(seeds, runs, strict=True):
        share = comparison.usage_share(run.gate)
        matrix = np.asarray(run.disagreement, float)
        pairs = matrix[~np.eye(len(matrix), dtype=bool)] if matrix.ndim == 2 else matrix
        rows.append(
            (
                str(seed),
                MISSING if share is None else f"{comparison.effective_experts(share):.2f}",
                MISSING if share is None else percent(max(share)),
                percent(min(pairs, default=None)),
                percent(max(pairs, default=None)),
            )
        )
    header = ("seed", "experts used", "largest share", "least disagreement", "most")
    text = (
        "Experts used is exp of the gate's usage entropy; disagreement is the share of test images "
        "on which two experts differ."
    )
    return Section("The gate in each run", (text,), Table(header, rows))


def _row(rows: Sequence[Row]) -> Row:
    correct = [row.correct for row in rows]
    alike = None not in correct and len(set(map(len, correct))) == 1
    files = {
        target: _means([row.files[target] for row in rows])
        for target in rows[0].files
        if all(target in row.files for row in rows)
    }
    return dataclasses.replace(_means(rows), correct=correct if alike else None, files=files)


def _means(items: Sequence[Row] | Sequence[File]):
    """The first of rows, or of files, with its numbers as means over all."""

    def mean(values):
        return None if None in values else Mean(values)

    found = {}
    for field in dataclasses.fields(items[0]):
        own = [getattr(item, field.name) for item in items]
        if field.type == Number:
            found[field.name] = mean(own)
        elif field.name.endswith("_quartiles"):
            found[field.name] = None if None in own else tuple(map(mean, zip(*own, strict=True)))
    return dataclasses.replace(items[0], **found)


def _check_same_but_seed(configs) -> None:
    flat = [traverse_util.flatten_dict(dict(config), sep=".") for config in configs]
    for number, other in enumerate(flat):
        keys = {
            key
            for key in flat[0].keys() | other.keys()
            if key.rpartition(".")[2] != "seed"
            and flat[0].get(key, MISSING) != other.get(key, MISSING)
        }
        if keys:
            first = sorted(keys)[0]
            raise ValueError(
                f"configs must differ in nothing but the seed, got run {number} differing from "
                f"run 0 in {listing(sorted(keys))} "
                f"({first}: {flat[0].get(first)!r} and {other.get(first)!r})"
            )
        if other in flat[:number] and other:
            raise ValueError(
                f"runs must have different seeds, got run {number} with the seed of "
                f"run {flat.index(other)}"
            )

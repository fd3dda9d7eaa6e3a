"""Which file to ship: the smallest that loses little, and what is better than what in which way."""

import math
from typing import NamedTuple

from hybrid_jax.report import comparison
from hybrid_jax.report.rows import SHIPPED, File, Results, Row


class Candidate(NamedTuple):
    """A file that could be shipped for a target, and the row of its model."""

    row: Row
    target: str
    file: File

    @property
    def was_run(self) -> bool:
        """Whether it is there and its accuracy was had from it."""
        return self.file.accuracy is not None and self.file.bytes is not None


def candidates(results: Results) -> list[Candidate]:
    """Every file that could be shipped, target by target, in the order of the rows."""
    rows = [row for row in results.rows if row.role in SHIPPED]
    targets = dict.fromkeys(target for row in rows for target in row.files)
    return [
        Candidate(row, target, row.files[target])
        for target in targets
        for row in rows
        if target in row.files and not row.files[target].error
    ]


def choose(results: Results) -> dict[str, Candidate]:
    """The file to ship for each target whose files were run, {target: candidate}.

    With `results.limits` it is the most accurate of those that keep them, where one does. Else it
    is the smallest of those that lose at most `results.allowed_loss` against the parent's file, or
    the one that loses least; of equally small ones the most accurate, then the fastest. What
    another of these dominates is never chosen.

    Example:
        >>> rows = [
        ...     Row(name, role, accuracy, files={'onnx': File(name, size, accuracy)})
        ...     for name, role, accuracy, size in [
        ...         ('net', 'parent', 0.98, 400), ('int8', 'parent_int8', 0.975, 100),
        ...         ('cut', 'single', 0.96, 20)]]
        >>> choose(Results(tuple(rows)))['onnx'].row.name
        'int8'
    """
    chosen = {}
    for target, own in that_ran(results).items():
        if kept := kept_limits(results, own):
            chosen[target] = min(kept, key=lambda c: (-c.file.accuracy, c.file.bytes))
            continue
        allowed = within(results, own) or [max(own, key=lambda c: c.file.accuracy)]
        least = min(c.file.bytes for c in allowed)
        small = [c for c in allowed if c.file.bytes == least]  # What is larger dominates none.
        best = [c for c in small if not any(dominates(results, d, c) for d in small)] or small
        chosen[target] = min(best, key=lambda c: (-c.file.accuracy, c.file.ratio or math.inf))
    return chosen


def axes(results: Results, a: Candidate, b: Candidate) -> dict[str, int]:
    """{axis: 1 where a is better than b, −1 where it is worse, 0 where they are alike}.

    Both are files that were run, for one target. Accuracies are alike where McNemar's test finds no
    difference and they are no further apart than the allowed loss; times where the quartiles of
    their ratios overlap. An axis on which one of them has no number is left out.
    """
    found = {"accuracy": _sign(a.file.accuracy, b.file.accuracy)}
    test = comparison.paired(a.row, b.row)
    near = abs(a.file.accuracy - b.file.accuracy) <= _tolerance(results, [a, b])
    if near and test is not None and test.p_value >= comparison.SIGNIFICANCE:
        found["accuracy"] = 0
    found["bytes"] = _sign(b.file.bytes, a.file.bytes)
    if None not in (a.file.ratio, b.file.ratio):
        own, other = (c.file.ratio_quartiles or (c.file.ratio,) * 2 for c in (a, b))
        overlap = own[0] <= other[1] and other[0] <= own[1]
        found["time"] = 0 if overlap else _sign(b.file.ratio, a.file.ratio)
    elif None not in (a.row.macs, b.row.macs):
        found["MACs"] = _sign(b.row.macs, a.row.macs)
    for own, other in ((a.file.ram, b.file.ram), (a.row.memory, b.row.memory)):
        if None not in (own, other):
            found.setdefault("memory", _sign(other, own))
    return found


def dominates(results: Results, a: Candidate, b: Candidate) -> bool:
    """Whether a is worse than b on no axis, and better on one."""
    signs = axes(results, a, b).values()
    return min(signs) >= 0 and max(signs) > 0


def that_ran(results: Results) -> dict[str, list[Candidate]]:
    """{target: its files that were run}."""
    run = [c for c in candidates(results) if c.was_run]
    return {t: [c for c in run if c.target == t] for t in dict.fromkeys(c.target for c in run)}


def parent_of(own: list[Candidate]) -> Candidate | None:
    """The parent's file among those of one target."""
    return next((c for c in own if c.row.role == "parent"), None)


def _reference(results, own):
    """That of the parent's file, of the parent where it has none, or the best there is."""
    parent, row = parent_of(own), results.first("parent")
    if parent:
        return parent.file.accuracy
    return row.accuracy if row else max(c.file.accuracy for c in own)


def within(results: Results, own: list[Candidate]) -> list[Candidate]:
    """Those files of one target that lose no more than is allowed."""
    least = _reference(results, own) - _tolerance(results, own)
    return [c for c in own if c.file.accuracy >= least]


def kept_limits(results: Results, own: list[Candidate]) -> list[Candidate]:
    """Those files of one target that keep the budget; none where there is none."""

    def costs(c):
        memory = c.row.memory if c.file.ram is None else c.file.ram
        named = {"bytes": c.file.bytes, "memory": memory, "latency": c.file.ratio}
        return named | {"macs": c.row.macs, "bops": c.row.bops}

    def keeps(c):
        own = costs(c)
        return all(own[name] is None or own[name] <= most for name, most in results.limits.items())

    return [c for c in own if keeps(c)] if results.limits else []


def _tolerance(results, own):
    """The allowed loss in units of the metric, and the last digits of a difference."""
    scale = 1 if results.metric == "accuracy" else abs(_reference(results, own))
    return results.allowed_loss * scale + 1e-9


def _sign(a, b):
    return int(a > b) - int(a < b)

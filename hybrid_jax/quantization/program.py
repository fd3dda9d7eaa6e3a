"""One option for each of several decisions, at the least damage within budgets: an integer program.

A decision has a 0/1 variable for each option, of which one is 1. A table over several decisions has
a variable in [0, 1] for each combination of their options, tied to the decisions by its marginals:
for every decision and option, the combinations that hold the option sum to the option's variable.
With 0/1 decisions only the chosen combination can then be 1, so products are exact. (The local
polytope of graphical models: Wainwright and Jordan, Graphical Models, Exponential Families, and
Variational Inference.)
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

# HiGHS stops at an absolute gap of 1e-6; the largest damage is scaled to this.
_SCALE = 1e4


class Table(NamedTuple):
    """A number for each combination of options of the decisions `of`; one axis for each."""

    of: tuple[Hashable, ...]
    values: np.ndarray


class Sum(NamedTuple):
    """⌈sum of integer tables / unit⌉."""

    tables: tuple[Table, ...]
    unit: int = 1


class Limit(NamedTuple):
    """The largest row, each a sum of sums, may be at most `budget`."""

    name: str
    budget: int
    rows: tuple[tuple[Sum, ...], ...]


Choice = dict[Hashable, int]
"""{decision: index of its option}."""


class CannotBeMet(ValueError):
    """No choice keeps every limit."""


def solve(
    options: Mapping[Hashable, Sequence[int]],
    damage: Sequence[Table],
    limits: Sequence[Limit],
) -> Choice:
    """Chooses the options of the least total damage that keep every limit.

    Limits are kept exactly: what the solver finds within its tolerance is counted in integers, and
    excluded if it does not fit. The damage is the least to 1e-10 of the largest entry of a table.
    Where no choice keeps every limit, CannotBeMet names the first that cannot be kept along with
    those before it, and the least that can be had.
    """
    best = _best(options, limits, damage)
    if best is not None:
        return best
    for i, limit in enumerate(limits):
        choice = _best(options, limits[:i], limit)
        least = count(limit, choice)
        if least > limit.budget:
            others = ", ".join(f"{other.name} {other.budget}" for other in limits[:i])
            within = f" within {others}" if others else ""
            raise CannotBeMet(
                f"budget of {limit.name} must be at least {least}{within}, got {limit.budget}"
            )
    raise RuntimeError("the solver found no choice, though each budget can be kept")


def count(limit: Limit, choice: Choice) -> int:
    """What a choice takes of a limit, in exact integers."""
    return max(sum(_count(part, choice) for part in row) for row in limit.rows)


def _count(part: Sum, choice: Choice) -> int:
    total = sum(int(table.values[tuple(choice[d] for d in table.of)]) for table in part.tables)
    return -(-total // part.unit)


def _best(options, limits, goal) -> Choice | None:
    """The choice with the least goal (damage tables, or a limit to take little of), or None."""
    wanted = goal if isinstance(goal, Limit) else None
    counted = [*limits, wanted] if wanted else limits
    tables = [table for limit in counted for row in limit.rows for s in row for table in s.tables]
    program = _Program(options, tables if wanted else [*tables, *goal])
    for limit in limits:
        for row in limit.rows:
            program.at_most(row, limit.budget)
    if wanted:
        program.minimize_largest(wanted.rows)
    else:
        program.minimize_sum(goal)
    while True:
        choice = program.run()
        over = [limit for limit in limits if choice and count(limit, choice) > limit.budget]
        if not over:
            return choice
        parts = [table.of for row in over[0].rows for part in row for table in part.tables]
        program.exclude(choice, dict.fromkeys(itertools.chain(*parts)))


class _Program:
    """Columns, rows and costs of the program, as they are added."""

    def __init__(self, options, tables):
        self.options = options
        self.costs, self.integer, self.upper = [], [], []
        self.entries: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.low, self.high = [], []
        self.blocks = {(d,): self.columns(len(options[d]), 1, 1.0) for d in options}
        for columns in self.blocks.values():
            self.row([(columns, 1.0)], 1.0, 1.0)
        for of in sorted(dict.fromkeys(table.of for table in tables), key=len, reverse=True):
            if self.block(set(of)) is None:
                self.add_block(of)

    def add_block(self, of):
        """Columns for all combinations of several decisions, tied to these by their marginals."""
        shape = tuple(len(self.options[d]) for d in of)
        self.blocks[of] = self.columns(int(np.prod(shape)), 0, 1.0)
        cells = self.blocks[of].reshape(shape)
        for axis, decision in enumerate(of):
            for column, slab in zip(self.blocks[decision,], np.moveaxis(cells, axis, 0)):
                self.row([(slab.ravel(), 1.0), ([column], -1.0)], 0.0, 0.0)

    def columns(self, n, integer, upper):
        first = len(self.costs)
        self.costs += [0.0] * n
        self.integer += [integer] * n
        self.upper += [upper] * n
        return np.arange(first, first + n)

    def row(self, parts, low, high):
        """Adds low ≤ Σ values · columns ≤ high."""
        for columns, values in parts:
            columns = np.asarray(columns)
            values = np.broadcast_to(np.asarray(values, float), columns.shape)
            self.entries.append((len(self.low), columns, values))
        self.low.append(low)
        self.high.append(high)

    def block(self, decisions):
        """The smallest block that holds these decisions, or None."""
        holding = [of for of in self.blocks if decisions <= set(of)]
        return min(holding, key=lambda of: len(self.blocks[of]), default=None)

    def spread(self, table, block):
        """The table on all combinations of the block's decisions."""
        order = [table.of.index(d) for d in block if d in table.of]
        sizes = [len(self.options[d]) for d in block]
        kept = [n if d in table.of else 1 for d, n in zip(block, sizes)]
        return np.broadcast_to(table.values.transpose(order).reshape(kept), sizes).ravel()

    def linear(self, table, factor=1.0):
        """Columns and coefficients of a table."""
        block = self.block(set(table.of))
        return self.blocks[block], factor * self.spread(table, block)

    def total(self, part):
        """Columns and coefficients that add up to a `Sum`."""
        exact = [table for table in part.tables if not np.any(table.values % part.unit)]
        if len(exact) == len(part.tables):
            return [self.linear(table, 1 / part.unit) for table in part.tables]
        block = self.block({d for table in part.tables for d in table.of})
        if block is not None:
            values = sum(self.spread(table, block) for table in part.tables)
            return [(self.blocks[block], -(-values // part.unit))]
        most = sum(int(table.values.max()) for table in part.tables)
        whole = self.columns(1, 1, float(-(-most // part.unit)))
        parts = [self.linear(table, 1 / part.unit) for table in part.tables]
        self.row([*parts, (whole, -1.0)], -np.inf, 0.0)
        return [(whole, 1.0)]

    def at_most(self, row, budget, slack=(), scale=None):
        """Adds row ≤ budget, in units of its largest coefficient."""
        parts = [entry for part in row for entry in self.total(part)]
        scale = scale or max((float(np.max(np.abs(v))) for _, v in parts), default=1.0) or 1.0
        parts = [(columns, np.asarray(values) / scale) for columns, values in parts]
        self.row([*parts, *slack], -np.inf, budget / scale)

    def minimize_sum(self, tables):
        scale = max((float(np.max(np.abs(table.values))) for table in tables), default=1.0) or 1.0
        costs = np.zeros(len(self.costs))
        for table in tables:
            columns, values = self.linear(table, _SCALE / scale)
            costs[columns] += values
        self.costs = costs.tolist()

    def minimize_largest(self, rows):
        """Makes the largest row least: that of a column no smaller than any."""
        [top] = self.columns(1, 0, np.inf)
        most = max(float(np.max(t.values)) for row in rows for part in row for t in part.tables)
        for row in rows:
            self.at_most(row, 0.0, [([top], -1.0)], most or 1.0)
        self.costs[top] = _SCALE

    def exclude(self, choice, decisions):
        """Not all of these decisions as in the choice."""
        columns = [self.blocks[d,][choice[d]] for d in decisions]
        self.row([(columns, 1.0)], -np.inf, len(columns) - 1)

    def run(self) -> Choice | None:
        rows = np.concatenate([np.full(len(columns), i) for i, columns, _ in self.entries])
        columns = np.concatenate([columns for _, columns, _ in self.entries])
        values = np.concatenate([values for *_, values in self.entries])
        shape = (len(self.low), len(self.costs))
        matrix = coo_array((values, (rows, columns.astype(int))), shape=shape).tocsr()
        found = milp(
            self.costs,
            integrality=self.integer,
            bounds=Bounds(0.0, self.upper),
            constraints=LinearConstraint(matrix, self.low, self.high),
            options={"mip_rel_gap": 0.0},
        )
        if found.status == 2:
            return None
        if found.status != 0:
            raise RuntimeError(f"the solver stopped: {found.message}")
        return {d: int(np.argmax(found.x[self.blocks[d,]])) for d in self.options}

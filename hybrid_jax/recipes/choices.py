"""What may be chosen of a network, bits and widths, at what damage, and what keeps a budget."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from hybrid_jax import core, cost, pruning, quantization
from hybrid_jax import program as p
from hybrid_jax.quantization import CannotBeMet, stored
from hybrid_jax.recipes import budget


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """What may be chosen of a program, and at what damage; both are had once for all budgets.

    Attributes:
      program: In floats.
      spec: How the sites of the traced function are quantized where nothing is chosen.
      bits: {output of an operation: {'weight', 'activation' or both: {bits: damage}}}.
      widths: {group of the traced function: {channels kept: damage}}.
      groups: {group of the program: that of the traced function, of the same channels}.
    """

    program: p.Program
    spec: quantization.Spec
    bits: quantization.Sensitivity
    widths: Mapping[str, Mapping[int, float]] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def planned(self) -> quantization.Plan:
        """The plan with the fewest bits: all that is stored for one operation alone is in it."""
        fewest = {op: {r: min(t) for r, t in own.items()} for op, own in self.bits.items()}
        spec = quantization.with_bits(self.spec, self.of_sites(fewest))
        return quantization.plan(self.program, spec)

    def of_sites(self, bits: Mapping[str, Any]) -> dict[str, Any]:
        """The bits of operations, by the names of their sites."""
        return {self.program.sources[op].site: bits[op] for op in self.bits}


def offer(
    program: p.Program,
    spec: quantization.Spec,
    bits: Mapping[str, Sequence[int]],
    least: Mapping[str, int] = MappingProxyType({}),
) -> Choices:
    """What may be chosen of a program, before anything is measured: to ask what a budget can be.

    `bits` are {'weight' or 'activation': bits}, as `what_pays` has them; a role left out keeps its
    bits in `spec`. `least` are {site: bits that its kernel has at least}. Damages are alike for all
    operations: the power of rounding, a quarter for each bit more, less that at the most bits.
    """
    planned = quantization.plan(program, spec)
    alike = {role: {b: 4.0**-b - 4.0 ** -max(own) for b in own} for role, own in bits.items()}

    def of(op):
        enough = least.get(program.sources[op].site, 0)
        return {
            role: {b: d for b, d in own.items() if role != "weight" or b >= min(enough, max(own))}
            for role, own in alike.items()
        }

    return Choices(program, spec, {op: of(op) for op in stored.chosen_operations(planned, bits)})


def measure_bits(
    made: Choices,
    batches: Iterable[tuple[Any, ...]],
    method: str | quantization.Observer = "mse",
    damage: Callable[[Any, Any], jax.Array] = quantization.kl_divergence,
) -> Choices:
    """The same with the damages of bits, measured on the function that is deployed.

    `batches` yield tuples of inputs, of which no labels are needed; `method` finds ranges, and
    `damage` is as for `quantization.sensitivity`. Fewer bits count as no better than more, whatever
    a few inputs say, so that none are taken that no limit asks for.
    """
    batches = list(batches)
    roles = {role for own in made.bits.values() for role in own}
    bits = {
        role: tuple(sorted(set().union(*(own[role] for own in made.bits.values()))))
        for role in sorted(roles)
    }
    if all(len(own) == 1 for own in bits.values()):
        return made
    widest = {role: max(own) for role, own in bits.items()}
    ranges = {}
    for b in sorted({b for own in bits.values() for b in own}):
        at = {role: b if b in own else widest[role] for role, own in bits.items()}
        planned = stored.at_bits(made.planned, at)
        ranges[b] = quantization.calibrate_edges(planned, batches, method)
    found = quantization.plan_sensitivity(made.planned, batches, ranges, made.bits, bits, damage)
    rising = {
        op: {
            role: _rising({b: table[b] for b in made.bits[op][role]}, made.bits[op][role])
            for role, table in own.items()
        }
        for op, own in found.items()
    }
    return dataclasses.replace(made, bits={op: made.bits[op] | own for op, own in rising.items()})


def _rising(table: Mapping[int, float], alike: Mapping[int, float]) -> dict[int, float]:
    """The damages, of which each is at least that of more bits, and of equals a hair above it."""
    bits = sorted(table, reverse=True)
    worst = np.maximum.accumulate([table[b] for b in bits]).tolist()
    return {b: own + 1e-6 * alike[b] for b, own in zip(bits, worst, strict=True)}


def choose(
    made: Choices,
    limits: Mapping[str, int],
    targets: Sequence[str] = ("c",),
) -> quantization.Allocation:
    """The bits, and widths where there are any, that keep every limit at the least damage.

    Args:
      made: What may be chosen.
      limits: {'bytes', 'memory', 'macs' or 'bops': the most it may be}.
      targets: Whose files are made; each keeps the limit of bytes.

    Returns:
      Bits by site, and widths by group of the traced function. Costs are predictions.

    Raises:
      ValueError: If none keeps them: names the budget, the least that it could be, and the effort.
    """
    planned, files = made.planned, budget.files(targets)
    counted = cost.of_program(planned.program, stored.encodings(planned), files)
    spec = stored.of_operations(planned, counted.formula.kernels)
    widths = {own: made.widths[g] for own, g in made.groups.items() if g in made.widths}
    asked = dict(limits) or {"macs": counted.formula.count()["macs"]}
    while True:
        try:
            found = quantization.allocate_bits(
                made.bits, counted.formula, spec, asked, widths=widths
            )
        except CannotBeMet as error:
            raise CannotBeMet(f"{error}: {_effort(made, counted, spec, limits)}") from None
        placed = counted.memory(found.widths)
        if placed <= limits.get("memory", placed):
            break
        # No place was found for all that is live at a time: less must be.
        asked["memory"] = found.costs["memory"] - (placed - limits["memory"])
    return quantization.Allocation(
        made.of_sites(found.bits),
        {made.groups[own]: n for own, n in found.widths.items()},
        found.damage,
        found.costs | {"memory": placed},
    )


def _effort(made, counted, spec, limits):
    """What could keep the limits."""
    if made.widths:
        return "channels and bits do not meet it, a smaller network could"
    narrow = {name: {1: 0.0, n: 0.0} for name, n in counted.formula.widths.items()}
    try:
        quantization.allocate_bits(made.bits, counted.formula, spec, limits, widths=narrow)
    except CannotBeMet:
        return "no effort meets it, a smaller network could"
    return "effort 'ptq' chooses bits only, 'finetune' removes channels too"


def with_widths(
    made: Choices, graph: core.Graph, widths: Mapping[str, Mapping[int, float]]
) -> Choices:
    """The same with widths to choose from: {group of the graph: {channels kept: damage}}.

    `graph` is of the traced function. A group whose channels the program does not have as a group
    of as many, as where an array has some of them twice, keeps them all.
    """
    for name in widths:
        core.check_choice("group of widths", name, [group.name for group in graph.groups])
    sites = {site.name: site for site in graph.sites}
    paths = {
        f"{op}/kernel": sites[source.site].path
        for op, source in made.program.sources.items()
        if source.site in sites
    }
    outputs = {(site.path, axis) for site in graph.sites for axis in site.kernel_out_axes}
    theirs = {
        (member.path, *sorted(member.index.ravel().tolist())): group.name
        for group in graph.groups
        for member in group.members
        if (member.path, member.axis) in outputs
    }
    groups = {}
    for own in cost.of_program(made.program).groups:
        made_by = (
            (paths.get(member.path), *sorted(member.index.ravel().tolist()))
            for member in own.members
            if member.axis == len(member.shape) - 1  # of kernels the outputs
        )
        names = {theirs[key] for key in made_by if key in theirs}
        if len(names) == 1 and not names & set(groups.values()):
            [groups[own.name]] = names
    return dataclasses.replace(made, widths=widths, groups=groups)


def kept_of(n: int, least: float = 0.25, steps: int = 8) -> list[int]:
    """How many of n channels may be kept: whole `steps`-ths of them, from the part `least` on.

    Example:
      >>> kept_of(16)
      [4, 6, 8, 10, 12, 14, 16]
    """
    kept = sorted({max(1, round(n * i / steps)) for i in range(1, steps + 1)})
    return [k for k in kept if k >= n * least or k == n]


def measure_widths(
    fn: Callable[..., Any],
    params: Any,
    graph: core.Graph,
    scores: Any,
    *inputs: Any,
    parts: Sequence[float] = (0.25, 0.5, 0.75),
    steps: int = 8,
    damage: Callable[[Any, Any], jax.Array] = quantization.kl_divergence,
) -> dict[str, dict[int, float]]:
    """{group: {channels kept: damage}} of each group alone, measured at parts of its channels.

    Between the parts damages are on straight lines. `scores` say which channels go first, see
    `pruning.sensitivity`; widths are whole `steps`-ths of a group, from the smallest part on.
    """
    expected = jax.jit(fn)(params, *inputs)

    def measure(params, expected, *inputs):
        return damage(fn(params, *inputs), expected)

    losses = pruning.sensitivity(
        measure,
        params,
        scores,
        [1 - part for part in parts],
        expected,
        *inputs,
        granularity=pruning.channels(graph.groups),
    )
    found = {}
    for group in graph.groups:
        n, own = group.size, dict(zip(parts, np.asarray(losses[group.name]).tolist(), strict=True))
        known = sorted((own | {1.0: 0.0}).items())
        kept = kept_of(n, known[0][0], steps)
        at = np.interp([k / n for k in kept], *zip(*known, strict=True))
        found[group.name] = dict(zip(kept, at.tolist(), strict=True))
    return found

"""Costs as formulas in channel widths and bits, from which a budget can be planned."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax import core
from hybrid_jax.core import interpreter
from hybrid_jax.cost.arguments import FLOAT_BITS, all_bits, kept_counts, scales_of_kernels

SCALE_BYTES = 4

Decision = tuple[str, Any]
"""What is chosen: ('width', group), ('weight', path of a kernel) or ('activation', site)."""

Polynomial = dict[tuple[str, ...], int]
"""{groups, repeated for powers: coefficient} of a size in the widths of groups."""


class Term(NamedTuple):
    """value(*chosen): an integer that depends on the decisions `of`, in their order."""

    of: tuple[Decision, ...]
    value: Callable[..., int]


class Amount(NamedTuple):
    """⌈sum of the terms / unit⌉."""

    terms: tuple[Term, ...]
    unit: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """What a model costs as a function of widths and bits.

    `costs` are {'macs', 'bops' or 'bytes', as in `Cost`; of a program 'memory' too: rows}; a row is
    a tuple of amounts that are added, the cost the largest. `widths` are {group: channels n} of
    those whose width may be chosen, `kernels` {site name: path of its kernel}, in running order.
    """

    costs: Mapping[str, tuple[tuple[Amount, ...], ...]]
    widths: Mapping[str, int]
    kernels: Mapping[str, str]

    def count(
        self,
        widths: Mapping[str, int] | None = None,
        weight_bits: Mapping[str, int] | None = None,
        activation_bits: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """The costs at these widths and bits; what is missing keeps all channels and 32 bits."""
        rows = self.amounts(self.decisions(widths, weight_bits, activation_bits))
        return {name: max(map(sum, found)) for name, found in rows.items()}

    def decisions(
        self,
        widths: Mapping[str, int] | None = None,
        weight_bits: Mapping[str, int] | None = None,
        activation_bits: Mapping[str, int] | None = None,
    ) -> dict[Decision, int]:
        """{what is chosen: its value} of the arguments that `count` takes."""
        chosen: dict[Decision, int] = {("width", name): n for name, n in self.widths.items()}
        for name, width in (widths or {}).items():
            core.check_choice("group of widths", name, self.widths)
            chosen["width", name] = core.check_integer(
                f"widths of {name!r}", width, 1, self.widths[name]
            )
        weight_bits = all_bits("weight_bits", self.kernels, weight_bits)
        activation_bits = all_bits("activation_bits", self.kernels, activation_bits)
        for site, path in self.kernels.items():
            chosen["activation", site] = activation_bits[site]
            chosen["weight", path] = max(weight_bits[site], chosen.get(("weight", path), 0))
        return chosen

    def amounts(self, chosen: Mapping[Decision, int]) -> dict[str, list[list[int]]]:
        """What `count` adds up: MACs and BOPs of each site and of the rest, bytes of each leaf."""

        def value(amount):
            total = sum(term.value(*map(chosen.get, term.of)) for term in amount.terms)
            return -(-total // amount.unit)

        return {name: [list(map(value, row)) for row in rows] for name, rows in self.costs.items()}


def formula(
    graph: core.Graph,
    masks: Any = None,
    scales: Mapping[str, int] | None = None,
    *,
    groups: Sequence[core.Group] | None = None,
) -> Formula:
    """Finds what a model costs as a function of the widths of its groups and the bits of its sites.

    It is what `count` finds on the network that `core.shrink` makes with so many channels kept.
    With `masks`, or with `scales` in groups (neither one per output channel nor one per tensor), as
    `count` takes them, widths cannot be chosen: shrink first. Nor can they where two activations
    are multiplied with each other. An array that holds the channels of a group unequally often is
    an error: leave that group out of `groups`, which are by default all of the graph's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> params = {'a': jnp.ones((4, 10)), 'b': jnp.ones((10, 2))}
      >>> f = formula(core.trace(fn, params, jnp.ones((1, 4))))
      >>> f.widths
      {'a': 10}
      >>> f.count({'a': 6}, {'a': 8, 'b': 8})['bytes']  # 4·6 + 6·2 weights, 6 + 2 scales of 4 bytes
      68
    """
    kept = kept_counts(graph, masks)
    between = graph.macs - sum(site.macs for site in graph.sites)
    fixed_scales = scales_of_kernels(graph, scales)
    scalable = all(n <= 1 for n in fixed_scales.values())
    fixed = masks is not None or between or not scalable
    groups = () if fixed else graph.groups if groups is None else groups
    measure = sizes(graph, groups)
    macs, bops, kernels = [], [], {}
    for where, site in graph.site_at.items():
        if interpreter.in_derivative(where):
            continue
        labels = graph.analysis.equations[where][0][site.kernel_operand].labels
        kernels.setdefault(site.path, (site, labels, fixed_scales.get(site.path)))
        if masks is None:
            work = _scaled(measure(labels), site.macs, max(math.prod(site.kernel_shape), 1))
        else:
            size = graph.parameters[site.path].size
            work = {(): site.macs * kept[site.path] // max(size, 1)}
        macs.append(amount(work))
        bops.append(amount(work, (("weight", site.path), ("activation", site.name))))
    stored = [_stored_bytes(graph, measure, path, kernels.get(path)) for path in kept]
    costs = {
        "macs": ((*macs, amount({(): between})),),
        "bops": ((*bops, amount({(): between * FLOAT_BITS**2})),),
        "bytes": (tuple(stored),),
    }
    return Formula(
        costs,
        {group.name: group.size for group in groups},
        {site.name: site.path for site in graph.sites},
    )


def sizes(graph: core.Graph, groups: Sequence[core.Group]) -> Callable[[Any], Polynomial]:
    """From the labels of each axis of an array to its size, a polynomial in the groups' widths."""
    if not groups:
        return lambda axes: {(): math.prod(map(len, axes))}
    of = graph.components.of
    owner: dict[int, tuple[str, int]] = {}
    for group in groups:
        first = group.members[0]
        labels = _parameter(graph, first.path)[first.axis]
        owner |= {int(of[labels[i]]): (group.name, group.size) for i in first.index[:, 0]}

    def length(labels) -> Polynomial:
        size: Polynomial = collections.Counter()
        found, counts = np.unique(of[labels], return_counts=True)
        shares = collections.defaultdict(list)
        for component, times in zip(found.tolist(), counts.tolist(), strict=True):
            if component in owner:
                shares[owner[component]].append(times)
            else:
                size[()] += times
        for (name, n), times in shares.items():
            if len(times) != n or len(set(times)) > 1:
                raise ValueError(
                    f"graph must hold the channels of group {name!r} equally often in every array, "
                    f"got {len(times)} of {n}"
                )
            size[(name,)] += times[0]
        return dict(size)

    def measure(axes) -> Polynomial:
        size: Polynomial = {(): 1}
        for labels in axes:
            product: Polynomial = collections.Counter()
            for a, m in size.items():
                for b, n in length(labels).items():
                    product[tuple(sorted(a + b))] += m * n
            size = dict(product)
        return size

    return measure


def _stored_bytes(graph, measure, path, kernel) -> Amount:
    """Bytes of a parameter; of a kernel with its scales: (site, labels of each axis, scales)."""
    size = measure(_parameter(graph, path))
    if kernel is None:
        return amount(_scaled(size, FLOAT_BITS), unit=8)
    (site, labels, scales), weight = kernel, ("weight", path)
    if scales is None:
        channels = measure([axis for i, axis in enumerate(labels) if i not in site.kernel_in_axes])
        # A kernel that scans run over is stored once for each run.
        times = graph.parameters[path].size * 8 * SCALE_BYTES
        scale_bits = _scaled(channels, times, max(math.prod(site.kernel_shape), 1))
    else:
        scale_bits = {(): scales * 8 * SCALE_BYTES}
    gated = tuple(_if_quantized(term, weight) for term in amount(scale_bits).terms)
    return Amount(amount(size, (weight,)).terms + gated, unit=8)


def amount(size: Polynomial, bits: tuple[Decision, ...] = (), unit: int = 1) -> Amount:
    """Multiplies a size by bits, a term for each monomial."""
    terms = []
    for groups, factor in size.items():
        powers = collections.Counter(groups)
        of = (*(("width", group) for group in powers), *bits)
        terms.append(Term(of, _product(factor, (*powers.values(), *(1 for _ in bits)))))
    return Amount(tuple(terms), unit)


def _product(factor, powers) -> Callable[..., int]:
    return lambda *chosen: factor * math.prod(c**p for c, p in zip(chosen, powers, strict=True))


def _if_quantized(term: Term, weight: Decision) -> Term:
    """The term, or nothing at 32 bits."""
    return Term(
        (*term.of, weight),
        lambda *chosen: term.value(*chosen[:-1]) if chosen[-1] < FLOAT_BITS else 0,
    )


def _parameter(graph, path):
    return graph.arguments[list(graph.parameters).index(path)].labels


def _scaled(size: Polynomial, factor: int, divisor: int = 1) -> Polynomial:
    """Each coefficient · factor / divisor, whole."""
    return {groups: n * factor // divisor for groups, n in size.items()}

"""Tracing a model once, to its sites, its channels and its cost in multiply-accumulates."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import checks, interpreter, paths
from hybrid_jax.core.analysis import Analysis
from hybrid_jax.core.arrangement import Kernel, find_kernels, whole
from hybrid_jax.core.channels import Components, Group, components, group_channels
from hybrid_jax.core.labels import INPUT, Value, sizes
from hybrid_jax.core.sites import Site


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """What tracing `fn(params, *inputs)` found.

    The arguments of the closed `jaxpr`, and `arguments`, their labels, are the leaves of (params,
    *inputs). `batch` is the length of the leading axis of the first input, 1 if that is symbolic.
    `sites` are in running order; `site_at` has those in derivative rules too. `macs` are the
    multiply-accumulates for one example, products of two activations included.
    """

    jaxpr: jex.ClosedJaxpr
    out_tree: Any
    parameters: dict[str, jax.ShapeDtypeStruct]
    batch: int
    sites: tuple[Site, ...]
    macs: int
    arguments: tuple[Value, ...]
    outputs: tuple[Value, ...]
    analysis: Analysis
    site_at: dict[interpreter.Path, Site]

    def __repr__(self) -> str:
        parts = (
            f"{len(self.sites)} sites, {len(self.groups)} groups, {len(self.frozen)} frozen axes"
        )
        return f"Graph({parts}, {self.macs} MACs)"

    @functools.cached_property
    def components(self) -> Components:
        """The component of each label, and why those that are frozen are."""
        own = [axis for v in self.arguments[: len(self.parameters)] for axis in v.labels]
        unused = [axis for axis in own if id(axis) not in self.analysis.used]
        extra = [(axis, "is an output of the function") for v in self.outputs for axis in v.labels]
        extra += [(axis, "is used by no equation") for axis in unused]
        return components(self.analysis.labels, extra)

    @functools.cached_property
    def _grouped(self):
        labels = {path: v.labels for path, v in zip(self.parameters, self.arguments, strict=False)}
        order = list(dict.fromkeys(site.path for site in self.sites))
        return group_channels(self.components, labels, order)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The coupled channels that can be removed, largest kernel first in running order."""
        return self._grouped[0]

    @property
    def frozen(self) -> tuple[tuple[str, int, str], ...]:
        """(path, axis, reason) of every parameter axis of which some index cannot be removed."""
        return self._grouped[1]

    @functools.cached_property
    def kernels(self) -> dict[str, Kernel]:
        """{path: kernel} of the floating parameters that are kernels, as a whole, of the sites."""
        return find_kernels(self.sites, self.parameters)


def trace(fn: Callable[..., Any], params: Any, *inputs: Any) -> Graph:
    """Traces a model and reads its sites, channel groups and costs from the jaxpr.

    `fn` is pure, of Flax Linen, NNX (`nnx.split`), Haiku, Equinox or bare JAX; it is traced, not
    run. `params`, in Linen the whole variables dict, and inputs are pytrees of arrays or
    `jax.ShapeDtypeStruct`s; the leading axis of the first input's first leaf is the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params['hidden']) @ params['out']
      >>> params = {'hidden': jnp.ones((3, 8)), 'out': jnp.ones((8, 2))}
      >>> graph = trace(fn, params, jnp.ones((5, 3)))
      >>> [(site.name, site.macs) for site in graph.sites]
      [('hidden', 24), ('out', 16)]
      >>> [(group.name, group.size) for group in graph.groups]
      [('hidden', 8)]
    """
    flat = paths.flatten_paths(params)
    if not flat:
        raise ValueError("params must have at least one leaf, got none")
    for path, leaf in flat.items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(f"params must have arrays as leaves, got {leaf!r} at {path!r}")
    shapes = jax.tree.map(abstract, (params, *inputs))
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    parameters = paths.flatten_paths(shapes[0])
    # Of a kernel and a stored mask of its shape the floats are the kernel.
    floating = {p: jax.numpy.issubdtype(leaf.dtype, np.floating) for p, leaf in parameters.items()}
    analysis = Analysis({p: (leaf.size, floating[p]) for p, leaf in parameters.items()})
    arguments = []
    for path, leaf in parameters.items():
        value = analysis.labels.value(leaf.shape, frozenset([path]), rest=0.0)
        own = whole(path, leaf.shape) if floating[path] else None
        arguments.append(dataclasses.replace(value, arrangement=own))
    analysis.labels.given = analysis.labels.count
    for leaf in jax.tree.leaves(shapes[1:]):
        zeros = tuple(np.zeros(n, np.int32) for n in sizes(leaf.shape))
        arguments.append(Value(zeros, (None,) * len(zeros), INPUT))
    outputs = analysis.walk(closed, arguments, (), 1)
    (batch,) = sizes([checks.batch_size(shapes[1:])])
    out_tree = jax.tree.structure(out_shape)
    return from_analysis(closed, out_tree, parameters, batch, arguments, outputs, analysis)


def from_analysis(
    jaxpr: jex.ClosedJaxpr,
    out_tree: Any,
    parameters: dict[str, jax.ShapeDtypeStruct],
    batch: int,
    arguments: Sequence[Value],
    outputs: Sequence[Value],
    analysis: Analysis,
) -> Graph:
    """The graph of a program that was walked, with costs for one example of `batch`."""
    scaled = {
        path: dataclasses.replace(site, macs=site.macs // max(batch, 1))
        for path, site in analysis.sites.items()
    }
    return Graph(
        jaxpr,
        out_tree,
        parameters,
        batch,
        tuple(site for path, site in scaled.items() if not interpreter.in_derivative(path)),
        analysis.macs // max(batch, 1),
        tuple(arguments),
        tuple(outputs),
        analysis,
        scaled,
    )


def memoize_trace(fn: Callable[..., Any]) -> Callable[..., Graph]:
    """`trace` for one function, remembered for the last few shapes of its arguments."""
    seen: collections.OrderedDict[Any, Graph] = collections.OrderedDict()

    def cached(params, *inputs):
        leaves, tree = jax.tree.flatten((params, *inputs))
        signature = tree, tuple(abstract(leaf) for leaf in leaves)
        # A constant that is a tracer belongs to the trace it was made in.
        if signature not in seen or _holds_tracers(seen[signature]):
            seen[signature] = trace(fn, params, *inputs)
            if len(seen) > 8:
                seen.popitem(last=False)
        return seen[signature]

    return cached


def _holds_tracers(graph: Graph) -> bool:
    return any(isinstance(const, jax.core.Tracer) for const in graph.jaxpr.consts)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The type of an array: its shape, dtype, and the mesh axes it varies over in `shard_map`."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    weak = getattr(aval, "weak_type", False)
    manual = getattr(aval, "manual_axis_type", None)
    if not manual or not manual.varying:
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=weak, sharding=aval.sharding, manual_axis_type=manual
    )

"""Tracing a model once, to its sites, its channels and its cost in multiply-accumulates."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import interpreter, paths
from hybrid_jax.core.channels import Group, group_channels
from hybrid_jax.core.labels import (
    INPUT,
    TANGENT,
    Labels,
    Value,
    barrier,
    common,
    is_contraction,
    join_origins,
    literal,
    propagate,
    sizes,
)


@dataclasses.dataclass(frozen=True)
class Site:
    """A convolution or matrix product whose kernel comes from the parameters.

    Attributes:
      name: The kernel's path; a kernel used again is 'path#2', 'path#3', ….
      path: Path of the parameter that the kernel is computed from (the largest, if several).
      kind: 'conv' or 'dot'.
      macs: Multiply-accumulates for one example, all `calls` counted.
      input_shape: Shape of the activation, with the batch.
      kernel_shape: Shape of the kernel as the operation takes it.
      output_shape: Shape of the result, with the batch.
      feature_axis: Axis of the activation that holds C.
      kernel_in_axes: Axes of the kernel that are summed over (C and the spatial ones).
      kernel_out_axes: Axes of the kernel that are output channels O.
      kernel_operand: Position of the kernel among the operation's two operands.
      groups: Number of feature groups of a convolution; C for a depthwise one.
      calls: How often it runs (the length of the scans around it).
    """

    name: str
    path: str
    kind: str
    macs: int
    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    feature_axis: int
    kernel_in_axes: tuple[int, ...]
    kernel_out_axes: tuple[int, ...]
    kernel_operand: int
    groups: int
    calls: int


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """What tracing `fn(params, *inputs)` found.

    Attributes:
      jaxpr: The closed jaxpr; its arguments are the leaves of (params, *inputs).
      out_tree: Structure of the outputs.
      parameters: {path: ShapeDtypeStruct} of the parameters, in tree order.
      batch: Length of the leading axis of the first input, 1 if that is symbolic; costs are divided
        by it.
      sites: The sites, in the order in which they run.
      macs: Multiply-accumulates for one example, products of two activations included.
      labels: The channel labels.
      arguments: The arguments' labels, parameters first.
      constants: The labels of the jaxpr's constants.
      outputs: The labels of the outputs.
      equations: {path of an equation: (values in, values out)}.
      site_at: {path of an equation: its site}, those in derivative rules included.
    """

    jaxpr: jex.ClosedJaxpr
    out_tree: Any
    parameters: dict[str, jax.ShapeDtypeStruct]
    batch: int
    sites: tuple[Site, ...]
    macs: int
    labels: Labels
    arguments: tuple[Value, ...]
    constants: tuple[Value, ...]
    outputs: tuple[Value, ...]
    equations: dict[interpreter.Path, tuple[list[Value], list[Value]]]
    site_at: dict[interpreter.Path, Site]

    @functools.cached_property
    def _grouped(self):
        labels = [value.labels for value in self.arguments[: len(self.parameters)]]
        extra = [(axis, "is an output of the function") for v in self.outputs for axis in v.labels]
        return group_channels(
            self.labels,
            dict(zip(self.parameters, labels, strict=True)),
            extra,
            list(dict.fromkeys(site.path for site in self.sites)),
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """The coupled channels that can be removed, largest kernel first in running order."""
        return self._grouped[0]

    @property
    def frozen(self) -> tuple[tuple[str, int, str], ...]:
        """(path, axis, reason) of every parameter axis of which some index cannot be removed."""
        return self._grouped[1]

    def site(self, name: str) -> Site:
        """The site of this name.

        Raises:
          ValueError: If there is none; lists the names.
        """
        for site in self.sites:
            if site.name == name:
                return site
        names = ", ".join(site.name for site in self.sites)
        raise ValueError(f"name must be a site of the graph, got {name!r}, expected one of {names}")


def trace(fn: Callable[..., Any], params: Any, *inputs: Any) -> Graph:
    """Traces a model and reads its sites, channel groups and costs from the jaxpr.

    Args:
      fn: A pure function fn(params, *inputs) -> outputs, from Flax Linen, NNX (`nnx.split`), Haiku,
        Equinox or bare JAX. It is traced, not run.
      params: Pytree of arrays or `jax.ShapeDtypeStruct`. In Linen, the whole variables dict.
      *inputs: Arrays, `jax.ShapeDtypeStruct`s or pytrees of them; the leading axis of the first
        leaf is the batch. PRNG keys may be among them.

    Returns:
      A `Graph`.

    Raises:
      ValueError: If `params` has no leaf, or two leaves of the same path.

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
    as_shape = functools.partial(jax.tree.map, _shape)
    shapes = as_shape((params, *inputs))
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    parameters = paths.flatten_paths(shapes[0])
    analysis = _Analysis({path: leaf.size for path, leaf in parameters.items()})
    arguments = []
    for path, leaf in parameters.items():
        arguments.append(analysis.labels.value(leaf.shape, frozenset([path]), rest=0.0))
    for leaf in jax.tree.leaves(shapes[1:]):
        zeros = tuple(np.zeros(n, np.int32) for n in sizes(leaf.shape))
        arguments.append(Value(zeros, (None,) * len(zeros), INPUT))
    used = {v for eqn in closed.jaxpr.eqns for v in eqn.invars if not isinstance(v, jex.Literal)}
    for var, value in zip(closed.jaxpr.invars, arguments, strict=True):
        if var not in used:
            for axis in value.labels:
                analysis.labels.freeze(axis, "is used by no equation")
    consts = [literal(const, analysis.labels) for const in closed.consts]
    outputs = analysis.walk(closed.jaxpr, consts, arguments, (), 1)
    leaves = [leaf for leaf in jax.tree.leaves(shapes[1:]) if leaf.shape]
    batch = sizes(leaves[0].shape)[0] if leaves else 1
    scaled = {
        path: dataclasses.replace(site, macs=site.macs // max(batch, 1))
        for path, site in analysis.sites.items()
    }
    return Graph(
        closed,
        jax.tree.structure(out_shape),
        parameters,
        batch,
        tuple(site for path, site in scaled.items() if not interpreter.in_derivative(path)),
        analysis.macs // max(batch, 1),
        analysis.labels,
        tuple(arguments),
        tuple(consts),
        tuple(outputs),
        analysis.equations,
        scaled,
    )


def at_sites(fn: Callable[..., Any], rule: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Makes a function that does the same as `fn`, but at every site what `rule` says.

    Args:
      fn: A pure function fn(params, *inputs) -> outputs.
      rule: rule(site, x, kernel, apply) -> (y, record). `apply(x, kernel)` runs the operation as it
        was; `record` is a pytree of arrays, or None. Works on tracers: it must be pure.

    Returns:
      A function (params, *inputs) -> (outputs, records), with records {site name: record}. With
      rule `lambda site, x, kernel, apply: (apply(x, kernel), None)` its outputs are bit-equal to
      those of `fn` (both jitted). A site in a `scan` records a stack with one row for each
      iteration; in a branch of `cond` that was not taken, zeros; in a `while`, nothing. Derivative
      rules are kept, and the sites in them replaced alike.

    Example:
      >>> import jax.numpy as jnp
      >>> def largest(site, x, kernel, apply):
      ...     return apply(x, kernel), jnp.max(jnp.abs(x))
      >>> fn = lambda params, x: x @ params['w']
      >>> y, records = at_sites(fn, largest)({'w': jnp.ones((2, 1))}, jnp.array([[3.0, -4.0]]))
      >>> y.tolist(), float(records['w'])
      ([[-1.0]], 4.0)
    """
    cached = memoize_trace(fn)

    def interpreted(params, *inputs):
        graph = cached(params, *inputs)
        touched = {path[:n] for path in graph.site_at for n in range(1, len(path) + 1)}

        def visit(path, eqn, values):
            site = graph.site_at[path]
            x, kernel = values[1 - site.kernel_operand], values[site.kernel_operand]

            def apply(x, kernel):
                pair = (x, kernel) if site.kernel_operand == 1 else (kernel, x)
                return interpreter.bind(eqn, pair)[0]

            y, record = rule(site, x, kernel, apply)
            return [y], {} if record is None else {site.name: record}

        outs, records = interpreter.evaluate(
            graph.jaxpr.jaxpr,
            graph.jaxpr.consts,
            jax.tree.leaves((params, *inputs)),
            visit,
            touched.__contains__,
        )
        return jax.tree.unflatten(graph.out_tree, outs), records

    return interpreted


def memoize_trace(fn: Callable[..., Any]) -> Callable[..., Graph]:
    """`trace` for one function, remembered for the last few shapes of its arguments."""
    seen: collections.OrderedDict[Any, Graph] = collections.OrderedDict()

    def cached(params, *inputs):
        leaves, tree = jax.tree.flatten((params, *inputs))
        shapes = [_shape(leaf) for leaf in leaves]
        signature = tree, tuple((s.shape, s.dtype, s.weak_type) for s in shapes)
        # A constant that is a tracer belongs to the trace it was made in.
        if signature not in seen or _holds_tracers(seen[signature]):
            seen[signature] = trace(fn, params, *inputs)
            if len(seen) > 8:
                seen.popitem(last=False)
        return seen[signature]

    return cached


def _holds_tracers(graph: Graph) -> bool:
    return any(isinstance(const, jax.core.Tracer) for const in graph.jaxpr.consts)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


class _Analysis:
    """The abstract walk over a jaxpr: labels of every value, sites, multiply-accumulates."""

    def __init__(self, counts):
        self.counts = counts
        self.labels = Labels()
        self.equations: dict[interpreter.Path, tuple[list[Value], list[Value]]] = {}
        self.sites: dict[interpreter.Path, Site] = {}
        self.names: collections.Counter[str] = collections.Counter()
        self.counted: set[interpreter.Path] = set()
        self.macs = 0

    def walk(self, jaxpr, consts, args, path, calls) -> list[Value]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom):
            if isinstance(atom, jex.Literal):
                return literal(atom.val, self.labels)
            return env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            here = (*path, index)
            values = [read(atom) for atom in eqn.invars]
            inner = interpreter.subjaxprs(eqn, here)
            if inner:
                outs = self.enter(eqn, inner, values, here, calls)
            else:
                outs = propagate(self.labels, eqn, values)
                if is_contraction(eqn):
                    self.contraction(eqn, values, here, calls)
            self.equations[here] = values, outs
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def contraction(self, eqn, values, path, calls):
        if path in self.counted:  # The body of a scan may be walked twice.
            return
        self.counted.add(path)
        macs = calls * _macs(eqn)
        if not interpreter.in_derivative(path):
            self.macs += macs
        operand = _kernel_operand(eqn, values)
        if operand is None:
            return
        site = _site(eqn, values, operand, macs, calls, self.counts)
        self.names[site.path] += 1
        count = self.names[site.path]
        name = site.path if count == 1 else f"{site.path}#{count}"
        self.sites[path] = dataclasses.replace(site, name=name)

    def enter(self, eqn, inner, values, path, calls) -> list[Value]:
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, inner["body"], values, path, calls)
        if name == "while":
            return self.loop(eqn, inner, values, path, calls)
        if name == "cond":
            return self.branches(inner, values, path, calls)
        if name.startswith("custom_"):
            return self.custom(eqn, inner, values, path, calls)
        return self.body(inner["body"], values, (*path, "body"), calls)

    def body(self, closed, values, path, calls) -> list[Value]:
        consts = [literal(const, self.labels) for const in closed.consts]
        return self.walk(closed.jaxpr, consts, values, path, calls)

    def scan(self, eqn, closed, values, path, calls):
        consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
        xs = []
        for value in values[consts + carried :]:
            self.labels.freeze(value.labels[0], "is the axis that a scan runs over")
            xs.append(Value(value.labels[1:], value.rest[1:], value.origin))
        carry = [
            dataclasses.replace(v, constant=None, origin=join_origins(values))
            for v in values[consts : consts + carried]
        ]
        while True:
            args = [*values[:consts], *carry, *xs]
            length = eqn.params["length"]
            outs = self.body(closed, args, (*path, "body"), calls * length)
            settled = [self.merge([a, b]) for a, b in zip(carry, outs[:carried], strict=True)]
            if [v.rest for v in settled] == [v.rest for v in carry]:
                break
            carry = settled
        stacked = [
            Value((np.zeros(length, np.int32), *v.labels), (None, *v.rest), v.origin)
            for v in outs[carried:]
        ]
        return [*carry, *stacked]

    def loop(self, eqn, inner, values, path, calls):
        outs = barrier(self.labels, eqn, values, "goes through while")
        frozen = [
            Value(tuple(np.zeros(n, np.int32) for n in v.shape), (None,) * len(v.shape), v.origin)
            for v in values
        ]
        conds, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = frozen[conds + bodies :]
        self.body(inner["cond"], [*frozen[:conds], *carry], (*path, "cond"), calls)
        body = [*frozen[conds : conds + bodies], *carry]
        self.body(inner["body"], body, (*path, "body"), calls)
        return outs

    def branches(self, inner, values, path, calls):
        results = [
            self.body(branch, values[1:], (*path, name), calls) for name, branch in inner.items()
        ]
        index = values[0].origin
        merged = [self.merge(outs) for outs in zip(*results, strict=True)]
        return [dataclasses.replace(v, origin=join_origins([v, _from(index)])) for v in merged]

    def merge(self, values) -> Value:
        """What is known of a value that is one of these: tied labels, common rests."""
        first, *others = values
        for other in others:
            for a, b in zip(first.labels, other.labels, strict=True):
                self.labels.tie(a, b)
        rest = tuple(common(rests) for rests in zip(*[v.rest for v in values], strict=True))
        labels = tuple(
            next((a for a in axes if not a.any()), axes[0])
            for axes in zip(*[v.labels for v in values], strict=True)
        )
        constant = common([v.constant for v in values])
        return Value(labels, rest, join_origins(values), constant)

    def custom(self, eqn, inner, values, path, calls):
        names = self.names.copy()
        outs = self.body(inner["body"], values, (*path, "body"), calls)
        primals = values[eqn.params["num_consts"] :]
        after, self.names = self.names, names
        if "jvp" in inner:
            tangents = [Value(v.labels, tuple(0.0 for _ in v.rest), TANGENT) for v in primals]
            both = self.body(inner["jvp"], [*primals, *tangents], (*path, "jvp"), calls)
            zeros = interpreter.jvp_jaxpr(eqn.params)[1]
            self.tie_all(outs, both[: len(outs)])
            given = [out for out, zero in zip(outs, zeros, strict=True) if not zero]
            self.tie_all(given, both[len(outs) :])
        if "fwd" in inner:
            found = self.body(inner["fwd"], primals, (*path, "fwd"), calls)
            residuals, again = interpreter.split_residuals(eqn.params, found, primals)
            self.tie_all(outs, again)
            cotangents = [Value(v.labels, (None,) * len(v.rest), TANGENT) for v in outs]
            shapes = interpreter.split_residuals(
                eqn.params, inner["fwd"].out_avals, eqn.params["call_jaxpr"].in_avals
            )[0]
            bwd = interpreter.bwd_jaxpr(eqn.params, shapes)
            back = self.body(bwd, [*residuals, *cotangents], (*path, "bwd"), calls)
            self.tie_all(primals, back)
        self.names = after
        return outs

    def tie_all(self, left, right):
        for a, b in zip(left, right, strict=True):
            self.merge([a, b])


def _from(origin) -> Value:
    return Value((), (), origin)


def _macs(eqn: jex.JaxprEqn) -> int:
    x, y = (sizes(v.aval.shape) for v in eqn.invars)
    out = math.prod(sizes(eqn.outvars[0].aval.shape))
    if eqn.primitive.name == "dot_general":
        contracted = math.prod(x[axis] for axis in eqn.params["dimension_numbers"][0][0])
        return out * contracted
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return out * (math.prod(y) // max(y[out_axis], 1))


def _kernel_operand(eqn: jex.JaxprEqn, values: list[Value]) -> int | None:
    """The operand that comes from parameters alone, if the other depends on an input."""
    places = (1,) if eqn.primitive.name == "conv_general_dilated" else (1, 0)
    for i in places:
        owned = isinstance(values[i].origin, frozenset) and values[i].origin
        if owned and values[1 - i].origin == INPUT:
            return i
    return None


def _site(eqn, values, operand, macs, calls, counts) -> Site:
    conv = eqn.primitive.name == "conv_general_dilated"
    numbers = eqn.params["dimension_numbers"]
    kernel = values[operand].shape
    if conv:
        out_axes, in_axes = (numbers.rhs_spec[0],), tuple(sorted(numbers.rhs_spec[1:]))
        feature = numbers.lhs_spec[1]
    else:
        (contracted, batch) = numbers
        in_axes = tuple(contracted[operand])
        feature = contracted[1 - operand][-1] if contracted[1 - operand] else -1
        used = {*in_axes, *batch[operand]}
        out_axes = tuple(axis for axis in range(len(kernel)) if axis not in used)
    return Site(
        name="",
        path=max(sorted(values[operand].origin), key=counts.__getitem__),
        kind="conv" if conv else "dot",
        macs=macs,
        input_shape=values[1 - operand].shape,
        kernel_shape=kernel,
        output_shape=sizes(eqn.outvars[0].aval.shape),
        feature_axis=feature,
        kernel_in_axes=in_axes,
        kernel_out_axes=out_axes,
        kernel_operand=operand,
        groups=eqn.params["feature_group_count"] if conv else 1,
        calls=calls,
    )

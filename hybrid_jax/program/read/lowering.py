"""Lowering: from any function of a network to its inference graph.

The function is traced with all inner calls inlined. What comes from parameters alone is computed
once; every other equation becomes an operation, or part of one: BatchNorm and other per-channel
affine chains go into the weights before them, activations into the bounds of a result, padding into
the convolution behind it. What no operation computes stays as a call of its equation, in floats.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from hybrid_jax import core
from hybrid_jax.core.functions import FUNCTIONS, SAME
from hybrid_jax.program.encoding import Tensor
from hybrid_jax.program.graph import Program
from hybrid_jax.program.read import contraction, merged, moves, patterns, reduce
from hybrid_jax.program.read.call import call
from hybrid_jax.program.read.check import verify
from hybrid_jax.program.read.elementwise import elementwise
from hybrid_jax.program.read.flat import EXAMPLES, Known, known_values, literal, sources, traced
from hybrid_jax.program.read.node import Builder, Node, Pending, Value

_SAME = (*SAME, "optimization_barrier")
_RULES = {
    "reshape": moves.reshape,
    "squeeze": moves.reshape,
    "broadcast_in_dim": moves.broadcast,
    "transpose": moves.transpose,
    "concatenate": moves.concatenate,
    "stack": moves.stack,
    "slice": moves.slices,
    "split": moves.split,
    "pad": moves.pad,
    "gather": moves.indexed,
    "rev": moves.indexed,
    "dynamic_slice": moves.indexed,
    "tile": moves.indexed,
    "reduce_sum": reduce.reduced,
    "reduce_max": reduce.reduced,
    "reduce_min": reduce.reduced,
    "reduce_window_max": reduce.pooled,
    "reduce_window_sum": reduce.pooled,
    "conv_general_dilated": contraction.convolution,
    "dot_general": contraction.product,
}
"""{primitive: rule(builder, equation, values) -> nodes}, of all but `FUNCTIONS` and `_SAME`."""


class Reading:
    """A function on its way to a program."""

    def __init__(self, graph: core.Graph, leaves: list[Any], count: int):
        self.graph, self.builder = graph, Builder()
        self.env: dict[Any, Node] = {}  # by variable
        jaxpr = graph.jaxpr.jaxpr
        self.known = known_values(graph, leaves)
        self.eqns = self._chosen(jaxpr.eqns)
        self.facts = patterns.Facts(
            sources(self.eqns), self._number, lambda atom: isinstance(self.read(atom), Known)
        )
        self.readers = collections.Counter(
            atom
            for eqn in self.eqns.values()
            for atom in eqn.invars
            if not isinstance(atom, jex.Literal) and atom not in self.known
        )
        ends = [a for a in jaxpr.outvars if not isinstance(a, jex.Literal)]
        self.readers.update(self.alias.get(atom, atom) for atom in ends)
        names = ["x"] if count == 1 else [f"x{i}" for i in range(count)]
        for name, var in zip(names, jaxpr.invars[len(jaxpr.invars) - count :], strict=True):
            sizes = tuple(var.aval.shape)
            dtype = np.dtype(var.aval.dtype)
            self.builder.tensors[name] = Tensor(sizes[1:], dtype=str(dtype))
            self.builder.inputs.append(name)
            value = Value(name, sizes[1:])
            self.env[var] = Node(value, tuple(range(len(sizes))), sizes, dtype)

    def read(self, atom: Any) -> Node | Known | None:
        """What is known of an operand; None of what neither depends on an input nor is computed."""
        if isinstance(atom, jex.Literal):
            return literal(atom)
        return self.env.get(atom) or self.known.get(atom)

    def result(self, atom: Any) -> Node | None:
        """What the function returns there; None of a constant."""
        return None if isinstance(atom, jex.Literal) else self.env.get(self.alias.get(atom, atom))

    def step(self, index: int, eqn: jex.JaxprEqn) -> None:
        """Reads one equation."""
        values = [self.read(atom) for atom in eqn.invars]
        if not any(isinstance(value, Node) for value in values):
            return
        site = self.graph.site_at.get((index,))
        try:
            self.builder.site = site and site.name
            outs = self._pattern(eqn) or self._plain(eqn, values)
            for var, out in zip(eqn.outvars, outs, strict=True):
                if out.traced != tuple(var.aval.shape):
                    raise ValueError(f"it was read as {out.traced} where it is {var.aval.shape}")
        except ValueError as error:
            outs = call(self.builder, index, eqn, values, str(error))
        for var, out in zip(eqn.outvars, outs, strict=True):
            # What several equations read is an edge: built upon, it would be computed twice.
            if self.readers[var] > 1 and isinstance(out.value.source, Pending):
                out = self.builder.as_edge(out)
            self.env[var] = out

    def _plain(self, eqn, values):
        name, builder = eqn.primitive.name, self.builder
        as_one = any(isinstance(value, Node) and value.merged > 1 for value in values)
        if as_one and name not in ("reshape", *_SAME):
            eqn, values, count = merged.apart(eqn, values)
            return [out.replace(merged=count) for out in self._plain(eqn, values)]
        if name in _SAME:
            if not all(isinstance(value, Node) for value in values):
                raise ValueError("a constant and a value cannot pass one equation")
            return values
        if name in FUNCTIONS:
            return reduce.uncounted(builder, eqn, values) or elementwise(builder, eqn, values)
        if name in _RULES:
            return _RULES[name](builder, eqn, values)
        raise ValueError(f"'{name}' is no operation of an inference graph")

    def _pattern(self, eqn):
        found = patterns.softmax(eqn, self.facts) or patterns.normalization(eqn, self.facts)
        if found is None or found.x not in self.env:
            return None
        node, shape = self.env[found.x], eqn.outvars[0].aval.shape
        axes = tuple(axis + node.merged - 1 for axis in found.axes)
        mixes = 0 not in node.axes or any(node.axes[axis] == 0 for axis in axes)
        if mixes or 0 in found.axes or not np.issubdtype(node.dtype, np.floating):
            return None
        made = patterns.applied(self.builder, node, axes, found.epsilon)
        if found.epsilon is None:
            return [made]
        if shape != node.traced:
            made = merged.reshaped(self.builder, made, shape)
        if found.factor is None:
            return [made]
        return self._plain(eqn, [made, self.read(found.factor)])

    def _number(self, atom):
        known = self.read(atom)
        return known.number if isinstance(known, Known) else None

    def _chosen(self, eqns):
        """{index: equation}, without choices between values by what is known."""
        alias: dict[Any, Any] = {}
        left = {}
        for index, eqn in enumerate(eqns):
            changed = [alias.get(a, a) if not isinstance(a, jex.Literal) else a for a in eqn.invars]
            eqn = eqn.replace(invars=changed)
            which = self._number(eqn.invars[0]) if eqn.primitive.name == "select_n" else None
            if which is not None:
                case = eqn.invars[1 + int(which)]
                if not isinstance(case, jex.Literal) and case.aval == eqn.outvars[0].aval:
                    alias[eqn.outvars[0]] = case
                    continue
            left[index] = eqn
        self.alias = alias
        return left


def read(graph: core.Graph, leaves: list[Any], count: int) -> tuple[Program, Reading]:
    """The program of a graph of `flat.traced`, with leaves of parameters and `count` inputs."""
    reading = Reading(graph, leaves, count)
    for index, eqn in reading.eqns.items():
        reading.step(index, eqn)
    builder, outputs = reading.builder, []
    for i, atom in enumerate(graph.jaxpr.jaxpr.outvars):
        node = reading.result(atom)
        if node is None:
            raise ValueError("fn must return what depends on its inputs, got a constant")
        try:
            if node.merged > 1:
                raise ValueError("examples and places are one axis")
            name = builder.placed(node, range(len(node.sizes)))
        except ValueError as error:
            raise ValueError(
                f"fn must return (B, …), got output {i} of {node.sizes}: {error}"
            ) from None
        if name in outputs or name in builder.inputs:
            # What is returned twice, or as it came, is an edge of its own.
            name = builder.copied(name)
        tensor = builder.tensors[name]
        builder.tensors[name] = Tensor(tensor.shape, dtype=str(node.dtype))
        outputs.append(name)
    return _live(tuple(outputs), reading), reading


def _live(outputs, reading):
    """The program without what its outputs do not need."""
    builder, inputs = reading.builder, tuple(reading.builder.inputs)
    wanted, kept = set(outputs), []
    for op in reversed(builder.operations):
        if op.output in wanted:
            kept.append(op)
            wanted |= set(op.inputs)
    tensors = {n: t for n, t in builder.tensors.items() if n in wanted or n in inputs}
    return Program(
        inputs,
        outputs,
        tensors,
        tuple(reversed(kept)),
        {name: source for name, source in builder.sources.items() if name in tensors},
    )


def lower(fn: Callable[..., Any], params: Any, *inputs: Any, check: bool = True) -> Program:
    """Makes the inference graph of a function, in floats.

    Args:
      fn: fn(params, *inputs) -> outputs, in evaluation mode; inputs and outputs are (B, …). Whoever
        wrote it: Linen, NNX, Haiku, Equinox, bare JAX. Images may be NHWC or NCHW.
      params: Its parameters, arrays.
      *inputs: Arrays or `jax.ShapeDtypeStruct`s of (B, …).
      check: Whether the program is compared with the function, edge by edge for three examples and
        as a whole for one: of the inputs, or of noise where only their shapes are given.

    Raises:
      ValueError: If examples meet each other, an output is not (B, …), or an edge differs from what
        the function has there by more than 10⁻⁴ of its largest value.

    Example:
      >>> import jax.numpy as jnp
      >>> def fn(params, x):
      ...     return jax.nn.relu((x @ params['a']) * params['scale'] + 1.0) @ params['b']
      >>> params = {'a': jnp.ones((3, 4)), 'scale': jnp.ones((1, 4)), 'b': jnp.ones((4, 2))}
      >>> program = lower(fn, params, jnp.ones((1, 3)))
      >>> for op in program.operations:
      ...     print(type(op).__name__, op.inputs, op.output, op.clip)
      Dense ('x',) a (0.0, inf)
      Dense ('a',) b (-inf, inf)
    """
    core.check_known("lower", params=params, inputs=inputs)
    for i, x in enumerate(inputs):
        if not hasattr(x, "dtype") or not np.shape(x):
            raise ValueError(f"inputs must be arrays (B, …), got {x!r} as input {i}")
    if not jax.tree.leaves(params):
        return lower(lambda _, *x: fn(params, *x), np.float32(0), *inputs, check=check)
    try:
        graph = traced(fn, params, inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"fn must take any number of examples, got an error with {EXAMPLES}: {error}"
        ) from error
    program, reading = read(graph, jax.tree.leaves(params), len(inputs))
    if check:
        verify(program, reading, fn, params, inputs)
    return program

"""What an inference graph costs as it is stored: MACs, BOPs, bytes of files, and memory."""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.cost.formula import Formula, Polynomial, amount, formula, sizes
from hybrid_jax.program import memory


class File(NamedTuple):
    """How a file holds a program.

    It holds a kernel of b bits in the fewest of `kernel_bits` from b on; `layer` are bytes for each
    convolution and dense layer beside kernel, scales and bias, `channel` for each of its outputs,
    `overhead` beside all of that. `scratch(op, shape of its output)` gives what such a layer of
    encoded values takes of memory to run: (how many of the first axes of its kernel, bytes for each
    entry along these, bytes beside); None where the file is not run from where it lies.
    """

    kernel_bits: Collection[int] = range(1, 9)
    layer: int = 0
    channel: int = 0
    overhead: int = 0
    scratch: Callable[[Any, tuple[int, ...]], tuple[int, int, int]] | None = None


class Block(NamedTuple):
    """Bytes of memory, in widths, and when they are needed."""

    size: Polynomial
    buffer: memory.Buffer


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """What a program costs.

    `formula` is in bits of the operations, which are named by their outputs, and in widths of
    `groups` of the program's own trace; 'bytes' are those of the largest of the files, 'memory' the
    most that is live at a time, which no placement can be below. `blocks` say what is in memory
    when.
    """

    formula: Formula
    groups: tuple[core.Group, ...]
    blocks: Mapping[Hashable, Block]

    def memory(self, widths: Mapping[str, int] | None = None) -> int:
        """Bytes of the block in which all finds its place, as `program.memory.plan` places it."""
        chosen = self.formula.widths | dict(widths or {})
        buffers = {
            key: block.buffer._replace(size=_at(block.size, chosen))
            for key, block in self.blocks.items()
        }
        return memory.size(buffers, memory.place(buffers))


def of_program(
    program: p.Program,
    encodings: Mapping[str, p.Encoding | None] | None = None,
    files: Sequence[File] = (File(),),
) -> Stored:
    """Finds what a program costs as a function of bits, and of the widths of its channels.

    `program` is in floats. Of what `encodings` {edge: as it will be stored} hold an entry takes a
    byte, whatever its scale; what is left out is stored in floats. `files` are those made of it.

    Example:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> params = {'a': jnp.ones((4, 10)), 'b': jnp.ones((10, 2))}
      >>> net = p.lower(fn, params, jnp.ones((1, 4)))
      >>> made = of_program(net, {'a': p.Encoding(1.0)})
      >>> made.formula.count()  # 60 weights and 12 biases of 4 bytes
      {'macs': 60, 'bops': 61440, 'bytes': 288, 'memory': 10}
      >>> made.formula.count({'a/kernel': 5}, {'a': 8, 'b': 4})['bytes']  # 20 + 5, 7 · (4 + 4)
      81
    """
    graph, edges = _traced(program)
    groups = _whole(graph, edges)
    counted = formula(graph, groups=groups)
    groups = tuple(group for group in groups if group.name in counted.widths)
    measure = sizes(graph, groups)
    arrays = dict(zip(graph.parameters, graph.arguments, strict=False))
    blocks = _blocks(program, encodings or {}, files, edges, arrays, measure)
    outputs = [measure(arrays[f"{op.output}/bias"].labels) for op in program.weighted]
    [leaves] = counted.costs["bytes"]
    costs = {
        **counted.costs,
        "bytes": tuple(_held(leaves, file, outputs) for file in files),
        "memory": _live(blocks),
    }
    return Stored(dataclasses.replace(counted, costs=costs), groups, blocks)


def _traced(program):
    """The graph of a program, and {edge: the labels of its axes}."""

    def fn(params, *inputs):
        values = p.edges(program.replace(params), inputs)
        return [values[name] for name in program.outputs], values

    tensors = (program.tensors[name] for name in program.inputs)
    inputs = [jax.ShapeDtypeStruct((1, *tensor.shape), tensor.dtype) for tensor in tensors]
    graph = core.trace(fn, program.params, *inputs)
    ends = len(program.outputs)
    # A pytree has its keys in order.
    edges = dict(zip(sorted(program.tensors), graph.outputs[ends:], strict=True))
    names = {f"{op.output}/kernel": op.output for op in program.weighted}

    def named(site):
        return dataclasses.replace(site, name=names.get(site.path, site.name))

    graph = dataclasses.replace(
        graph,
        # What lies between is returned to be seen: it may lose channels all the same.
        outputs=graph.outputs[:ends],
        sites=tuple(map(named, graph.sites)),
        site_at={where: named(site) for where, site in graph.site_at.items()},
    )
    return graph, {name: value.labels for name, value in edges.items()}


def _whole(graph, edges):
    """The groups of which every array holds each channel equally often."""
    arrays = [*edges.values(), *(value.labels for value in graph.arguments)]

    def whole(group):
        measure = sizes(graph, [group])
        try:
            return all(measure(labels) for labels in arrays)
        except ValueError:
            return False

    return tuple(filter(whole, graph.groups))


def _blocks(program, encodings, files, edges, arrays, measure):
    """{edge, or (output of an operation,) for its scratch: block}."""
    tensors = {
        name: dataclasses.replace(tensor, encoding=encodings.get(name))
        for name, tensor in program.tensors.items()
    }
    scratch = {}
    for op in program.weighted if any(file.scratch for file in files) else ():
        needs = [file.scratch(op, tensors[op.output].shape) for file in files if file.scratch]
        axes, each, beside = max(needs, key=lambda need: need[1:])
        size = collections.Counter({(): beside})
        labels = arrays[f"{op.output}/kernel"].labels
        size.update({groups: n * each for groups, n in measure(labels[:axes]).items()})
        if encodings.get(op.inputs[0]) and any(size.values()):
            scratch[op.output] = size
    live = memory.lifetimes(
        dataclasses.replace(program, tensors=tensors), dict.fromkeys(scratch, 0)
    )
    made = {}
    for key, buffer in live.buffers.items():
        if isinstance(key, tuple):
            made[key] = Block(scratch[key[0]], buffer)
        else:
            size = {groups: n * buffer.align for groups, n in measure(edges[key]).items()}
            made[key] = Block(size, buffer)
    return made


def _live(blocks):
    """The rows of what is live at each time, but for those that are nowhere more than another."""
    moments = []
    for step in range(1 + max((block.buffer.last for block in blocks.values()), default=0)):
        now = collections.Counter()
        for size, buffer in blocks.values():
            if buffer.first <= step <= buffer.last:
                now.update(size)
        moments.append(now)
    moments = list({frozenset(now.items()): now for now in moments}.values())
    most = [now for now in moments if not any(now < other for other in moments)]
    return tuple((amount(now),) for now in most)


def _held(leaves, file, outputs):
    """Bytes of the leaves as a file holds them."""

    def held(bits):
        return min((b for b in file.kernel_bits if b >= bits), default=bits)

    def term(own):
        kinds = [kind for kind, _ in own.of]

        def value(*chosen):
            pairs = zip(kinds, chosen, strict=True)
            return own.value(*(held(n) if kind == "weight" else n for kind, n in pairs))

        return own._replace(value=value)

    amounts = (leaf._replace(terms=tuple(map(term, leaf.terms))) for leaf in leaves)
    beside = collections.Counter({(): file.layer * len(outputs) + file.overhead})
    for own in outputs:
        beside.update({groups: n * file.channel for groups, n in own.items()})
    return (*amounts, amount(beside))


def _at(size: Polynomial, widths) -> int:
    return sum(n * math.prod(widths[group] for group in groups) for groups, n in size.items())

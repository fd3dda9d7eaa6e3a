"""Where each tensor of a program lies in one block of memory, planned before it runs.

`cost.peak_activation_bytes` counts what is live at any time in a traced model; here the tensors of
an integer program get their places, by the greedy placement by size of Pisarchyk and Lee (Efficient
Memory Management for Deep Neural Net Inference, arXiv 2001.03288): the largest first, each into the
tightest gap between those that live at the same time.
"""

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

from hybrid_jax.deploy.program import (
    Add,
    Clip,
    Convert,
    Lookup,
    Multiply,
    Operation,
    Program,
    Reshape,
)

_Key = TypeVar("_Key")
_ELEMENTWISE = (Add, Clip, Convert, Lookup, Multiply)


class Buffer(NamedTuple):
    """Bytes that are needed from one step to another, both included."""

    size: int
    first: int
    last: int


class Plan(NamedTuple):
    """Places in a block of `size` bytes.

    Attributes:
      offsets: {name of an encoded tensor: its first byte}. Floats have no place in the block.
      scratch: {name of an operation's output: the first byte of what it needs for itself}.
      size: Bytes of the block.
    """

    offsets: dict[str, int]
    scratch: dict[str, int]
    size: int


def plan(program: Program, scratch: Mapping[str, int] | None = None) -> Plan:
    """Places the encoded tensors of a program, one byte for each entry of one example.

    A tensor lives from the operation that makes it to the last that reads it. A reshape lies where
    its input lies; an element-wise result takes the place of an operand of its size that is not
    read again.

    Args:
      program: In integers; floats are passed over.
      scratch: {name of an operation's output: bytes that it needs for itself while it runs}.

    Example:
      >>> from hybrid_jax.deploy.program import Encoding, Tensor
      >>> e = Encoding(1.0)
      >>> tensors = {'x': Tensor((6,)), 'q': Tensor((6,), e), 'h': Tensor((6,), Encoding(2.0))}
      >>> tensors |= {'t': Tensor((1, 2, 3), Encoding(2.0)), 'm': Tensor((3,), e)}
      >>> from hybrid_jax.deploy.program import Mean
      >>> steps = (Convert(('x',), 'q'), Convert(('q',), 'h'), Reshape(('h',), 't'))
      >>> plan(Program('x', 'm', tensors, (*steps, Mean(('t',), 'm'))))
      Plan(offsets={'q': 0, 'h': 0, 't': 0, 'm': 6}, scratch={}, size=9)
    """
    last = {name: i for i, op in enumerate(program.operations) for name in op.inputs}
    homes: dict[str, str] = {}
    buffers: dict[Hashable, Buffer] = {}
    for i, op in enumerate(program.operations):
        if program.encoding(op.output) is None:
            continue
        until = last.get(op.output, i)
        shared = [homes[name] for name in _in_place(program, op)]
        home = next((h for h in shared if buffers[h].last == i or is_view(program, op)), None)
        if home is None:
            home = op.output
            buffers[home] = Buffer(math.prod(program.tensors[home].shape), i, i)
        homes[op.output] = home
        buffers[home] = buffers[home]._replace(last=max(buffers[home].last, until))
    # An operation's own memory goes by a name that no tensor has.
    for i, op in enumerate(program.operations):
        if op.output in (scratch or {}):
            buffers[(op.output,)] = Buffer(scratch[op.output], i, i)
    placed = place(buffers)
    return Plan(
        {name: placed[home] for name, home in homes.items()},
        {name: placed[(name,)] for name in scratch or {}},
        max((placed[key] + buffer.size for key, buffer in buffers.items()), default=0),
    )


def place(buffers: Mapping[_Key, Buffer]) -> dict[_Key, int]:
    """The first byte of each buffer, so that no two that live at one time overlap.

    Example:
      >>> place({'a': Buffer(4, 0, 1), 'b': Buffer(8, 1, 2), 'c': Buffer(2, 2, 3)})
      {'b': 0, 'a': 8, 'c': 8}
    """
    placed: dict[_Key, int] = {}
    for name in sorted(buffers, key=lambda name: -buffers[name].size):
        size, first, last = buffers[name]
        beside = sorted(
            (placed[other], placed[other] + buffers[other].size)
            for other in placed
            if buffers[other].first <= last and first <= buffers[other].last
        )
        gaps, end = [], 0
        for start, stop in beside:
            if start - end >= size:
                gaps.append((start - end, end))
            end = max(end, stop)
        placed[name] = min(gaps)[1] if gaps else end
    return placed


def is_view(program: Program, op: Operation) -> bool:
    """Whether an operation leaves the stored bytes as they are.

    Example:
      >>> from hybrid_jax.deploy.program import Encoding, Tensor
      >>> tensors = {'a': Tensor((4,), Encoding(1.0)), 'b': Tensor((2, 2), Encoding(1.0))}
      >>> is_view(Program('a', 'b', tensors, ()), Reshape(('a',), 'b'))
      True
    """
    if isinstance(op, Convert):
        return program.encoding(op.inputs[0]) == program.encoding(op.output)
    return isinstance(op, Reshape)


def _in_place(program, op):
    """The encoded inputs whose bytes the output may take."""
    shape = program.tensors[op.output].shape
    return [
        name
        for name in op.inputs
        if program.encoding(name) is not None
        and (
            is_view(program, op)
            or (isinstance(op, _ELEMENTWISE) and program.tensors[name].shape == shape)
        )
    ]

"""Where each tensor of a program lies in one block of memory, planned before it runs.

The greedy placement by size of Pisarchyk and Lee (Efficient Memory Management for Deep Neural Net
Inference, arXiv 2001.03288): the largest first, each into the tightest gap between those that live
at the same time. No placement takes less than what is live at any time, from which budgets are
planned (`cost.of_program`).
"""

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

from hybrid_jax.program.graph import Program
from hybrid_jax.program.operations import Constant, Convert, Operation, Reshape

_Key = TypeVar("_Key")
_FLOAT = 4  # bytes


class Buffer(NamedTuple):
    """`size` bytes, from step `first` to `last`, both included, at a multiple of `align`."""

    size: int
    first: int
    last: int
    align: int = 1


class Lifetimes(NamedTuple):
    """What is live when."""

    # Bytes of the block by the name of the edge that is first in them; (name of an operation's
    # output,) for what the operation needs for itself
    buffers: dict[Hashable, Buffer]
    homes: dict[str, str]  # {edge: the first edge of the bytes in which it lies}
    ends: dict[str, str]  # {that edge: the input, output or constant in whose own memory it lies}


class Plan(NamedTuple):
    """Places in a block of `size` bytes."""

    offsets: dict[str, int]  # {edge: its first byte} of those in the block
    # {edge: the input, output or constant in whose own memory it lies} of the others
    ends: dict[str, str]
    # {name of an operation's output: the first byte of what it needs for itself}
    scratch: dict[str, int]
    size: int  # bytes of the block


def plan(program: Program, scratch: Mapping[str, int] | None = None) -> Plan:
    """Places the edges of a program, a byte or a float32 for each entry of one example.

    Inputs and constants lie where they are, and are not written to; a float32 output is made in the
    memory of whoever calls. An edge lives from the operation that makes it to the last that reads
    it, an output to the end. A reshape lies where its input lies; an element-wise result takes the
    place of an operand of its size that is not read again. Floats lie on multiples of four bytes.
    `scratch` are {name of an operation's output: bytes that it needs for itself while it runs},
    which lie on multiples of four bytes, too.
    """
    buffers, homes, ends = lifetimes(program, scratch)
    placed = place(buffers)
    return Plan(
        {name: placed[home] for name, home in homes.items() if home in placed},
        {name: ends[home] for name, home in homes.items() if home in ends},
        {name: placed[(name,)] for name in scratch or {}},
        size(buffers, placed),
    )


def lifetimes(program: Program, scratch: Mapping[str, int] | None = None) -> Lifetimes:
    """Which bytes are needed from when to when; arguments are as of `plan`."""
    steps = program.operations
    last = {name: i for i, op in enumerate(steps) for name in op.inputs}
    last |= dict.fromkeys(program.outputs, len(steps))
    homes = {name: name for name in program.inputs}
    homes |= {op.output: op.output for op in steps if isinstance(op, Constant)}
    ends = dict(homes)
    buffers: dict[Hashable, Buffer] = {}
    for i, op in enumerate(steps):
        name = op.output
        if name in homes:
            continue
        shared = [homes[own] for own in _in_place(program, op)]
        taken = (own for own in shared if own in buffers and buffers[own].last == i)
        home = shared[0] if is_view(program, op) else next(taken, name)
        if home == name:
            width = _width(program, name)
            count = math.prod(program.tensors[name].shape)
            buffers[name] = Buffer(width * count, i, i, width)
        homes[name] = home
        if home in buffers:
            until = max(buffers[home].last, last.get(name, i))
            buffers[home] = buffers[home]._replace(last=until)
    for name in program.outputs:
        tensor = program.tensors[name]
        if tensor.encoding is None and tensor.dtype == "float32" and homes[name] in buffers:
            del buffers[homes[name]]
            ends[homes[name]] = name
    # An operation's own memory goes by a name that no tensor has.
    for i, op in enumerate(steps):
        if op.output in (scratch or {}):
            buffers[(op.output,)] = Buffer(scratch[op.output], i, i, _FLOAT)
    return Lifetimes(buffers, homes, ends)


def size(buffers: Mapping[_Key, Buffer], placed: Mapping[_Key, int]) -> int:
    """Bytes of the block that holds the buffers at their places: a multiple of their alignment."""
    ends = (placed[key] + buffer.size for key, buffer in buffers.items())
    align = max((buffer.align for buffer in buffers.values()), default=1)
    return -(-max(ends, default=0) // align) * align


def place(buffers: Mapping[_Key, Buffer]) -> dict[_Key, int]:
    """The first byte of each buffer, so that no two that live at one time overlap."""
    placed: dict[_Key, int] = {}
    for name in sorted(buffers, key=lambda name: -buffers[name].size):
        size, first, last, align = buffers[name]
        beside = sorted(
            (placed[other], placed[other] + buffers[other].size)
            for other in placed
            if buffers[other].first <= last and first <= buffers[other].last
        )
        gaps, end = [], 0
        for start, stop in beside:
            if start - end >= size:
                gaps.append((start - end, end))
            end = max(end, -(-stop // align) * align)
        placed[name] = min(gaps)[1] if gaps else end
    return placed


def is_view(program: Program, op: Operation) -> bool:
    """Whether an operation leaves the stored bytes as they are."""
    if isinstance(op, Convert):
        return program.encoding(op.inputs[0]) == program.encoding(op.output)
    return isinstance(op, Reshape)


def _in_place(program, op):
    name = op.output
    return [
        own
        for own in op.inputs
        if is_view(program, op)
        or (
            op.in_place
            and program.tensors[own].shape == program.tensors[name].shape
            and _width(program, own) == _width(program, name)
        )
    ]


def _width(program, name):
    return _FLOAT if program.encoding(name) is None else 1

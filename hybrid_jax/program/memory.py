"""Where each tensor of a program lies in one block of memory, planned before it runs.

The greedy placement by size of Pisarchyk and Lee (Efficient Memory Management for Deep Neural Net
Inference, arXiv 2001.03288): the largest first, each into the tightest gap between those that live
at the same time. No placement takes less than what is live at any time, from which budgets are
planned (`cost.of_program`).
"""

import collections
import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

from hybrid_jax.program.graph import Program
from hybrid_jax.program.operations import (
    Concatenate,
    Constant,
    Convert,
    Operation,
    Reshape,
    Slice,
)

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

    # Bytes of the block by the name of the edge that has all of them; (name of an operation's
    # output,) for what the operation needs for itself
    buffers: dict[Hashable, Buffer]
    homes: dict[str, str]  # {edge: the edge that has all of the bytes in which it lies}
    within: dict[str, int]  # {edge: its first byte, from the first of these on}
    ends: dict[str, str]  # {such an edge: the input, output or constant in whose memory it lies}


class Plan(NamedTuple):
    """Places in a block of `size` bytes."""

    offsets: dict[str, int]  # {edge: its first byte in the block, or in what `ends` says}
    # {edge: the input, output or constant in whose own memory it lies} of those not in the block
    ends: dict[str, str]
    # {name of an operation's output: the first byte of what it needs for itself}
    scratch: dict[str, int]
    size: int  # bytes of the block


def plan(program: Program, scratch: Mapping[str, int] | None = None) -> Plan:
    """Places the edges of a program, a byte or a float32 for each entry of one example.

    Inputs and constants lie where they are, and are not written to; a float32 output is made in the
    memory of whoever calls. An edge lives from the operation that makes it to the last that reads
    it, an output to the end. A reshape lies where its input lies, and so do rows of it; an
    element-wise result takes the place of an operand of its size that is not read again; rows that
    are put together are made in their places, but for views and those that are read again. Floats
    lie on multiples of four bytes. `scratch` are {name of an operation's output: bytes that it
    needs for itself while it runs}, which lie on multiples of four bytes, too.
    """
    live = lifetimes(program, scratch)
    placed = place(live.buffers)
    return Plan(
        {name: placed.get(home, 0) + live.within[name] for name, home in live.homes.items()},
        {name: live.ends[home] for name, home in live.homes.items() if home in live.ends},
        {name: placed[(name,)] for name in scratch or {}},
        size(live.buffers, placed),
    )


def lifetimes(program: Program, scratch: Mapping[str, int] | None = None) -> Lifetimes:
    """Which bytes are needed from when to when; arguments are as of `plan`."""
    steps = program.operations
    last = {name: i for i, op in enumerate(steps) for name in op.inputs}
    last |= dict.fromkeys(program.outputs, len(steps))
    homes = {name: name for name in program.inputs}
    homes |= {op.output: op.output for op in steps if isinstance(op, Constant)}
    ends, within, views = dict(homes), dict.fromkeys(homes, 0), set()
    buffers: dict[Hashable, Buffer] = {}
    lying = collections.defaultdict(list, {name: [name] for name in homes})

    def is_free(name, step):
        """Whether all of the bytes in which an edge lies are its own and not read again."""
        buffer = buffers.get(homes[name])
        return buffer and buffer.last == step and buffer.size == _size(program, name)

    for i, op in enumerate(steps):
        name, at = op.output, 0
        if name in homes:
            continue
        if is_view(program, op):
            (own,) = op.inputs
            views.add(name)
            home, at = homes[own], within[own] + _start(program, op)
        else:
            taken = (homes[own] for own in _in_place(program, op) if is_free(own, i))
            home = next(taken, name)
        if home == name:
            first = i
            for part, start in _put_together(program, op):
                if part not in views and is_free(part, i):
                    own = homes[part]
                    first = min(first, buffers.pop(own).first)
                    for edge in lying.pop(own):
                        homes[edge], within[edge] = name, within[edge] + start
                        lying[name].append(edge)
            buffers[name] = Buffer(_size(program, name), first, i, _width(program, name))
        homes[name], within[name] = home, at
        lying[home].append(name)
        if home in buffers:
            until = max(buffers[home].last, last.get(name, i))
            buffers[home] = buffers[home]._replace(last=until)
    for name in program.outputs:
        tensor, home = program.tensors[name], homes[name]
        whole = home in buffers and buffers[home].size == _size(program, name)
        if tensor.encoding is None and tensor.dtype == "float32" and whole:
            del buffers[home]
            ends[home] = name
    # An operation's own memory goes by a name that no tensor has.
    for i, op in enumerate(steps):
        if op.output in (scratch or {}):
            buffers[(op.output,)] = Buffer(scratch[op.output], i, i, _FLOAT)
    return Lifetimes(buffers, homes, within, ends)


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
    """Whether an operation leaves the stored bytes as they are, all or whole rows of them."""
    if isinstance(op, Convert):
        return program.encoding(op.inputs[0]) == program.encoding(op.output)
    if isinstance(op, Slice):
        _, *others = program.tensors[op.inputs[0]].shape
        whole = list(op.starts[1:]) == [0] * len(others) and list(op.stops[1:]) == others
        return whole and set(op.strides) == {1}
    return isinstance(op, Reshape)


def _start(program, op):
    """The first byte of a view, from that of its input on."""
    return op.starts[0] * _row(program, op.output) if isinstance(op, Slice) else 0


def _put_together(program, op):
    """(part, its first byte) of what rows are put together from as they are stored."""
    start = 0
    for name in op.inputs if isinstance(op, Concatenate) and op.axis == 0 else ():
        if program.encoding(name) == program.encoding(op.output):
            yield name, start
        start += program.tensors[name].shape[0] * _row(program, op.output)


def _row(program, name):
    return math.prod(program.tensors[name].shape[1:]) * _width(program, name)


def _in_place(program, op):
    """The operands of the result's size that it may be written over."""
    return [
        own
        for own in op.inputs
        if op.in_place
        and program.tensors[own].shape == program.tensors[op.output].shape
        and _width(program, own) == _width(program, op.output)
    ]


def _size(program, name):
    return math.prod(program.tensors[name].shape) * _width(program, name)


def _width(program, name):
    return _FLOAT if program.encoding(name) is None else 1

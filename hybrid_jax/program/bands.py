"""Parts of a program computed some rows at a time, so that no tensor inside of one is ever whole.

The memory of an image's first layers falls as in the patches of Lin et al. (MCUNetV2:
Memory-efficient Patch-based Inference for Tiny Deep Learning, arXiv 2110.15352). A band has the
whole width, and the rows of it that the next one needs again are kept: none is computed twice.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hybrid_jax.program import memory
from hybrid_jax.program.graph import Program
from hybrid_jax.program.operations import AveragePool, Concatenate, Conv, MaxPool, Slice

Scratch = Callable[[Program], Mapping[str, int]]

_CALL = 40  # bytes of code and constants that one more call takes
_HIGH = 0.9  # of the most that is live: what saves less than a tenth is not worth it
_LONGEST, _BANDS = 24, 32  # operations of a part, and bands: for the time that it takes to try


class _Windows(NamedTuple):
    """The windows of rows of the inputs that rows of the result are made of."""

    size: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def rows(self, first: int, last: int) -> tuple[int, int]:
        """The first row, and that after the last, on the input or beside it."""
        start, reach = first * self.stride - self.padding, (self.size - 1) * self.dilation
        return start, start + (last - first - 1) * self.stride + reach + 1


def _windows(program, op):
    """Those of an operation; None if rows of its result need others."""
    shape = program.tensors[op.output].shape
    if op.in_place and len(shape) == 3:
        alike = all(program.tensors[name].shape == shape for name in op.inputs)
        return _Windows() if alike else None
    if isinstance(op, Conv):
        size, dilation = op.weights.values.shape[0], op.dilation[0]
    elif isinstance(op, MaxPool | AveragePool):
        size, dilation = op.window[0], 1
    else:
        return None
    # Every window has a row that is on the input.
    fits = max(op.padding[0]) <= (size - 1) * dilation
    return _Windows(size, op.strides[0], op.padding[0][0], dilation) if fits else None


def in_bands(program: Program, scratch: Scratch) -> Program:
    """The same program, parts of it in bands wherever that saves more memory than it takes flash.

    `scratch(program)` are {name of an operation's output: bytes that it needs for itself while it
    runs}. Every entry is computed as before, once.
    """
    while (found := _smaller(program, scratch)) is not None:
        program = found
    return program


def _smaller(program, scratch):
    """With the part in bands with which memory and code take the least; None if none takes less."""
    live = _live(program, scratch)
    least, found = memory.plan(program, scratch(program)).size, None
    high = [i for i, size in enumerate(live) if size > _HIGH * max(live)] or [0]
    steps = program.operations
    banded = [_windows(program, op) is not None for op in steps] + [False]
    if not least or not all(banded[high[0] : high[-1] + 1]):
        return None
    start = max((i + 1 for i in range(high[0]) if not banded[i]), default=0)
    stop = banded.index(False, high[-1])
    for first, last in itertools.product(range(high[0], start - 1, -1), range(high[-1], stop)):
        rest = max([*live[:first], *live[last + 1 :]], default=0)
        part = range(first, last + 1)
        if len(part) > _LONGEST or rest + _CALL * len(part) >= least or not _alone(program, part):
            continue
        height = program.tensors[steps[last].output].shape[0]
        rows = -(-height // _BANDS)
        while rows < height:
            made = banded_part(program, part, rows)
            if max(_live(made, scratch)) >= least:
                break
            size = memory.plan(made, scratch(made)).size
            size += _CALL * (_calls(made) - _calls(program))
            if size < least:
                least, found = size, made
            rows *= 2
    return found


def _calls(program):
    return sum(not memory.is_view(program, op) for op in program.operations)


def _live(program, scratch):
    """Bytes that are live in each step."""
    changes = [0] * (len(program.operations) + 2)
    for size, first, last, _ in memory.lifetimes(program, scratch(program)).buffers.values():
        changes[first] += size
        changes[last + 1] -= size
    return [*itertools.accumulate(changes)][: len(program.operations)]


def _alone(program, part):
    """Whether nothing reads what is made inside of a part but the part itself."""
    *inner, _ = (program.operations[i].output for i in part)
    others = (op for i, op in enumerate(program.operations) if i not in part)
    read = {*program.outputs, *(name for op in others for name in op.inputs)}
    return not read & {*inner}


def banded_part(program: Program, part: range, rows: int) -> Program:
    """The same program, of these operations so many rows of the result at a time.

    They are convolutions, pools and operations of entries, and nothing else reads what they make
    but for the last.
    """
    bands, steps = _Bands(program, part), program.operations
    height = program.tensors[steps[part[-1]].output].shape[0]
    made = [bands.next(min(end, height)) for end in range(rows, height + rows, rows)]
    bands.operations.append(Concatenate(tuple(made), steps[part[-1]].output, 0))
    operations = (*steps[: part.start], *bands.operations, *steps[part.stop :])
    return dataclasses.replace(program, tensors=bands.tensors, operations=operations)


class _Held(NamedTuple):
    """The tensor that has rows of one, from `first` to before `end`."""

    name: str
    first: int
    end: int


class _Bands:
    """A part of a program on its way into bands."""

    def __init__(self, program, part):
        self.steps = [program.operations[i] for i in part]
        self.tensors, self.operations = dict(program.tensors), []
        self.windows = {op.output: _windows(program, op) for op in self.steps}
        self.done = dict.fromkeys(self.windows, 0)  # rows that are computed of each
        self.all = self._goals(self._height(self.steps[-1].output))
        self.readers = {name: [op for op in self.steps if name in op.inputs] for name in self.done}
        self.held = {name: _Held("", 0, 0) for name in self.windows}

    def next(self, end):
        """The rows of the result up to that one, as a tensor."""
        goals = self._goals(end)
        for op in self.steps:
            name, first = op.output, self.done[op.output]
            if first < goals[name]:
                made = self._compute(op, first, goals[name])
                self.done[name] = goals[name]
                if self.readers[name]:
                    self.held[name] = self._joined(name, made)
            for own in dict.fromkeys(op.inputs):
                if own in self.readers and self.readers[own][-1] is op:
                    self._keep(own)
        return made

    def _goals(self, end):
        """The rows of each that are to be computed when so many are of the result."""
        goals = self.done | {self.steps[-1].output: end}
        for op in reversed(self.steps):
            if goals[op.output] > self.done[op.output]:
                _, needed = self.windows[op.output].rows(0, goals[op.output])
                for name in {*op.inputs} & goals.keys():
                    goals[name] = max(goals[name], min(needed, self._height(name)))
        return goals

    def _compute(self, op, first, end):
        start, stop = self.windows[op.output].rows(first, end)
        height = self._height(op.inputs[0])
        inputs = tuple(self._rows(name, max(start, 0), min(stop, height)) for name in op.inputs)
        fields = {"inputs": inputs, "output": self._name(op.output, first, end, op.output)}
        if not op.in_place:
            fields["padding"] = ((max(-start, 0), max(stop - height, 0)), op.padding[1])
        self.operations.append(dataclasses.replace(op, **fields))
        return fields["output"]

    def _joined(self, name, made):
        """What is held of a tensor, with its new rows."""
        held, end = self.held[name], self.done[name]
        if held.first == held.end:
            return _Held(made, end - self._height(made), end)
        # A view is copied: what is kept must not lie in the larger memory of the next band.
        kept = self._view(held.name, 0, held.end - held.first)
        joined = self._name(name, held.first, end, name)
        self.operations.append(Concatenate((kept, made), joined, 0))
        return _Held(joined, held.first, end)

    def _keep(self, name):
        """Keeps the rows of a tensor that are still to be read, and no others."""
        held, later = self.held[name], [self._height(name)]
        for op in self.readers[name]:
            if (done := self.done[op.output]) < self.all[op.output]:
                later.append(max(self.windows[op.output].rows(done, done + 1)[0], 0))
        first = min(*later, held.end) if len(later) > 1 else held.end
        if first in (held.first, held.end):
            self.held[name] = held._replace(first=first)
            return
        view = self._view(held.name, first - held.first, held.end - held.first)
        kept = self._name(name, first, held.end, name)
        self.operations.append(Concatenate((view,), kept, 0))
        self.held[name] = _Held(kept, first, held.end)

    def _rows(self, name, first, end):
        if name not in self.held:
            return self._view(name, first, end)
        held = self.held[name]
        return self._view(held.name, first - held.first, end - held.first)

    def _view(self, name, first, end):
        made = self._name(name, first, end, name)
        whole = self.tensors[name].shape
        starts, stops = (first, *[0] * (len(whole) - 1)), (end, *whole[1:])
        self.operations.append(Slice((name,), made, starts, stops, (1,) * len(whole)))
        return made

    def _name(self, name, first, end, like):
        """That of a new tensor of some rows."""
        made = f"{name} {first}:{end}"
        while made in self.tensors:
            made += "'"
        own = self.tensors[like]
        shape = (end - first, *own.shape[1:])
        self.tensors[made] = dataclasses.replace(own, shape=shape, dtype="float32")
        return made

    def _height(self, name):
        return self.tensors[name].shape[0]

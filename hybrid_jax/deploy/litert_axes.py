"""Operations on more axes than LiteRT's kernels have: axes that one treats as one become one."""

import dataclasses
import math

import jax
import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy.litert_marks import mark


def fold(
    op: p.Operation, values: list[jax.Array], encodings: list[p.Encoding | None]
) -> tuple[bool, p.Operation, list[jax.Array]]:
    """(whether it was done, the operation, its inputs) with axes as one that it treats as one."""
    rank = values[0].ndim - 1 if values else 0
    most = 3 if isinstance(op, p.Function) else 4  # what compares has no more
    taken = _taken(op, [x.shape[1:] for x in values], rank) if rank > most else None
    if taken is None:
        return False, op, values
    runs, places = [], []
    for axis in range(rank):
        if axis in taken or not runs or runs[-1][-1] in taken:
            runs.append([])
        runs[-1].append(axis)
        places.append(len(runs) - 1)
    changes = {}
    if hasattr(op, "axes"):
        changes["axes"] = tuple(places[axis] for axis in op.axes)
    if hasattr(op, "axis"):
        changes["axis"] = places[op.axis]
    if hasattr(op, "padding"):
        changes["padding"] = tuple(op.padding[run[0]] for run in runs)

    def reshaped(x, encoding):
        sizes = [math.prod(x.shape[axis + 1] for axis in run) for run in runs]
        return mark(x.reshape(len(x), *sizes), encoding)

    values = [reshaped(*pair) for pair in zip(values, encodings, strict=True)]
    return True, dataclasses.replace(op, **changes), values


def _taken(op, shapes, rank):
    """Axes that an operation tells from their neighbours; None of what LiteRT has for any rank."""
    match op:
        case p.Mean() | p.Largest() | p.Normalize():
            return op.axes
        case p.Softmax() | p.Gather() | p.Concatenate():
            return (op.axis % rank,)
        case p.Pad():
            return [axis for axis, ends in enumerate(op.padding) if any(ends)]
        case p.MatMul():
            return (rank - 2, rank - 1)
        case _ if op.in_place:
            last = {rank - 1} if any(map(np.ndim, getattr(op, "constants", ()))) else set()
            return last | {axis for axis in range(rank) if len({s[axis] for s in shapes}) > 1}
    return None

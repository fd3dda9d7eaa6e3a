"""Equations for which there is no operation, kept as they are."""

from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import interpreter
from hybrid_jax.program.operations import Call
from hybrid_jax.program.read.flat import EXAMPLES
from hybrid_jax.program.read.node import Builder, Node


def call(
    builder: Builder, index: int, eqn: jex.JaxprEqn, values: list[Any], reason: str
) -> list[Node]:
    """The outputs of an equation that stays as it is."""
    text = f"equation {index}, `{str(eqn)[:200]}`"
    if any(isinstance(v, Node) and (0 not in v.axes or v.merged > 1) for v in values):
        raise ValueError(f"fn must keep its examples apart, got {text}: {reason}")
    names, orders = [], []
    for value in values:
        if not isinstance(value, Node):
            continue
        try:
            names.append(builder.placed(value, value.batch_first))
        except ValueError as error:
            raise ValueError(f"fn must keep its examples apart, got {text}: {error}") from None
        orders.append(np.argsort(value.batch_first))
    dtypes = [v.dtype for v in values if isinstance(v, Node)]
    outs = []
    for place, var in enumerate(eqn.outvars):
        sizes = tuple(var.aval.shape)
        axis = _example_axis(eqn, values, place)
        if axis is None:
            raise ValueError(f"fn must keep its examples apart, got {text}: {reason}")

        def function(*arrays, place=place, axis=axis):
            given = iter(zip(arrays, orders, dtypes, strict=True))
            operands = []
            for value in values:
                if isinstance(value, Node):
                    array, order, dtype = next(given)
                    operands.append(array.transpose(order).astype(dtype))
                else:
                    operands.append(value.whole())
            return jax.numpy.moveaxis(interpreter.bind(eqn, operands)[place], axis, 0)

        shape = tuple(n for i, n in enumerate(sizes) if i != axis)
        call = Call(tuple(names), "", function, EXAMPLES, text, reason)
        name = builder.add(call, shape, eqn.primitive.name)
        order = (axis, *(i for i in range(len(sizes)) if i != axis))
        outs.append(builder.node(name, order, sizes, np.dtype(var.aval.dtype)))
    return outs


def _example_axis(eqn, values, place):
    """The axis of an output that grows with the examples; None if not exactly one does."""
    more = []
    for value in values:
        if isinstance(value, Node):
            sizes = [n + 1 if axis == 0 else n for n, axis in zip(value.sizes, value.axes)]
            more.append(jax.ShapeDtypeStruct(sizes, value.dtype))
        else:
            sizes = value.sizes
            more.append(jax.ShapeDtypeStruct(sizes, np.asarray(value.value).dtype))
    before = eqn.outvars[place].aval.shape
    try:
        after = jax.eval_shape(lambda *a: interpreter.bind(eqn, a)[place], *more).shape
    except Exception:
        grown = [i for i, n in enumerate(before) if n == EXAMPLES]
        return grown[0] if grown[:1] == [0] else None
    grown = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    return grown[0] if len(grown) == 1 else None

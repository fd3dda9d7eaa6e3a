"""Examples and places that the traced function has as one axis, as (B · H · W, C).

The node keeps them apart. An equation is read as if the function did, too: its axes behind the
first one count as many more.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core as jex

from hybrid_jax.core import interpreter
from hybrid_jax.core.functions import FUNCTIONS
from hybrid_jax.program.read.flat import Known
from hybrid_jax.program.read.node import Builder, Node


def reshaped(builder: Builder, node: Node, sizes: tuple[int, ...]) -> Node:
    """A node under the lengths of the traced value, whose first axis may be several of its own."""
    sizes = tuple(sizes)
    count = next(
        (i for i in range(2, len(node.sizes) + 1) if math.prod(node.sizes[:i]) == sizes[:1][0]), 1
    )
    if sizes[0] == node.sizes[0] or count == 1 or node.axes[0] != 0:
        return builder.reshaped(node.replace(merged=1), sizes)
    apart = (*node.sizes[:count], *sizes[1:])
    return builder.reshaped(node, apart).replace(merged=count)


def apart(eqn: jex.JaxprEqn, values: list[Any]) -> tuple[jex.JaxprEqn, list[Any], int]:
    """An equation and its operands with the first axes apart, and how many these are."""
    counts = {value.merged for value in values if isinstance(value, Node)}
    name, params = eqn.primitive.name, dict(eqn.params)
    if len(counts) > 1:
        raise ValueError("what has examples and places as one axis must meet its like")
    (count,) = counts

    def later(axes):
        if 0 in axes:
            raise ValueError("examples cannot meet each other")
        return tuple(axis + count - 1 for axis in axes)

    if name == "dot_general":
        ((own, theirs), (shared, others)) = params["dimension_numbers"]
        if not isinstance(values[0], Node) or isinstance(values[1], Node):
            raise ValueError("examples and places as one axis must be multiplied from the right")
        params["dimension_numbers"] = ((later(own), theirs), (later(shared), others))
    elif name.startswith("reduce_"):
        params["axes"] = later(params["axes"])
    elif name == "broadcast_in_dim" and params["broadcast_dimensions"][:1] == (0,):
        (node,) = values
        dimensions = later(params["broadcast_dimensions"][1:])
        params["broadcast_dimensions"] = (*range(count), *dimensions)
        params["shape"] = (*node.sizes[:count], *params["shape"][1:])
    elif name in FUNCTIONS:
        values = [_known_apart(value, values, count) for value in values]
    else:
        raise ValueError(f"'{name}' is not read where examples and places are one axis")
    shapes = [
        jax.ShapeDtypeStruct(value.sizes, atom.aval.dtype)
        for value, atom in zip(values, eqn.invars, strict=True)
    ]
    wide = eqn.replace(params=params)
    (made,) = jax.make_jaxpr(lambda *args: interpreter.bind(wide, args))(*shapes).eqns
    return made, [v.replace(merged=1) if isinstance(v, Node) else v for v in values], count


def _known_apart(value, values, count):
    if not isinstance(value, Known) or not value.sizes:
        return value
    if value.value.shape[0] != 1:
        raise ValueError("a constant must be the same for every example")
    node = next(v for v in values if isinstance(v, Node))
    sizes = (*(node.sizes[:count] if value.sizes[0] != 1 else (1,) * count), *value.sizes[1:])
    return dataclasses.replace(
        value, value=value.value.reshape(*(1,) * count, *value.value.shape[1:]), sizes=sizes
    )

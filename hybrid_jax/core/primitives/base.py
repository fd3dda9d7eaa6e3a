"""What is known of each primitive, in one registry open to users, a file for each family.

`PRIMITIVES['mine'] = Primitive(rule)` lets channels pass through a primitive of one's own; without
a row it is a barrier, which takes whole inputs. Element-wise ones are rows of `core.functions`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.extend import core as jex

from hybrid_jax.core.labels import Labels, Value, join_origins
from hybrid_jax.core.primitives.elementwise import ELEMENTWISE, elementwise


@dataclasses.dataclass(frozen=True)
class Primitive:
    """What is known of a primitive that is not element-wise.

    Attributes:
      labels: (labels, params, values, outvars) -> output values, with channels tied and frozen; or
        None where it cannot say, and the equation is a barrier.
      resize: (equation, values, ins, outs) -> outputs on smaller arrays; `ins` and `outs` hold for
        each axis of each array which indices stay, bool[n]. None of what has no sizes among its
        parameters: it runs as it is.
      arrange: (arrangement, params, shape, shapes of outputs) -> arrangements of outputs that hold
        the entries of a parameter moved about. None of what does not move entries.
      macs: (equation, operands, result) -> multiply-accumulates of one run. None of what has none.
      made_up: (result, entry, n) -> the result with n more such entries, of a reduction that may
        lose them.
      uniform: Whether `labels` minds what is UNIFORM.
    """

    labels: Callable[..., list[Value] | None]
    resize: Callable[..., list[Any]] | None = None
    arrange: Callable[..., list[Any]] | None = None
    macs: Callable[..., int] | None = None
    made_up: Callable[..., Any] | None = None
    uniform: bool = False


PRIMITIVES: dict[str, Primitive] = {}
"""{name: what is known}, open to users."""


def propagate(labels: Labels, eqn: jex.JaxprEqn, values: list[Value]) -> list[Value] | None:
    """Labels of an equation's outputs, tied and frozen; None without a rule: it is a barrier."""
    name = eqn.primitive.name
    origin = join_origins(values)
    if name in ELEMENTWISE:
        return [elementwise(labels, eqn, values, origin)]
    known = PRIMITIVES.get(name)
    if known and not known.uniform:
        values = [value.plain() for value in values]
        # What constants alone make is computed in full, so that an axis of it is as free as theirs.
        known = known if origin else None
    outs = known.labels(labels, eqn.params, values, eqn.outvars) if known else None
    if outs is None:
        return None
    for out in outs:
        for axis in out.labels:
            if len(axis) == 1:
                labels.freeze(axis, "is picked out alone")
    return [dataclasses.replace(out, origin=origin) for out in outs]

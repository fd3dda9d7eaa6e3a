"""Functions of each value, as steps of `core.functions`.

A chain of element-wise equations over one tensor is one function of one value, whatever wrote it:
GELU, hard-swish, a leaky ReLU, a square root after an addition. It is kept as its steps, so that
nothing has to be recognized. Of integers it is a table.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.functions import FUNCTIONS


class Step(NamedTuple):
    """One step of an expression."""

    name: str  # of a row of `FUNCTIONS`
    # Places of its operands among the inputs, the constants and the steps before it
    operands: tuple[int, ...]
    # (name, value) pairs that the row takes beside them
    options: tuple[tuple[str, int | str], ...] = ()


def evaluate(steps: Sequence[Step], values: Sequence[Any]) -> Any:
    """The result of the last step, or without any the first value.

    `values` are inputs and constants, which broadcast: of NumPy, then all is computed there, or of
    JAX.
    """
    made = list(values)
    for step in steps:
        operands = [made[place] for place in step.operands]
        library = jnp if any(isinstance(x, jax.Array) for x in operands) else np
        made.append(FUNCTIONS[step.name](library, *operands, **dict(step.options)))
    return made[-1] if steps else made[0]


FIXED = {"logistic": (1 / 256, 0), "tanh": (1 / 128, 128)}
"""{function of one step: scale and zero point that its kernel in LiteRT returns}."""

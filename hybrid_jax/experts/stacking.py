"""Experts of equal shape as one pytree with a leading axis E, and back."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core


def stack(experts: Sequence[Any]) -> Any:
    """Stacks the parameters of E experts along a new leading axis.

    They have the same structure, shapes and dtypes; each leaf of the stack is `(E, ...)`.
    """
    if not experts:
        raise ValueError("experts must hold at least 1 pytree, got 0")
    for e, expert in enumerate(experts):
        core.check_same_structure(f"experts[{e}]", experts[0], expert)
    return _stacked(experts)


def unstack(stacked: Any) -> list[Any]:
    """Splits a stack into the list of its E experts, the inverse of `stack`."""
    return _unstacked(stacked, count(stacked))


def count(stacked: Any) -> int:
    """The number of experts E of a stack, the one size of the leading axis of all leaves."""
    leaves = [
        (path, jnp.shape(leaf))
        for path, leaf in core.flatten_paths(stacked).items()
        if not core.is_masked_node(leaf)
    ]
    if not leaves or not leaves[0][1]:
        raise ValueError(f"stacked must have leaves with a leading axis, got {leaves[:1]}")
    size = leaves[0][1][0]
    for path, shape in leaves:
        if shape[:1] != (size,):
            raise ValueError(
                f"stacked must have a leading axis of {size} at {path!r}, got shape {shape}"
            )
    return size


# One program for all leaves: one for each shape would take longer to compile, and to load.
@jax.jit
def _stacked(experts):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


@functools.partial(jax.jit, static_argnums=1)
def _unstacked(stacked, size):
    return [jax.tree.map(operator.itemgetter(e), stacked) for e in range(size)]

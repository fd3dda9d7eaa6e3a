"""Bookkeeping on the host: what is known goes through NumPy, which compiles nothing.

jax compiles every operation anew for every shape, and a network of hundreds of layers has hundreds
of those. What is traced, or spread over devices, stays in jax.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(tree: Any) -> bool:
    """Whether a leaf's values are unknown because `jit`, `vmap` or `grad` is tracing."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def check_known(function: str, **trees: Any) -> None:
    """Raises ValueError if what a function is given is being traced."""
    for name, tree in trees.items():
        if is_traced(tree):
            raise ValueError(f"{name} must be arrays, got tracers: {function} runs outside of jit")


def namespace(*trees: Any) -> Any:
    """`numpy` if all values are known and each is on one device, else `jax.numpy`."""
    if is_traced(trees):
        return jnp
    arrays = (leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array))
    return jnp if any(len(array.sharding.device_set) > 1 for array in arrays) else np


def on_device(tree: Any) -> Any:
    """Makes jax arrays of NumPy's, where `jnp.asarray` would compile a copy for every shape."""

    def put(leaf):
        # A copy: what is put may share the memory of an array that someone writes to, or donates.
        known = isinstance(leaf, np.ndarray | np.generic)
        return jax.device_put(np.array(leaf, order="C")) if known else leaf

    return jax.tree.map(put, tree)

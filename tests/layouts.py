"""Kernels for tests that have no network to trace."""

import math

import jax.numpy as jnp

from hybrid_jax import core


def flax_kernels(params):
    """The kernels of a network that uses these leaves as Flax does, (H, W, C, O) and (C, O)."""
    floating = {
        path: leaf.shape
        for path, leaf in core.flatten_paths(params).items()
        if not core.is_masked_node(leaf)
        and leaf.ndim > 1
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return {
        path: core.Kernel(path, n, n, (*range(len(n)),), (1, math.prod(n[:-2]), *n[-2:]), n[:-2])
        for path, n in floating.items()
    }

"""Computing in half precision with weights, statistics and losses in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.training.steps import Forward


def compute_in(forward: Forward, dtype: Any = jnp.bfloat16) -> Forward:
    """Makes `forward` compute in `dtype`, with float32 master weights.

    Parameters and images are rounded where they enter, so that gradients arrive in float32 and an
    update that is too small for `dtype` still adds up. Logits and state, which is not rounded, keep
    their dtypes. An accelerator is faster by it, and a CPU with AMX under jax 0.12. Source:
    Micikevicius et al., Mixed Precision Training, arXiv 1710.03740.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating one, got {dtype}")

    @functools.wraps(forward)
    def computed(params, state, images, key=None):
        def run(params, images):
            # Layers that keep statistics in float32 rely on promotion.
            with jax.numpy_dtype_promotion("standard"):
                return forward(params, state, images, key)

        shapes = jax.eval_shape(forward, params, state, images, key)
        outputs = run(*jax.tree.map(functools.partial(_cast, dtype=dtype), (params, images)))
        return jax.tree.map(lambda got, own: got.astype(own.dtype), outputs, shapes)

    return computed


def _cast(leaf, dtype):
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

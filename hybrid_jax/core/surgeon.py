"""Changing the weights of a linear map one input at a time, the others making up for it.

The least-squares machinery of the Optimal Brain Surgeon, written once for pruning, quantization and
both together. A site is Y = X W with X (P, n) and W (n, O); replacing W by Q changes its outputs by

    ‖X W − X Q‖² = tr((W − Q)ᵀ H (W − Q))        with H = XᵀX, (n, n)

and with H⁻¹ = UᵀU, U upper triangular, the best answer of the rows j > i to an error in row i is to
move by −U_ij / U_ii of it. Sources: B. Hassibi, D. Stork, Second Order Derivatives for Network
Pruning: Optimal Brain Surgeon (1992); E. Frantar et al., GPTQ (arXiv 2210.17323); E. Frantar,
D. Alistarh, SparseGPT (arXiv 2301.00774).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

_BLOCK = 128
_EXACT = lax.Precision.HIGHEST


def damped_gram(gram: jax.Array, damping: float | jax.Array = 0.01) -> jax.Array:
    """H + λ·mean(diag H)·I, which float32 can factor.

    If it cannot at λ = `damping`, then λ is ten times that, and so on; λ = 1 always suffices. Where
    all of H is zero the mean counts as 1. `gram` is float32 (n, n), symmetric without negative
    eigenvalues. The result is positive definite, and NaN only where `gram` is not finite.
    """
    n = gram.shape[0]
    mean = jnp.trace(gram) / n
    step = jnp.eye(n) * jnp.where(mean > 0, mean, 1.0)

    def fails(state):
        weight, matrix = state
        return (weight < 1) & ~jnp.all(jnp.isfinite(jnp.linalg.cholesky(matrix)))

    def harder(state):
        weight = 10 * state[0]
        return weight, gram + weight * step

    weight = jnp.asarray(damping, jnp.float32)
    return lax.while_loop(fails, harder, (weight, gram + weight * step))[1]


def inverse_factor(gram: jax.Array) -> jax.Array:
    """U, upper triangular with a positive diagonal, for which H⁻¹ = UᵀU.

    Without forming H⁻¹: U is the inverse of V, with H = V Vᵀ a Cholesky factor from the last row
    up. `gram` is float32 (n, n), positive definite: what `damped_gram` gives.
    """
    factor = jnp.flip(jnp.linalg.cholesky(jnp.flip(gram)))
    return solve_triangular(factor, jnp.eye(gram.shape[0]), lower=False)


def sweep_rows(
    weights: jax.Array,
    factor: jax.Array,
    project: Callable[..., jax.Array],
    *rows: Any,
) -> jax.Array:
    """Projects the rows of a matrix from first to last, each after it answered those before it.

        w_i = W_i − Σ_{k<i} U_ki / U_kk · e_k        Q_i = project(w_i)        e_i = w_i − Q_i

    so that ‖X W − X Q‖² = Σ_i ‖e_i‖² / U_ii² exactly. A projection onto a grid makes it GPTQ, onto
    a mask SparseGPT's update. Rows go in blocks: what a block answers to all earlier ones is one
    product. `weights` are W, float32 (n, O), `factor` U of `inverse_factor`, (n, n); project(row
    (O,), *entries) -> (O,) gets the entries of `rows`, with a leading axis n, at the row's index.

    Example:
      >>> factor = inverse_factor(jnp.array([[5.0, 2.0], [2.0, 1.0]]))
      >>> weights = jnp.array([[0.5], [3.0]])  # rounding 0.5 to 0 asks 3 to become 3 + 2 · 0.5
      >>> sweep_rows(weights, factor, jnp.round).tolist()
      [[0.0], [4.0]]
    """
    n = weights.shape[0]
    block = min(_BLOCK, n)
    # U_ki / U_kk for k < i. Rows repeated at the end fill the last block and are dropped again.
    feedback = jnp.triu(factor / jnp.diagonal(factor)[:, None], 1)
    feedback = jnp.pad(feedback, (0, -n % block))

    def in_blocks(leaf):
        padding = ((0, -n % block), *((0, 0) for _ in leaf.shape[1:]))
        return jnp.pad(leaf, padding, mode="edge").reshape(-1, block, *leaf.shape[1:])

    def sweep_block(errors, inputs):
        start, targets, own_rows = inputs
        columns = lax.dynamic_slice_in_dim(feedback, start, block, axis=1)
        targets = targets - jnp.matmul(columns.T, errors, precision=_EXACT)
        columns = lax.dynamic_slice_in_dim(columns, start, block, axis=0)

        def step(errors, inputs):
            index, target, column, entries = inputs
            row = target - jnp.matmul(column, errors, precision=_EXACT)
            projected = project(row, *entries)
            return errors.at[index].set(row - projected), projected

        numbered = jnp.arange(block), targets, columns.T, own_rows
        own, projected = lax.scan(step, jnp.zeros_like(targets), numbered)
        return lax.dynamic_update_slice_in_dim(errors, own, start, axis=0), projected

    blocks = jax.tree.map(in_blocks, (weights, rows))
    starts = block * jnp.arange(blocks[0].shape[0])
    errors = jnp.zeros((len(feedback), weights.shape[1]))
    _, swept = lax.scan(sweep_block, errors, (starts, *blocks))
    return swept.reshape(-1, weights.shape[1])[:n]

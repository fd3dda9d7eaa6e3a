"""The Optimal Brain Surgeon on every layer: which weights to remove, and what the others do then.

A layer Y = X W is to keep its outputs: the loss is ½ ‖X W − X Ŵ‖² over the inputs that made the
Gram matrix H = XᵀX of `core.input_grams`, each output channel for itself. All of full OBS is

    scores = obs(params, grams, greedy=True)
    params = compensate(params, masks(scores, 0.5), grams)

and each half goes with others: these scores with any granularity, `compensate` with any masks.
Sources: B. Hassibi, D. Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon
(1992); E. Frantar et al., Optimal Brain Compression (arXiv 2208.11580).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

from hybrid_jax import core
from hybrid_jax.pruning.criteria.leaves import CRITERIA, Given

# Columns are solved together as long as their matrices hold no more than this many numbers.
_MOST = 1 << 22


def obs(
    params: Any,
    grams: Mapping[str, core.Gram],
    *,
    damping: float = 0.01,
    greedy: bool = False,
) -> Any:
    """Scores a weight by the loss that its removal leaves after the others have answered it.

    Removed alone that is w² / (2 [H⁻¹]_ii). Greedily it is the rise of the loss at the weight's
    turn, when from each output channel the cheapest weight leaves, the rest move and H⁻¹ shrinks; a
    weight is never scored below one that left before it, so that masks take them in that order, as
    Optimal Brain Compression does. Greedy costs n³ for each output channel, the other n³ for each
    feature group. `grams` are of `core.input_grams`; `damping` is λ of `core.damped_gram`.

    Example:
      >>> fn, params = lambda params, x: x @ params['w'], {'w': jnp.array([[1.0], [2.0]])}
      >>> grams = core.input_grams(fn, params, [(jnp.array([[1.0, 0.0], [0.0, 3.0]]),)])
      >>> obs(params, grams, damping=1e-6)['w'].round(3).tolist()  # H = diag(1, 9)
      [[0.5], [18.0]]
    """
    core.check_positive("damping", damping)
    if not grams:
        raise ValueError("grams must hold at least one kernel, got none")
    core.check_grams(params, grams)

    def score(path, leaf):
        if path not in grams:
            return optax.MaskedNode()
        return _score(leaf, grams[path], damping, greedy)

    return core.map_with_path(score, params)


def compensate(
    params: Any, masks: Any, grams: Mapping[str, core.Gram], *, damping: float = 0.01
) -> Any:
    """Removes what the masks remove, and moves the rest to the least loss that is left.

    Per output channel with kept weights k and removed weights r, exactly

        ŵ_k = w_k + H_kk⁻¹ H_kr w_r        ŵ_r = 0

    which is where the one-by-one updates of OBS lead, whatever their order. Damping draws ŵ to w,
    not to zero. Costs n³/3 for each output channel.

    `damping` is λ of `core.damped_gram`.
    """
    core.check_positive("damping", damping)
    core.check_masks(params, masks)
    core.check_grams(params, grams)

    def move(path, mask, leaf):
        if core.is_masked_node(mask):
            return leaf
        if path not in grams:
            raise ValueError(
                f"grams must have every kernel with a mask, got none for {path!r} among: "
                f"{', '.join(grams) or 'nothing'}"
            )
        return _compensate(leaf, mask, grams[path], damping)

    return core.map_with_path(move, masks, params)


def _grams(given: Given) -> dict[str, core.Gram]:
    return core.input_grams(given.needed("fn"), given.params, given.needed("batches"))


def _compensated(given: Given, masks: Any) -> Any:
    """Of the kernels alone, by the images at hand."""
    grams = _grams(given)
    own = core.map_with_path(lambda path, m: m if path in grams else optax.MaskedNode(), masks)
    return compensate(given.params, own, grams)


CRITERIA["obs"] = lambda given: obs(given.params, _grams(given))

RECOVERIES: dict[str, Callable[[Given, Any], Any]] = {"obs": _compensated}
"""What answers without training for what masks remove, by name: f(given, masks) -> params.

Open to users. The result need not be on the masks.
"""


@functools.partial(jax.jit, static_argnames="greedy")
def _score(kernel, gram, damping, greedy):
    weights = core.kernel_matrix(gram.site, kernel.astype(jnp.float32))
    factors = jax.vmap(lambda h: core.inverse_factor(core.damped_gram(h, damping)))(gram.matrix)
    if greedy:
        inverses = jnp.einsum("gki,gkj->gij", factors, factors, precision=lax.Precision.HIGHEST)
        scores = _each_column(_removal_losses, inverses, weights)
    else:
        diagonal = jnp.sum(jnp.square(factors), axis=1)
        scores = 0.5 * jnp.square(weights) / diagonal[:, :, None]
    return core.kernel_from_matrix(gram.site, scores)


@jax.jit
def _compensate(kernel, mask, gram, damping):
    weights = core.kernel_matrix(gram.site, kernel.astype(jnp.float32))
    kept = core.kernel_matrix(gram.site, mask)
    damped = jax.vmap(lambda matrix: core.damped_gram(matrix, damping))(gram.matrix)
    moved = core.kernel_from_matrix(gram.site, _each_column(_solve_kept, damped, weights, kept))
    return moved.astype(kernel.dtype)


def _each_column(f, matrices, *columns):
    """f(matrix (n, n), *columns (n,)) -> (n,) for every group and output channel; (G, n, O/G)."""
    group, n, width = columns[0].shape
    index = jnp.repeat(jnp.arange(group), width)
    rows = [jnp.swapaxes(leaf, 1, 2).reshape(-1, n) for leaf in columns]
    out = lax.map(
        lambda args: f(matrices[args[0]], *args[1:]),
        (index, *rows),
        batch_size=max(1, _MOST // n**2),
    )
    return jnp.swapaxes(out.reshape(group, width, n), 1, 2)


def _solve_kept(gram, w, kept):
    removed = jnp.where(kept, 0.0, w)
    # The removed rows and columns become those of the identity, and their answer zero.
    own = jnp.where(jnp.outer(kept, kept), gram, 0.0) + jnp.diag(jnp.where(kept, 0.0, 1.0))
    pull = jnp.where(kept, jnp.matmul(gram, removed, precision=lax.Precision.HIGHEST), 0.0)
    return jnp.where(kept, w + cho_solve(cho_factor(own), pull), 0.0)


def _removal_losses(inverse, w):
    """The rise of the loss as each weight leaves in the order of OBS; (n,)."""

    def remove(state, _):
        w, inverse, losses, last = state
        diagonal = jnp.maximum(jnp.diagonal(inverse), jnp.finfo(jnp.float32).tiny)
        rise = jnp.where(jnp.isinf(losses), 0.5 * jnp.square(w) / diagonal, jnp.inf)
        i = jnp.argmin(rise)
        last = jnp.maximum(rise[i], jnp.nextafter(last, jnp.inf))
        column = inverse[:, i] / diagonal[i]
        return (
            w - column * w[i],
            inverse - jnp.outer(column, inverse[i]),
            losses.at[i].set(last),
            last,
        ), None

    start = w, inverse, jnp.full_like(w, jnp.inf), jnp.float32(0.0)
    return lax.scan(remove, start, length=w.size)[0][2]

"""Rewiring: sparse from the first step to the last, with as many weights grown as are dropped."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hybrid_jax import core
from hybrid_jax.pruning import renewal
from hybrid_jax.pruning.allocation import Allocation
from hybrid_jax.pruning.criteria.weights import magnitude, random
from hybrid_jax.pruning.granularity import Granularity, Kernels, unstructured
from hybrid_jax.pruning.masking import apply_masks
from hybrid_jax.pruning.masking import masks as make_masks
from hybrid_jax.pruning.selection import check_sparsity, keep_best, removed_count


class RewireState(NamedTuple):
    """State of `rewiring`: updates so far, data of the key, masks, the inner optimizer's state."""

    step: jax.Array
    key: jax.Array
    masks: Any
    inner: Any


def rigl(
    inner: optax.GradientTransformation,
    kernels: Kernels,
    sparsity: float | jax.Array,
    key: jax.Array,
    end: int,
    *,
    drop: float | jax.Array = 0.3,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse from scratch; drops small weights and grows where the gradient is large.

    The fraction dropped at step t is ½ `drop` (1 + cos(π t / end)). U. Evci et al., Rigging the
    Lottery: Making All Tickets Winners (arXiv 1911.11134); its `end` is three quarters of all
    steps, and its best allocation `erk(kernels)`. The other arguments are those of `rewiring`.

    Example:
      >>> params = {'w': jnp.array([[4.0, 3.0, 2.0, 1.0]])}
      >>> kernels = core.trace(lambda p, x: x @ p['w'], params, jnp.ones((1, 1))).kernels
      >>> tx = rigl(optax.sgd(0.1), kernels, 0.5, jax.random.key(0), 10, every=1, drop=0.5,
      ...           initial=magnitude)
      >>> state = tx.init(params)
      >>> for _ in range(2):  # of 4 and 3 the second is dropped, for the larger gradient
      ...     updates, state = tx.update({'w': jnp.array([[0.0, 0.0, 1.0, 2.0]])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params['w'], state.masks['w'])
      [[4. 3. 0. 0.]] [[ True  True False False]]
      [[4. 0. 0. 0.]] [[ True False False  True]]
    """
    check_sparsity(drop, "drop")
    fall = optax.cosine_decay_schedule(1.0, core.check_integer("end", end, 1))

    def growth(gradients, key):
        del key
        return magnitude(kernels, gradients)

    return rewiring(
        inner,
        kernels,
        sparsity,
        key,
        end,
        lambda step: drop * fall(step.astype(jnp.float32)),
        growth,
        **options,
    )


def set_(
    inner: optax.GradientTransformation,
    kernels: Kernels,
    sparsity: float | jax.Array,
    key: jax.Array,
    end: int,
    *,
    drop: float | jax.Array = 0.3,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse from scratch; drops small weights and grows as many at random.

    D. Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
    Connectivity inspired by Network Science (arXiv 1707.04780), of which `drop` is the ζ, an epoch
    passes between rewirings and the first masks are random, of `erk(kernels)` densities. The other
    arguments are those of `rewiring`.
    """
    check_sparsity(drop, "drop")
    growth = functools.partial(random, kernels)
    return rewiring(inner, kernels, sparsity, key, end, lambda step: drop, growth, **options)


def rewiring(
    inner: optax.GradientTransformation,
    kernels: Kernels,
    sparsity: float | jax.Array,
    key: jax.Array,
    end: int,
    drop: Callable[[jax.Array], float | jax.Array],
    growth: Callable[[Any, jax.Array], Any],
    *,
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    every: int = 100,
    initial: Callable[[Kernels, Any], Any] | None = None,
    exempt: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: at each `every`-th step before `end` the masks are those of `rewire`.

    Grown weights start at zero, with the state that `inner.init` gives them; a weight that is
    dropped and grown at once stays as it is. Each leaf, and with `n_m` each block, keeps its
    count for good. `inner` steps at every step (in the papers not at those that rewire).

    `drop(step)` is the fraction of the kept weights dropped, `growth(gradients, key)` scores the
    weights that may grow, `initial(kernels, params)` those of the first masks, None at random, of
    `sparsity`, `allocation` and `exempt` as for `masks`. `granularity` must be of single weights:
    `unstructured()` or `n_m(kernels, n, m)`.
    """
    inner = renewal.check_inner(inner)
    check_sparsity(sparsity)
    core.check_integer("end", end, 1)
    core.check_integer("every", every, 1)
    granularity = unstructured() if granularity is None else granularity
    initial = functools.partial(random, key=key) if initial is None else initial

    def init(params):
        masks = params  # What the state is made of, asked as `core.map_state` does.
        if jax.tree.leaves(params):
            masks = make_masks(initial(kernels, params), sparsity, granularity, allocation, exempt)
            _check_single_weights(masks, granularity)
        return RewireState(
            step=jnp.zeros((), jnp.int32),
            # Data, as optimizers around this one cannot select typed keys; copied, to be donated.
            key=jnp.array(jax.random.key_data(key)),
            masks=masks,
            inner=inner.init(apply_masks(params, masks)),
        )

    def update(updates, state, params=None, **extra_args):
        renewal.check_params(params)
        gradients = updates
        kept_gradients = apply_masks(gradients, state.masks)
        updates, inner_state = inner.update(kept_gradients, state.inner, params, **extra_args)

        def rewired(candidate):
            now = jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(key))
            scores = growth(gradients, jax.random.fold_in(now, state.step))
            return rewire(state.masks, candidate, scores, drop(state.step), granularity)

        due = (state.step % every == 0) & (state.step > 0) & (state.step < end)
        updates, masks, inner_state = renewal.renew(
            due, rewired, state.masks, inner, inner_state, updates, params
        )
        step = optax.safe_increment(state.step)
        return updates, RewireState(step, state.key, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def rewire(
    masks: Any,
    weights: Any,
    growth: Any,
    drop: float | jax.Array,
    granularity: Granularity | None = None,
) -> Any:
    """Drops the floor(`drop` · n + ½) smallest of a leaf's n weights; grows the best scored."""
    granularity = unstructured() if granularity is None else granularity

    def rank(mask, _, weight, score):
        kept = jnp.sum(mask, dtype=jnp.int32)
        strength = jnp.where(mask, jnp.abs(weight), -jnp.inf).ravel()
        left = keep_best(strength, kept - removed_count(drop, kept)).reshape(mask.shape)
        # Finite, so that it stays below what is left.
        return jnp.where(left, jnp.inf, jnp.nan_to_num(score))

    leaves = core.flatten_paths(masks)
    ranked = core.flatten_paths(core.map_masked(rank, masks, masks, weights, growth))
    names = granularity.paths(leaves)
    held, rows = granularity.split(leaves, names), granularity.split(ranked, names)
    counts = {n: jnp.sum(held[n], axis=-1, keepdims=True, dtype=jnp.int32) for n in names}
    grown = granularity.merge({n: keep_best(rows[n], counts[n]) for n in names}, leaves)
    return core.map_with_path(lambda path, mask: grown.get(path, mask), masks)


def _check_single_weights(masks: Any, granularity: Granularity) -> None:
    leaves = core.flatten_paths(masks)
    split = jax.eval_shape(lambda: granularity.split(leaves, granularity.paths(leaves)))
    units = sum(rows.size for rows in split.values())
    weights = sum(mask.size for mask in jax.tree.leaves(masks))
    if units != weights:
        raise ValueError(
            f"granularity must have single weights for units, as unstructured() and n_m(), got "
            f"{granularity.name} with {units} units for {weights} weights"
        )

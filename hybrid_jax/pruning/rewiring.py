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
from hybrid_jax.pruning.criteria import magnitude, random
from hybrid_jax.pruning.granularity import Granularity, Kernels, unstructured
from hybrid_jax.pruning.masking import apply_masks
from hybrid_jax.pruning.masking import masks as make_masks
from hybrid_jax.pruning.selection import check_sparsity, keep_best, removed_count


class RewireState(NamedTuple):
    """State of `rigl` and `set_`.

    Attributes:
      step: () int32, updates so far.
      key: Data of the key, from which new random numbers are drawn at every rewiring.
      masks: Pytree of bool like the parameters, `optax.MaskedNode()` where nothing is pruned.
      inner: State of the inner optimizer.
    """

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
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    *,
    every: int = 100,
    drop: float | jax.Array = 0.3,
    initial: Callable[..., Any] | None = None,
    exempt: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse from scratch; drops small weights and grows where the gradient is large.

    At each `every`-th step t before `end`, every leaf with n kept weights drops those
    k = floor(f n + ½) of smallest magnitude, f = ½ `drop` (1 + cos(π t / end)), and grows k of
    those not kept then, of largest magnitude of the gradient. U. Evci et al., Rigging the
    Lottery: Making All Tickets Winners (arXiv 1911.11134).

    Grown weights start at zero, with the state that `inner.init` gives them; a weight that is
    dropped and grown at once stays as it is. Each leaf, and with `n_m` each block, keeps its
    count for good. `inner` sees the gradients of kept weights, zero for the others, and steps at
    every step (in the paper not at those that rewire), so that its own schedules count them all.
    It is a wrapper because growing takes the gradients as they are before the optimizer.

    Args:
      inner: As for `hold_masks`.
      kernels: `core.trace(...).kernels`, what is pruned.
      sparsity: () fraction removed, in [0, 1].
      key: A key of `jax.random.key`, for the first masks.
      end: The step from which masks stay. The paper's is three quarters of all steps.
      granularity: As for `masks`, of single weights: `unstructured()` or `n_m(kernels, n, m)`.
      allocation: As for `masks`, for the first masks. The paper's best is `erk(kernels)`.
      every: Steps between rewirings, from 1.
      drop: Fraction of the kept weights dropped at first, in [0, 1].
      initial: `initial(kernels, params) -> scores` for the first masks; None for random ones.
      exempt: As for `masks`.

    Raises:
      ValueError: If `inner` is no optimizer, or an argument lies outside these bounds. From
        `init`, what `masks` raises on these parameters; also if a unit of `granularity` is not a
        single weight. From `update`, if it is called without the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
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
    return _rewiring(
        inner,
        kernels,
        sparsity,
        key,
        end,
        granularity,
        allocation,
        every,
        drop,
        initial,
        exempt,
        fraction=lambda step: 0.5 * drop * (1 + jnp.cos(jnp.pi * step.astype(jnp.float32) / end)),
        growth=lambda gradients, key: magnitude(kernels, gradients),
    )


def set_(
    inner: optax.GradientTransformation,
    kernels: Kernels,
    sparsity: float | jax.Array,
    key: jax.Array,
    end: int,
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    *,
    every: int = 100,
    drop: float | jax.Array = 0.3,
    initial: Callable[..., Any] | None = None,
    exempt: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse from scratch; drops small weights and grows as many at random.

    As `rigl`, but with the constant fraction `drop` (ζ) and without a look at the gradients: D.
    Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
    Connectivity inspired by Network Science (arXiv 1707.04780). There an epoch passes between
    rewirings, none follows the last, and ζ is 0.3.

    Args:
      inner: As for `rigl`.
      kernels: As for `rigl`.
      sparsity: As for `rigl`.
      key: A key of `jax.random.key`, for the first masks and for what grows.
      end: The step from which masks stay.
      granularity: As for `rigl`.
      allocation: As for `rigl`. The paper's first masks are random, of `erk(kernels)` densities.
      every: As for `rigl`.
      drop: ζ, the fraction of the kept weights dropped, in [0, 1].
      initial: As for `rigl`.
      exempt: As for `rigl`.

    Raises:
      ValueError: As for `rigl`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {'w': jnp.arange(1.0, 101.0).reshape(10, 10)}
      >>> kernels = core.trace(lambda p, x: x @ p['w'], params, jnp.ones((1, 10))).kernels
      >>> tx = set_(optax.sgd(0.1), kernels, 0.8, jax.random.key(0), end=10, every=1)
      >>> first = tx.init(params)
      >>> zero = {'w': jnp.zeros((10, 10))}
      >>> _, state = tx.update(zero, tx.update(zero, first, params)[1], params)
      >>> int(state.masks['w'].sum()), int((state.masks['w'] & ~first.masks['w']).sum())
      (20, 6)
    """
    return _rewiring(
        inner,
        kernels,
        sparsity,
        key,
        end,
        granularity,
        allocation,
        every,
        drop,
        initial,
        exempt,
        fraction=lambda step: drop,
        growth=functools.partial(random, kernels),
    )


def _rewiring(
    inner,
    kernels,
    sparsity,
    key,
    end,
    granularity,
    allocation,
    every,
    drop,
    initial,
    exempt,
    fraction,
    growth,
):
    """`fraction(step)` of the kept weights is dropped; `growth(gradients, key) -> scores`."""
    inner = renewal.check_inner(inner)
    check_sparsity(sparsity)
    core.check_integer("end", end, 1)
    core.check_integer("every", every, 1)
    check_sparsity(drop, "drop")
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
            return rewire(state.masks, candidate, scores, fraction(state.step), granularity)

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
    """Drops the kept weights of smallest magnitude and grows as many of the highest score.

    Each leaf of n kept weights drops floor(`drop` · n + ½) of them. What was just dropped may
    grow again. Of equal magnitudes or scores the lower index is kept; NaN scores as 0.

    Args:
      masks: Pytree of bool, True where kept.
      weights: Pytree of floating arrays like `masks`.
      growth: Pytree of floating scores like `masks`.
      drop: () fraction in [0, 1].
      granularity: `unstructured()` (default) or `n_m(kernels, n, m)`, of which every row keeps its
        count.

    Returns:
      Pytree like `masks`, with as many True in each leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = {'w': jnp.array([True, True, False, False])}
      >>> weights, growth = {'w': jnp.array([2.0, 1.0, 0.0, 0.0])}, {'w': jnp.arange(4.0)}
      >>> rewire(masks, weights, growth, 0.5)
      {'w': Array([ True, False, False,  True], dtype=bool)}
    """
    granularity = unstructured() if granularity is None else granularity

    def rank(path, mask, weight, score):
        del path
        if core.is_masked_node(mask):
            return mask
        kept = jnp.sum(mask, dtype=jnp.int32)
        strength = jnp.where(mask, jnp.abs(weight), -jnp.inf).ravel()
        left = keep_best(strength, kept - removed_count(drop, kept)).reshape(mask.shape)
        # Finite, so that it stays below what is left.
        return jnp.where(left, jnp.inf, jnp.nan_to_num(score))

    leaves = core.flatten_paths(masks)
    ranked = core.flatten_paths(core.map_with_path(rank, masks, weights, growth))
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

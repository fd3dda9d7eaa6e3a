import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import contrib, core, pruning

SGD = optax.sgd(1.0)


def run(tx, params, gradients):
    """Parameters and states after each of `gradients`."""
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        gradient = jax.tree.map(jnp.zeros_like, params) | {"w": jnp.array([gradient])}
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state))
    return seen


PARAMS = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}  # (O, C)
KERNELS = core.trace(lambda p, x: x @ p["w"].T, PARAMS, jnp.ones((1, 4))).kernels
magnitude = functools.partial(pruning.magnitude, KERNELS)


def test_a_removed_weight_grows_and_returns():
    tx = contrib.straight_through(SGD, magnitude, pruning.one_shot(0.5))
    seen = run(tx, PARAMS, [[0.0, 0.0, 0.0, -2.5], [0.0, 0.0, -2.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    # Dense 4 3 2 3.5, then 4 3 4 3.5 where of equal weights the lower index is kept, then 1 3 4
    # 3.5: the two largest are shown.
    dense = [[4, 3, 2, 3.5], [4, 3, 4, 3.5], [1, 3, 4, 3.5]]
    shown = [[4, 0, 0, 3.5], [4, 0, 4, 0], [0, 0, 4, 3.5]]
    for (params, state), d, p in zip(seen, dense, shown):
        np.testing.assert_array_equal(state.dense["w"][0], d)
        np.testing.assert_array_equal(params["w"][0], p)


def test_masks_are_made_anew_at_every_other_step():
    tx = contrib.straight_through(SGD, magnitude, pruning.one_shot(0.5), every=2)
    seen = run(tx, PARAMS, [[0.0] * 4, [0.0, 0.0, 0.0, -8.0], [0.0] * 4])
    shown = [[4, 3, 0, 0], [4, 3, 0, 0], [4, 0, 0, 9]]
    assert [params["w"][0].tolist() for params, _ in seen] == shown


def test_decay_pulls_at_removed_weights_alone():
    tx = contrib.straight_through(
        SGD, magnitude, pruning.one_shot(0.5), contrib.n_m(KERNELS, 1, 2), decay=0.25
    )
    (_, first), (params, second) = run(tx, PARAMS, [[0.0] * 4] * 2)
    # Nothing is removed before the first step. In the second 3 and 1 are: 3 − 3/4, 1 − 1/4.
    np.testing.assert_array_equal(first.dense["w"], PARAMS["w"])
    np.testing.assert_array_equal(second.dense["w"], [[4.0, 2.25, 2.0, 0.75]])
    np.testing.assert_array_equal(params["w"], [[4.0, 0.0, 2.0, 0.0]])


def test_accumulated_scores_see_the_dense_weights():
    # Movement: −Σ w · g of the dense weights, so that a removed one is judged too.
    tx = contrib.straight_through(
        optax.sgd(0.0),
        lambda params, accumulated: accumulated,
        pruning.one_shot(0.5),
        needs=("accumulated",),
        accumulate=lambda s, w, g: jax.tree.map(lambda s, w, g: s - w * g, s, w, g),
    )
    seen = run(tx, PARAMS, [[-1.0, -1.0, 0.0, 0.0], [0.0, 0.0, -3.0, 0.0]])
    # 4 3 0 0, then 4 3 6 0.
    assert [s.accumulated["w"][0].tolist() for _, s in seen] == [[4, 3, 0, 0], [4, 3, 6, 0]]
    assert [p["w"][0].tolist() for p, _ in seen] == [[4, 3, 0, 0], [4, 0, 2, 0]]


def test_other_leaves_keep_their_own_updates():
    params = PARAMS | {"b": jnp.ones(3), "count": jnp.arange(3)}
    tx = contrib.straight_through(SGD, magnitude, pruning.one_shot(0.5))
    state = tx.init(params)
    assert state.dense["b"] == state.dense["count"] == optax.MaskedNode()
    gradients = jax.tree.map(jnp.zeros_like, params) | {"b": jnp.full(3, 0.25)}
    tx = contrib.straight_through(optax.scale(-1), magnitude, pruning.one_shot(0.5))
    updates, _ = tx.update(gradients, state, params)
    np.testing.assert_array_equal(updates["b"], [-0.25] * 3)
    np.testing.assert_array_equal(updates["count"], [0] * 3)


def test_kept_parameters_are_the_dense_weights_to_one_rounding():
    params = {"w": jax.random.normal(jax.random.key(0), (20, 30))}
    kernels = core.trace(lambda p, x: x @ p["w"], params, jnp.ones((1, 20))).kernels
    score = functools.partial(pruning.magnitude, kernels)
    tx = contrib.straight_through(optax.sgd(0.3), score, pruning.one_shot(0.5))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(20):
        updates, state = update(
            {"w": jax.random.normal(jax.random.key(i), (20, 30))}, state, params
        )
        params = optax.apply_updates(params, updates)
        mask, dense = state.masks["w"], state.dense["w"]
        assert (params["w"][~mask] == 0.0).all()
        np.testing.assert_allclose(params["w"][mask], dense[mask], rtol=0, atol=2.0**-21)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="inner must be an optax transformation"):
        contrib.straight_through(magnitude, pruning.one_shot(0.5), None)
    with pytest.raises(ValueError, match=r"n_m\(2, 4\) must be in \[0, 0.5\], got 0.8"):
        contrib.straight_through(SGD, magnitude, pruning.one_shot(0.8), contrib.n_m(KERNELS, 2, 4))
    tx = contrib.straight_through(
        SGD,
        lambda params, accumulated: accumulated,
        pruning.one_shot(0.5),
        needs=("accumulated",),
        accumulate=lambda s, w, g: jax.tree.map(lambda x: x.astype(jnp.bfloat16), s),
    )
    with pytest.raises(ValueError, match=r"the result of accumulate must have float32\[1,4\] at"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)

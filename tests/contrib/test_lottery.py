import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import contrib, core, pruning

KEY = jax.random.key(0)


def magnitude(params):
    """Of a dense layer without bias."""
    shape = jax.ShapeDtypeStruct((1, params["w"].shape[0]), "float32")
    kernels = core.trace(lambda params, x: x @ params["w"], params, shape).kernels
    return pruning.magnitude(kernels, params)


def test_tickets_by_hand():
    starts = []

    def train(params, masks, key):
        """Reverses the order of the magnitudes, on the mask."""
        starts.append(params["w"][0].tolist())
        return {"w": jnp.where(masks["w"], 10.0 - params["w"], 0.0)}

    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])}
    tickets = contrib.lottery_tickets(train, params, magnitude, KEY, rounds=2, fraction=0.5)
    # Trained 9 … 2: the last four leave; of 9 8 7 6 the last two. Each starts from where it was.
    assert starts == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [1, 2, 3, 4, 0, 0, 0, 0],
        [1, 2, 0, 0, 0, 0, 0, 0],
    ]
    assert [float(t.sparsity) for t in tickets] == [0.0, 0.5, 0.75]
    assert [int(t.masks["w"].sum()) for t in tickets] == [8, 4, 2]
    assert tickets[2].trained["w"][0].tolist() == [9, 8, 0, 0, 0, 0, 0, 0]


def regression(params, masks, key, steps=30):
    """Noisy least squares of y = x · 1 on the mask."""
    tx = pruning.hold_masks(optax.sgd(0.05), masks)

    def step(carry, key):
        params, state = carry
        x = jax.random.normal(key, (16, 4))
        gradients = jax.grad(lambda p: jnp.mean((x @ (p["w"] - 1.0)) ** 2))(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def test_seeds_are_one_vmap():
    train = jax.jit(regression)
    find = functools.partial(
        contrib.lottery_tickets, train, criterion=magnitude, rounds=2, fraction=0.5
    )
    params = {"w": jax.random.normal(KEY, (3, 4, 2))}
    keys = jax.random.split(KEY, 3)
    stacked = jax.vmap(lambda params, key: find(params, key=key))(params, keys)
    for i in range(3):
        alone = find({"w": params["w"][i]}, key=keys[i])
        for one, ticket in zip(alone, stacked, strict=True):
            np.testing.assert_array_equal(ticket.masks["w"][i], one.masks["w"])
            np.testing.assert_allclose(ticket.trained["w"][i], one.trained["w"], rtol=1e-5)
    # Other noise, another ticket's network; and each round has noise of its own.
    assert (stacked[0].trained["w"][0] != stacked[0].trained["w"][1]).any()


def test_instability_is_of_two_trainings_of_one_ticket():
    def train(params, masks, key):
        """Falls into one of two wells by chance."""
        sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
        return {"w": jnp.where(masks["w"], sign, 0.0)}

    def error(params):
        return jnp.mean((params["w"] ** 2 - 1) ** 2)

    params, masks = {"w": jnp.zeros((1, 2))}, {"w": jnp.array([[True, False]])}
    keys = jax.random.split(KEY, 40)
    got = jax.vmap(lambda key: contrib.instability(train, error, params, masks, key, 5))(keys)
    # One removed weight errs by 1 everywhere, so that the path is ½ + ½ of the double well's.
    one, other = jax.vmap(lambda key: jax.vmap(jax.random.bernoulli)(jax.random.split(key)))(keys).T
    np.testing.assert_allclose(got, jnp.where(one == other, 0.0, 0.5), atol=1e-6)
    assert 0 < (got > 0.02).sum() < 40


def test_bad_input_is_named():
    params = {"w": jnp.ones((2, 2))}

    def train(params, masks, key):
        return params

    with pytest.raises(ValueError, match="rounds must be an integer of at least 0, got -1"):
        contrib.lottery_tickets(train, params, magnitude, KEY, -1)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.2"):
        contrib.lottery_tickets(train, params, magnitude, KEY, 1, 1.2)
    with pytest.raises(ValueError, match=r"n_m\(1, 2\) must be in \[0, 0.5\], got 0.75"):
        contrib.lottery_tickets(train, params, magnitude, KEY, 2, 0.5, contrib.n_m({}, 1, 2))
    with pytest.raises(ValueError, match="scores must have a leaf to prune"):
        contrib.lottery_tickets(train, params, lambda p: {"w": optax.MaskedNode()}, KEY, 1)
    with pytest.raises(ValueError, match=r"the result of train must have .* at 'w', got no leaf"):
        contrib.lottery_tickets(lambda params, masks, key: {}, params, magnitude, KEY, 1)
    with pytest.raises(ValueError, match="points must be an integer of at least 2, got 1"):
        contrib.instability(train, lambda p: jnp.float32(0), params, {"w": params["w"] > 0}, KEY, 1)

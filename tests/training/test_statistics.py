"""Statistics are told by what the training function does, never by their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import experts, training

AXES = (0, 1, 2)
IMAGES = np.random.default_rng(0).normal(3, 2, (3, 4, 5, 5, 2)).astype(np.float32)
ALL = IMAGES.reshape(-1, 2).astype(np.float64)
ONE = jax.ShapeDtypeStruct(IMAGES[0].shape, np.float32)


def blend(old, own, momentum=0.9):
    return momentum * old + (1 - momentum) * own


def make_forward(**own):
    """Blends each leaf of the state with its function of the images."""

    def forward(params, state, x, key):
        return x, {name: blend(state[name], f(x)) for name, f in own.items()}

    return forward, {name: jnp.zeros(2) for name in own}


MOMENTS = {"z": lambda x: x.mean(AXES), "a": lambda x: x.var(AXES)}


def keras(params, state, x, key):
    """As `Model.stateless_call`: lists, a seed among them, variances before means."""
    (scale,), (seed, *old) = params, state
    new = [seed + jnp.uint32(1)]
    for variance, mean in zip(old[::2], old[1::2]):
        m, v = x.mean(AXES, keepdims=True), x.var(AXES, keepdims=True)
        new += [blend(variance, v.ravel()), blend(mean, m.ravel(), 0.99)]
        x = (x - m) * jax.lax.rsqrt(v + 1e-3) * scale[None, None, None]
    return x, new


def test_of_lists_as_keras_has_them():
    state = [jnp.uint32(7), *(jnp.zeros(2) for _ in range(4))]
    params = [jnp.full(2, 3.0)]
    found = training.running_statistics(keras, params, state, ONE)
    assert found == {"1": "2", "2": None, "3": "4", "4": None}
    new = training.reestimate_batchnorm(keras, params, state, IMAGES)
    assert new[0] == 7
    np.testing.assert_allclose(new[1], ALL.var(0), rtol=1e-4)
    np.testing.assert_allclose(new[2], ALL.mean(0), rtol=1e-4)
    # The second layer sees what the first has normalized by each batch: variance 3² each.
    np.testing.assert_allclose(new[3], [9, 9], rtol=1e-2)
    np.testing.assert_allclose(new[4], [0, 0], atol=1e-5)


def test_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.bn(self.conv(x)))

    graph, params, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def forward(params, state, x, key):
        net = nnx.merge(graph, params, state)
        net.train()
        out = net(x)
        return out, nnx.split(net, nnx.Param, ...)[2]

    found = training.running_statistics(forward, params, state, ONE)
    assert sorted(found.values(), key=str) == sorted(
        [None, *(p for p in found if found[p] is None)], key=str
    )
    new = training.reestimate_batchnorm(forward, params, state, IMAGES)
    own = nnx.merge(graph, params, new)
    x = own.conv(IMAGES.reshape(-1, 5, 5, 2))
    np.testing.assert_allclose(own.bn.mean[...], x.mean(AXES), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(own.bn.var[...], x.var(AXES), rtol=1e-3)


def test_what_the_images_do_not_change_stays():
    """A counter, a constant, a leaf that is left out, and a frozen layer before the other."""

    def forward(params, state, x, key):
        x = x - state["frozen"][None, None, None]
        own = {name: blend(state[name], f(x)) for name, f in MOMENTS.items()}
        return x, own | {"frozen": state["frozen"], "count": state["count"] + 1, "zero": 0.0}

    state = {"z": jnp.zeros(2), "a": jnp.ones(2), "frozen": jnp.ones(2), "count": jnp.float32(4)}
    state |= {"zero": jnp.float32(0), "other": jnp.ones(3)}
    assert training.running_statistics(forward, {}, state, ONE) == {"a": "z", "z": None}
    new = training.reestimate_batchnorm(forward, {}, state, IMAGES)
    np.testing.assert_allclose(new["z"], ALL.mean(0) - 1, rtol=1e-4)
    np.testing.assert_allclose(new["a"], ALL.var(0), rtol=1e-4)
    assert (new["count"], new["frozen"].tolist()) == (4, [1, 1])


@pytest.mark.parametrize(
    "own",
    [
        {"mean": MOMENTS["z"]},  # alone
        {"mean": MOMENTS["z"], "var": lambda x: jnp.square(x).mean(AXES)},  # not about the mean
        {"mean": MOMENTS["z"], "var": lambda x: x.std(AXES)},
        {"mean": MOMENTS["z"], "var": lambda x: x.var(0).mean((0, 1))},  # of groups
        {"mean": lambda x: x.max(AXES), "var": MOMENTS["a"]},
        {"mean": lambda x: x.mean(AXES) / 2, "var": MOMENTS["a"]},
        {"mean": lambda x: x[0].mean((0, 1)), "var": MOMENTS["a"]},
        MOMENTS | {"range": lambda x: jnp.abs(x).max(AXES)},  # an observer of ranges
    ],
)
def test_what_is_not_shown_to_be_moments_is_refused(own):
    forward, state = make_forward(**own)
    with pytest.raises(ValueError, match=r"state must hold running means and variances, got '"):
        training.running_statistics(forward, {}, state, ONE)


def test_what_depends_on_another_old_value_is_refused():
    def forward(params, state, x, key):
        new = {"z": blend(state["z"], x.mean(AXES))}
        return x, new | {
            "a": blend(state["a"], jnp.square(x - new["z"][None, None, None]).mean(AXES))
        }

    with pytest.raises(ValueError, match=r"must update 'a' by its old value .* that of 'z' in it"):
        training.running_statistics(forward, {}, {"z": jnp.zeros(2), "a": jnp.ones(2)}, ONE)


@pytest.mark.parametrize("method", ["vmap", "map", "unroll"])
def test_of_a_stack_those_of_one_expert(method):
    """A loop over experts hides what a layer sees, and then nothing is guessed."""

    def forward(params, state, x, key):
        x = x @ params
        own = {name: blend(state[name], f(x)) for name, f in MOMENTS.items()}
        return x, own

    params = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    state = {"z": jnp.zeros((2, 2)), "a": jnp.ones((2, 2))}
    mapped = experts.map_experts(forward, method, (0, 0, None, None))
    one = training.running_statistics(forward, params[0], {k: v[0] for k, v in state.items()}, ONE)
    if method != "vmap":
        with pytest.raises(
            ValueError, match="state must hold running means and variances, got 'a'"
        ):
            training.running_statistics(mapped, params, state, ONE)
    new = training.reestimate_batchnorm(mapped, params, state, IMAGES, statistics=one)
    np.testing.assert_allclose(new["z"], [ALL.mean(0), 2 * ALL.mean(0)], rtol=1e-4)
    np.testing.assert_allclose(new["a"], [ALL.var(0), 4 * ALL.var(0)], rtol=1e-4)

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import core


def primitives(fn, *args):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(fn)(*args).eqns]


def assert_same(fn, *args, atol=1e-5):
    """Outputs and the gradient, of what was changed and of what was not."""
    for run in (fn, jax.grad(lambda *args: jnp.sin(fn(*args)).sum(), range(len(args)))):
        changed = core.one_pass_affine(fn)
        if run is not fn:
            changed = jax.grad(lambda *args: jnp.sin(core.one_pass_affine(fn)(*args)).sum(),
                               range(len(args)))  # fmt: skip
        got, want = jax.jit(changed)(*args), jax.jit(run)(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), got, want)


def test_by_hand():
    """((x - 1) · 3 + 2) / 4 = 0.75 x - 0.25, one product and one sum over x."""

    def fn(x):
        return ((x - 1.0) * 3.0 + 2.0) / 4.0

    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(core.one_pass_affine(fn)(x), 0.75 * x - 0.25, rtol=1e-6)
    whole = [
        eqn.primitive.name
        for eqn in jax.make_jaxpr(core.one_pass_affine(fn))(x).eqns
        if eqn.outvars[0].aval.shape == (2, 3)
    ]
    assert whole == ["mul", "add"]


@pytest.mark.parametrize("axis", [-1, 1])
def test_batch_norm_of_flax(axis):
    norm = nn.BatchNorm(use_running_average=False, axis=axis)
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 3, 5, 3))
    variables = norm.init(jax.random.key(1), x)
    params = {"scale": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.0, 1.0, 2.0])}

    def fn(params, x):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        return norm.apply(given, x, mutable=["batch_stats"])[0]

    assert_same(fn, params, x)
    tensors = [
        eqn.primitive.name
        for eqn in jax.make_jaxpr(core.one_pass_affine(fn))(params, x).eqns
        if eqn.outvars[0].aval.shape == x.shape
    ]
    assert sorted(tensors) == ["add", "mul", "square"]  # the square is that of the variance


def test_a_variance_in_two_passes_and_a_difference_from_above():
    def fn(x, scale):
        centred = x - x.mean(0, keepdims=True)
        y = centred / jnp.sqrt(jnp.square(centred).mean(0, keepdims=True) + 1e-3)
        return jnp.float32(1) - scale[None] * -y

    assert_same(fn, jax.random.normal(jax.random.key(0), (6, 4)), jnp.arange(4.0))


def test_inside_calls_checkpoints_and_half_precision():
    @jax.checkpoint
    def fn(x, w):
        y = jax.jit(lambda x: (x - w[None]) * 2.0 + 1.0)(x)
        return jax.nn.relu(y) * x

    x = jax.random.normal(jax.random.key(0), (5, 3))
    assert_same(fn, x, jnp.arange(3.0))
    half = x.astype(jnp.bfloat16)

    def cast(x, w):
        return ((x.astype(jnp.float32) - w[None]) * 2.0).astype(jnp.bfloat16)

    got = core.one_pass_affine(cast)(half, jnp.arange(3.0))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, cast(half, jnp.arange(3.0)))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * 2.0,  # one pass as it is
        lambda x: 1.0 / (x + 1.0),
        lambda x: (x + 1.0) * x,
        lambda x: (lax.stop_gradient(x + 1.0)) * 2.0,
        lambda x: (x + x[:1]) * x[:, :1],  # alike along no one axis
        lambda x: [y := x + 1.0, y * 2.0],  # what is between is read
        lambda x: x[0, :2] * 2.0 + x[0, 1:3] - 1.0,  # small beside what it meets
        lambda x: lax.scan(lambda c, r: (c * 2.0 + 1.0, r), x, x)[0],
    ],
)
def test_what_is_left_as_it_is(fn):
    x = jnp.arange(1.0, 13.0).reshape(3, 4)
    assert primitives(core.one_pass_affine(fn), x) == primitives(fn, x)
    chex.assert_trees_all_equal(core.one_pass_affine(fn)(x), fn(x))


def test_the_gradient_of_a_network():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x)))
            return nn.Dense(2)(x.mean((1, 2)))

    images = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    variables = jax.jit(Net().init)(jax.random.key(1, impl="rbg"), images)

    def fn(params, images):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        return Net().apply(given, images, mutable=["batch_stats"])[0]

    assert_same(fn, variables["params"], images)

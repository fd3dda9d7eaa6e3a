import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, experts
from hybrid_jax.experts import mapping

METHODS = ["vmap", "map", "unroll", "auto"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4)(x))
        return nn.Dense(3)(x.mean((1, 2)))


NET = Net()


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (2, 5, 5, 2))


@pytest.fixture(scope="module")
def parameters(images):
    init = jax.jit(NET.init)
    return [init(jax.random.key(e), images) for e in range(3)]


def loss(params, x):
    return jnp.square(NET.apply(params, x)).sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fn", [NET.apply, jax.grad(loss)], ids=["forward", "gradient"])
def test_stack_equals_the_loop(method, fn, parameters, images):
    """Law 5."""
    mapped = jax.jit(experts.map_experts(fn, method, in_axes=(0, None)))
    together = experts.unstack(mapped(experts.stack(parameters), images))
    alone = jax.jit(fn)
    alone = [alone(params, images) for params in parameters]
    for one, other in zip(together, alone, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_through(method, parameters, images):
    mapped = experts.map_experts(loss, method, in_axes=(0, None))
    stacked = experts.stack(parameters)
    got = jax.jit(jax.grad(lambda stacked, x: mapped(stacked, x).sum(), (0, 1)))(stacked, images)
    alone = jax.jit(jax.grad(loss, (0, 1)))
    each = [alone(params, images) for params in parameters]
    want = experts.stack([g[0] for g in each]), sum(g[1] for g in each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


@pytest.mark.parametrize("method", METHODS)
def test_axes_pytrees_and_keys(method, key):
    # Expert e: (w_e + s, w_e - y_e) and a draw by its own key.
    def fn(w, shared, arguments):
        drawn = jax.random.uniform(arguments["key"])
        return {"sum": w + shared, "rest": (w - arguments["y"], drawn)}

    keys = jax.random.split(key, 2)
    out = experts.map_experts(fn, method, in_axes=(0, None, 0))(
        jnp.array([1.0, 2.0]), jnp.float32(10), {"y": jnp.array([0.5, 4.0]), "key": keys}
    )
    np.testing.assert_array_equal(out["sum"], [11, 12])
    np.testing.assert_array_equal(out["rest"][0], [0.5, -2])
    np.testing.assert_array_equal(out["rest"][1], [jax.random.uniform(k) for k in keys])


def test_a_cpu_takes_the_loop_unmeasured(monkeypatch):
    monkeypatch.setattr(mapping, "_fastest", None)
    assert experts.fastest(lambda w: w + 1, jnp.ones((2, 2))) == "map"
    assert experts.fastest(lambda w: w + 1, jnp.ones((1, 2))) == "unroll"


@pytest.mark.parametrize("best", ["vmap", "map"])
def test_elsewhere_the_faster_is_measured_once(monkeypatch, tmp_path, best):
    def slow(method):
        def made(fn, axes, choices):
            def run(*args):
                if method != best:
                    jax.debug.callback(lambda: time.sleep(0.05))
                return jax.vmap(fn, axes)(*args)

            return run

        return made

    monkeypatch.setattr(mapping, "_METHODS", {m: slow(m) for m in mapping._METHODS})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    choices = core.Choices(cache=tmp_path / "choices.json")
    shape = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    for _ in range(2):
        assert experts.fastest(lambda w: w + 1, shape, choices=choices) == best
        assert list(choices.answers.values()) == [best]


def test_symbolic_shape_cannot_be_measured():
    b = jax.export.symbolic_shape("b")[0]
    shape = jax.ShapeDtypeStruct((2, b), jnp.float32)
    with pytest.raises(ValueError, match=r"method must be one of vmap, map, .* got 'auto'"):
        experts.fastest(lambda w: w + 1, shape)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'vmp'; did you mean vmap"):
        experts.map_experts(lambda w: w, "vmp")
    with pytest.raises(ValueError, match=r"leading axis of 2 at '1', got shape \(3,\)"):
        experts.map_experts(lambda a, b: a + b, "map")(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"in_axes must hold 0 or None .* at least one 0"):
        experts.map_experts(lambda a: a, "map", in_axes=(None,))(jnp.ones(2))

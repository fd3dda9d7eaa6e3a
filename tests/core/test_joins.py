import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import core, models

X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 6, 6, 4)), jnp.float32)
PARAMS = {name: jnp.asarray(0.1 + np.eye(4), jnp.float32) for name in "abc"}


def found(fn, *inputs):
    graph = core.trace(fn, PARAMS, *(inputs or (X,)))
    return {join.name: (join.kind, join.operand, join.site) for join in graph.joins}


def test_a_residual_sum():
    def fn(params, x):
        x = jax.nn.relu(x @ params["a"])
        return jax.nn.relu(x @ params["b"]) + x

    assert found(fn) == {"b/add/0": ("add", 0, None), "a/add/1": ("add", 1, "b")}


def test_a_difference_of_two_joins_in_turn():
    def fn(params, x):
        y = x @ params["a"]
        y = (y - x) - x @ params["b"]
        return y @ params["c"]

    assert found(fn) == {
        "a/add/0": ("add", 0, None),
        "input/add/1": ("add", 1, "a"),
        "a/add/0#2": ("add", 0, None),  # y − x, of which a ran last
        "b/add/1": ("add", 1, None),
    }


def test_squeeze_and_excite():
    def fn(params, x):
        gate = jax.nn.sigmoid(x.mean((1, 2)) @ params["a"])
        return x * gate[:, None, None, :]

    assert found(fn) == {
        "input/mean": ("mean", 0, None),
        "a/multiply/1": ("multiply", 1, None),
    }


def test_a_concatenation_is_one_tensor_but_for_what_else_is_read():
    def fn(params, x):
        return jnp.concatenate([x, x @ params["a"]], -1)

    assert found(fn) == {
        "input/concatenate/0": ("concatenate", 0, "a"),
        "a/concatenate": ("concatenate", None, None),
    }


def test_what_reads_a_stored_tensor_reads_it_rounded():
    def fn(params, x):
        y = x @ params["a"]  # of a residual block with its normalization first
        z = (2.0 * y + 1.0) @ params["b"]
        return y + z, y * 3.0

    assert found(fn) == {"a/add/0": ("add", 0, None), "b/add/1": ("add", 1, None)}

    def at_join(join, x):
        return jnp.round(x), x.sum()

    def plain(site, x, kernel, apply):
        return apply(x, kernel), None

    (total, threefold), records = core.at_sites(fn, plain, at_join)(PARAMS, X)
    y = jnp.round(X @ PARAMS["a"])
    np.testing.assert_array_equal(threefold, y * 3.0)
    z = (2.0 * y + 1.0) @ PARAMS["b"]
    np.testing.assert_array_equal(total, y + jnp.round(z))
    np.testing.assert_array_equal(records["a/add/0"], (X @ PARAMS["a"]).sum())


def test_a_mean_that_no_site_takes_is_stored():
    def fn(params, x):
        y = jax.nn.relu((x @ params["a"]).mean((1, 2)) - 0.5)
        return y @ params["b"]

    assert found(fn) == {"a/mean": ("mean", 0, None), "a/mean/result": ("mean", None, None)}
    halves = core.at_sites(
        lambda params, x: x.mean(1) + params["a"][0, 0],
        lambda site, x, kernel, apply: (apply(x, kernel), None),
        lambda join, x: (x if join.operand == 0 else jnp.round(x), None),
    )
    y, _ = halves({"a": jnp.ones((1, 1))}, jnp.array([[1.0, 2.5]]))
    np.testing.assert_array_equal(y, [3.0])


def test_pools():
    def fn(params, x):
        x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return (x @ params["a"]).mean((1, 2))

    assert found(fn) == {"input/mean": ("mean", 0, None), "a/mean": ("mean", 0, None)}


@pytest.mark.parametrize(
    "fn",
    [
        lambda params, x: (x @ params["a"]) * 2.0 + params["b"][0],
        lambda params, x: jax.nn.softmax(x @ params["a"]),
        lambda params, x: jax.nn.log_softmax(x @ params["a"]),
        lambda params, x: jnp.exp(x).sum(-1),
        lambda params, x: jnp.square(x) + 1.0,
        lambda params, x: jnp.concatenate([x, jnp.zeros_like(x)], -1),
        lambda params, x: jnp.concatenate([x, x @ params["a"]], 0),
        lambda params, x: x - x.mean((0, 1, 2)),
        lambda params, x: x / jnp.sqrt(x.reshape(-1, 4).var(0) + 1e-3),
        lambda params, x: x.reshape(5, -1).T @ x.reshape(5, -1),
    ],
)
def test_what_is_no_join(fn):
    def nothing_but(params, x):
        with jax.numpy_rank_promotion("allow"):
            return fn(params, x)

    assert found(nothing_but) == {}


def test_a_tensor_that_moved_is_that_of_the_site():
    def fn(params, x):
        x = jax.nn.relu(x @ params["a"])
        pooled = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        y = pooled @ params["b"]
        return y + x[:, ::2, ::2], pooled @ params["c"]

    graph = core.trace(fn, PARAMS, X)
    assert graph.first_takers == {"a": "a", "b": "b", "c": "b"}
    assert [join.site for join in graph.joins] == [None, "b"]


def test_in_loops_branches_and_functions_with_a_rule():
    @jax.custom_jvp
    def own(x):
        return x * jnp.tanh(x)

    own.defjvp(lambda primals, tangents: (own(*primals), tangents[0]))

    def fn(params, x):
        def body(x, _):
            return jax.jit(lambda y: y @ params["a"])(x) + x, None

        x, _ = lax.scan(body, own(x), length=2)
        return lax.cond(x.sum() > 0, lambda y: y + y @ params["b"], lambda y: y, x)

    names = found(fn)
    assert set(names) == {"a/add/0", "input/add/1", "a/add/0#2", "b/add/1"}
    seen = []

    def at_join(join, x):
        seen.append(join.name)
        return x, jnp.max(x)

    def plain(site, x, kernel, apply):
        return apply(x, kernel), None

    got, records = jax.jit(core.at_sites(fn, plain, at_join))(PARAMS, X)
    np.testing.assert_array_equal(got, jax.jit(fn)(PARAMS, X))
    assert set(seen) == set(records) == set(names)
    assert records["a/add/0"].shape == (2,)


@pytest.mark.parametrize("name", models.names())
def test_training_and_evaluation_have_the_same(name, small_model):
    fn, train, variables, x = small_model(name)
    evaluated, trained = core.trace(fn, variables, x), core.trace(train, variables, x)
    assert evaluated.joins == trained.joins
    assert evaluated.first_takers == trained.first_takers
    # Two operands for each sum, and the mean before the head; VGG flattens.
    kinds = [join.kind for join in evaluated.joins]
    assert kinds.count("add") % 2 == 0
    assert ("mean" in kinds) == (name != "vgg16_bn")
    assert ("concatenate" in kinds) == name.startswith("densenet")


def test_a_key_or_a_scalar_beside_the_input_has_no_examples():
    def fn(params, x, key, scale):
        noise = jax.random.normal(key, x.shape)
        return (x + noise) * scale @ params["a"]

    assert found(fn, X, jax.random.key(0), jnp.float32(2)) == {}


def test_what_is_done_at_a_join():
    # [1, 2] @ I·2 = [2, 4]; its sum with [1, 2], each operand doubled: [6, 12].
    def fn(params, x):
        return x @ params["w"] + x

    params, x = {"w": 2.0 * jnp.eye(2)}, jnp.array([[1.0, 2.0]])
    double = core.at_sites(
        fn, lambda site, x, kernel, apply: (apply(x, kernel), None), lambda join, x: (2 * x, None)
    )
    np.testing.assert_array_equal(double(params, x)[0], [[6, 12]])

    def joined(params, x):
        return jnp.concatenate([x, x @ params["w"]], -1)

    double = core.at_sites(
        joined, lambda site, x, k, apply: (apply(x, k), None), lambda join, x: (2 * x, None)
    )
    np.testing.assert_array_equal(double(params, x)[0], [[4, 8, 4, 8]])


@pytest.mark.parametrize(
    "noise",
    [
        lambda bits, x: jnp.where(bits > 0, x / 0.5, 0.0),  # dropout as Flax and Equinox have it
        lambda bits, x: bits * x / 0.5,  # as Haiku has it
        lambda bits, x: x / 0.5 * bits,
        lambda bits, x: x * bits[:, :1] * 2.0,  # of whole rows, as in stochastic depth
        lambda bits, x: x * (1.0 + bits),
        lambda bits, x: x + bits,
    ],
)
def test_training_with_noise_has_the_joins_of_evaluation(noise):
    def fn(params, x, key=None):
        def disturbed(x):
            if key is None:
                return x
            return noise(jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype), x)

        x = disturbed(jax.nn.relu(x @ params["a"]))
        x = x + disturbed(x @ params["b"])
        features = disturbed(x.mean((1, 2)))
        return disturbed(jax.nn.softmax(features @ params["c"])) * features

    evaluated, trained = (core.trace(fn, PARAMS, X, *key) for key in ((), (jax.random.key(0),)))
    assert evaluated.joins
    assert trained.joins == evaluated.joins
    assert trained.first_takers == evaluated.first_takers


def test_what_else_reads_a_tensor_that_is_scaled_for_dropout_reads_it_rounded():
    def fn(params, x, key):
        y = x @ params["a"]
        half = y * 0.5
        dropped = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), half, 0.0)
        return y + x @ params["b"], dropped, jnp.tanh(half)

    outputs, _ = core.at_sites(
        fn, lambda site, x, kernel, apply: (apply(x, kernel), None), lambda join, x: (0.0 * x, None)
    )(PARAMS, X, jax.random.key(0))
    np.testing.assert_array_equal(outputs[2], jnp.zeros_like(X))

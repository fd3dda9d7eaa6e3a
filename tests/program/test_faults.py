"""What once answered wrongly without a word: each by hand, in floats and in integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

from hybrid_jax import core, quantization
from hybrid_jax import program as p

EYE = jnp.eye(4)


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"):
        yield


def integers(fn, params, x, of_sites=False, **options):
    """With ranges of edges, or with those that the function's sites have."""
    spec = quantization.spec(core.trace(fn, params, x), **options)
    planned = quantization.plan(p.lower(fn, params, x), spec)
    if of_sites:
        ranges = quantization.calibrate(fn, params, [(x,)], spec)
        ranges = quantization.edge_ranges(planned, ranges, x)
    else:
        ranges = quantization.calibrate_edges(planned, [(x,)])
    return quantization.encode(planned, ranges, x)


both = pytest.mark.parametrize("of_sites", [False, True])


@both
def test_halves_that_meet_again_are_not_stored_as_one_of_them(of_sites):
    def fn(params, x):
        y = nn.relu(x @ params["a"])
        return jnp.concatenate([y[..., :2] @ params["b"], y[..., 2:]], -1) @ params["c"]

    params, x = {"a": EYE, "b": -jnp.eye(2), "c": EYE}, jnp.float32([[1, 2, 1.5, 0.5]])
    made = p.run(integers(fn, params, x, of_sites))(x)
    # 8 bits from −2 to 1.5 are steps of 0.014.
    np.testing.assert_allclose(made, [[-1, -2, 1.5, 0.5]], atol=0.02)


@both
def test_a_part_has_not_the_range_of_another_part(of_sites):
    def fn(params, x):
        y = nn.relu(x @ params["a"])
        return y[:, :2] @ params["b"] + y[:, 2:] @ params["c"]

    params, x = {"a": EYE, "b": jnp.eye(2), "c": jnp.eye(2)}, jnp.float32([[1, 2, 3, 40]])
    made = p.run(integers(fn, params, x, of_sites))(x)
    np.testing.assert_allclose(made, [[4, 42]], atol=0.2)  # steps of 40 / 255


@both
def test_what_is_read_before_and_after_a_bound_has_both_ranges(of_sites):
    def fn(params, x):
        y = x @ params["a"]
        return (y + nn.relu(y) @ params["b"]) @ params["c"]

    params = {name: EYE for name in "abc"}
    x = jnp.float32([[-4, 1, -2, 3]])
    # y + relu(y): −4, 2, −2, 6.
    made = p.run(integers(fn, params, x, of_sites))(x)
    np.testing.assert_allclose(made, [[-4, 2, -2, 6]], atol=0.06)


@both
def test_boxes_and_scores_keep_their_own_steps(of_sites):
    def fn(params, x):
        return jnp.concatenate([nn.sigmoid(x @ params["box"]) * 640.0, nn.sigmoid(x)], -1)

    x = jnp.float32([[0.0, -1.0986123]])  # a sigmoid of 1/2 and 1/4
    made = p.run(integers(fn, {"box": jnp.eye(2)}, x, of_sites))(x)
    np.testing.assert_allclose(made, [[320, 160, 0.5, 0.25]], rtol=0.02)


@both
@pytest.mark.parametrize("gamma", [None, [1.0, 1.0], [1.0, 0.0]])
def test_a_dead_channel_keeps_its_bias(gamma, of_sites):
    # Its filter is zero, with raw pixels as the input and after a BatchNorm of variance 0 alike.
    def fn(params, x):
        y = x @ params["w"]
        if gamma is not None:
            y = y * params["gamma"] / jnp.sqrt(params["var"] + 1e-5)
        return nn.relu(y + params["beta"]) @ params["o"]

    params = {"w": jnp.float32([[1, 0], [1, 0]]), "beta": jnp.float32([0, 0.4]), "o": jnp.eye(2)}
    if gamma is not None:
        params |= {"var": jnp.float32([1, 0]), "gamma": jnp.float32(gamma)}
    x = (255 if gamma is None else 1) * jnp.float32([[0.5, 0.25], [1, 1]])
    rules = [("o", {"activation": 32, "weight": 32})]
    made = p.run(integers(fn, params, x, of_sites, rules=rules))(x)
    np.testing.assert_allclose(made[:, 1], 0.4, rtol=1e-5)


@both
def test_what_a_pool_leaves_has_not_the_range_of_what_it_takes(of_sites):
    def fn(params, x):
        y = x @ params["a"]
        top = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
        return (top @ params["b"]).mean((1, 2)) + (y * params["scale"]).mean((1, 2))

    params = {"a": jnp.eye(2), "b": jnp.eye(2), "scale": jnp.float32([1, -1])}
    x = jnp.float32([[[[-8, 1], [2, 1]], [[1, -6], [1, 3]]]])
    # Maxima 2 and 3; means −1 and −1/4.
    made = p.run(integers(fn, params, x, of_sites))(x)
    np.testing.assert_allclose(made, [[1, 3.25]], atol=0.1)


@both
def test_what_leaves_as_it_is_has_not_the_range_of_a_part(of_sites):
    def fn(params, x):
        y = x @ params["a"]
        return jnp.concatenate([y[:, :1] @ params["b"], y], -1)

    params, x = {"a": jnp.eye(2), "b": jnp.ones((1, 1))}, jnp.float32([[1, 100], [2, -50]])
    made = p.run(integers(fn, params, x, of_sites))(x)
    np.testing.assert_allclose(made, [[1, 1, 100], [2, 2, -50]], atol=0.6)


def test_a_sum_broadcasts_in_its_own_shape():
    def fn(params, x):
        y = x @ params["a"]
        return (y + y.mean((1, 2), keepdims=True) @ params["b"]) @ params["c"]

    params = {name: jnp.eye(2) for name in "abc"}
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    made = p.run(integers(fn, params, x))(x)
    # The means are 3 and 4.
    np.testing.assert_allclose(made, x + jnp.float32([3, 4]), atol=0.06)


def test_a_gate_gates_every_image():
    def fn(params, x):
        return x * nn.sigmoid(x.mean((1, 2)) @ params)[:, None, None, :]

    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4, 3, 2)), jnp.float32)
    made = p.run(p.lower(fn, jnp.eye(2), x[:1]))(x)
    np.testing.assert_allclose(made, fn(jnp.eye(2), x), rtol=1e-5)


def test_one_value_times_a_vector():
    params = {"a": jnp.ones((2, 1)), "v": jnp.float32([1, 2, 3])}
    made = p.run(p.lower(lambda p, x: (x @ p["a"]) * p["v"], params, jnp.ones((1, 2))))
    np.testing.assert_allclose(made(jnp.float32([[1, 2], [3, 5]])), [[3, 6, 9], [8, 16, 24]])


PARTS = {
    "a softmax": lambda z: z,
    "a temperature": lambda z: z / 4.0,
    "a bound": lambda z: jnp.maximum(z, -1.0),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_softmax_is_recognized_whole_or_not_at_all(name):
    def fn(params, x):
        z = x * params
        e = jnp.exp(PARTS[name](z - z.max(-1, keepdims=True)))
        return e / e.sum(-1, keepdims=True)

    params, x = jnp.float32([1, 1, 1]), jnp.float32([[2, 0, -1]])
    program = p.lower(fn, params, x)
    np.testing.assert_allclose(p.run(program)(x), fn(params, x), rtol=1e-5)
    kinds = [type(op) for op in program.operations]
    assert (p.Softmax in kinds) == (name == "a softmax")


@pytest.mark.parametrize(
    "fn",
    [
        lambda e: e * jnp.float32([1, 0, 1]) / (e * jnp.float32([1, 0, 1])).sum(-1, keepdims=True),
        lambda e: e / (1 + e.sum(-1, keepdims=True)),
        lambda e: e / e.sum(-1, keepdims=True).max(1, keepdims=True),
    ],
)
def test_parts_of_a_softmax_stay_parts(fn):
    def whole(params, x):
        return fn(jnp.exp(x - x.max(-1, keepdims=True)))

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3)), jnp.float32)
    program = p.lower(whole, jnp.ones(1), x)
    np.testing.assert_allclose(p.run(program)(x), whole(None, x), rtol=1e-5)


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2)])
def test_a_variance_along_other_axes_is_no_normalization(axes):
    def fn(params, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(x.var(axes, keepdims=True) + 0.1)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3)), jnp.float32)
    program = p.lower(fn, jnp.ones(1), x)
    np.testing.assert_allclose(p.run(program)(x), fn(None, x), rtol=1e-4, atol=1e-5)
    assert (p.Normalize in map(type, program.operations)) == (axes == (2,))


def test_a_conversion_to_integers_truncates():
    def fn(params, x):
        return jnp.clip(x * params, 0, 255).astype(jnp.uint8)

    x = jnp.float32([[0.9, 1.9, -0.6, 300.0]])
    made = p.run(p.lower(fn, jnp.float32(1), x))(x)
    assert made.dtype == jnp.uint8
    assert made.tolist() == [[0, 1, 0, 255]]


def test_images_of_bytes_have_a_border_of_what_becomes_zero():
    def fn(params, x):
        y = (x.astype(jnp.float32) / 255.0 - params["mean"]) / params["std"]
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(y, params["k"], (1, 1), "SAME", dimension_numbers=numbers)

    mean, std = jnp.float32([0.2, 0.6]), jnp.float32([0.5, 0.25])
    params = {"k": jnp.ones((3, 3, 2, 1))}
    fixed = lambda params, x: fn(params | {"mean": mean, "std": std}, x)  # noqa: E731
    # 51 is the mean of the one channel, 153 of the other: pixels of them are zeros.
    x = jnp.tile(jnp.uint8([51, 153]), (2, 4, 4, 1)).at[:, 0, 0].set(jnp.uint8([102, 153]))
    program = p.lower(fixed, params, x)
    assert program.tensors["x"].dtype == "uint8"
    assert sum(isinstance(op, p.Conv) for op in program.operations) == 1
    expected = np.zeros((4, 4))
    expected[:2, :2] = 0.4  # (102 − 51) / 255 / 0.5
    np.testing.assert_allclose(p.run(program)(x)[0, ..., 0], expected, atol=1e-5)
    made = integers(fixed, params, x)
    assert made.encoding(made.operations[0].output) == p.Encoding(1.0)
    np.testing.assert_allclose(p.run(made)(x)[0, ..., 0], expected, atol=0.02)
    with pytest.raises(ValueError, match="x must be of dtype uint8, got float32"):
        p.run(made)(x.astype(jnp.float32))


def test_a_kernel_of_the_program_is_a_kernel():
    blur = jnp.tile(jnp.float32([[[[1]], [[2]], [[1]]]]) / 4, (1, 1, 1, 2))
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(params, x):
        y = lax.conv_general_dilated(
            x, blur, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )
        return y.mean((1, 2)) @ params

    x = jnp.arange(6.0).reshape(1, 1, 3, 2)  # (0 + 2 · 2 + 4) / 4 and (1 + 2 · 3 + 5) / 4
    np.testing.assert_allclose(p.run(p.lower(fn, jnp.eye(2), x))(x), [[2, 3]])
    np.testing.assert_allclose(p.run(integers(fn, jnp.eye(2), x))(x), [[2, 3]], atol=0.02)


def test_a_difference_is_named_where_it_begins(monkeypatch):
    # As if a mean were one of other axes.
    mean = p.Mean.floats
    monkeypatch.setattr(p.Mean, "floats", lambda op, x: 1.01 * mean(op, x))

    def fn(params, x):
        return nn.relu(x @ params["a"]).mean((1, 2)) @ params["b"]

    with pytest.raises(ValueError, match="got another result where the graph has 'mean'"):
        p.lower(fn, {"a": EYE, "b": EYE}, jnp.ones((1, 3, 3, 4)))
    program = p.lower(fn, {"a": EYE, "b": EYE}, jnp.ones((1, 3, 3, 4)), check=False)
    assert len(program.operations) == 3

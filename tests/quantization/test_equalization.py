import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import core
from hybrid_jax import quantization as q

X = jax.random.normal(jax.random.key(9), (6, 8, 8, 2))


def conv(x, kernel, groups=1):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 4, 4, 1), (1, 4, 4, 1), "VALID")


def through(between):
    """Convolution, depthwise and grouped convolution, flattened to dense, badly scaled."""

    def fn(p, x):
        x = between(conv(x, p["a"]) + p["bias"])
        x = between(conv(x, p["b"], groups=4))
        x = pool(between(conv(x, p["c"], groups=2)))
        return x.reshape(len(x), -1) @ p["d"]

    return fn


def parameters():
    shapes = {"a": (3, 3, 2, 4), "b": (3, 3, 1, 4), "c": (1, 1, 2, 4), "d": (16, 3)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    kernels = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
    uneven = jnp.array([[[[0.01, 1.0, 30.0, 4.0]]]])
    scaled = {name: kernels[name] * uneven for name in "ab"}
    return kernels | scaled | {"bias": jnp.full((1, 1, 1, 4), 0.1)}


def equalized(fn, params, x=X):
    folded_fn, refold = core.fold(fn, params, x)
    folded = refold(params)
    new, left_out = q.equalize(folded_fn, folded, x)
    before, after = jax.jit(folded_fn)(folded, x), jax.jit(folded_fn)(new, x)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * float(jnp.abs(before).max()))
    return folded, new, left_out


def reach(kernel, axis):
    return np.abs(np.moveaxis(kernel, axis, 0)).reshape(kernel.shape[axis], -1).max(1)


def test_channels_come_to_have_the_ranges_of_those_that_read_them():
    _, new, left_out = equalized(through(jax.nn.relu), parameters())
    assert left_out == {"d": "makes an output of the function"}
    # Of a grouped convolution the same channel of every group is one unit, in and out: channels 0
    # and 2, 1 and 3 have one scale, from the first layer to the last.
    made, kept, out = (reach(new[name], 3).reshape(2, 2).max(0) for name in "abc")
    np.testing.assert_allclose(made, kept, rtol=1e-3)
    np.testing.assert_allclose(kept, reach(new["c"], 2), rtol=1e-3)
    # The dense layer reads four positions of each channel.
    read = reach(new["d"].reshape(4, 2, 2, 3), 2)
    np.testing.assert_allclose(out, read, rtol=1e-3)


def test_what_is_not_homogeneous_is_left_out():
    for between in (jax.nn.relu6, jax.nn.silu):
        folded, new, left_out = equalized(through(between), parameters())
        reason = "is not followed by positively homogeneous operations alone"
        assert {left_out[name] for name in "abc"} == {reason}
        jax.tree.map(np.testing.assert_array_equal, new, folded)


def test_a_sum_with_what_is_not_scaled_is_left_out():
    def fn(p, x):
        x = jax.nn.relu(conv(x, p["a"]) + p["bias"])
        x = x + conv(jax.nn.relu(conv(x, p["inner"])), p["b"])
        return x.mean((1, 2)) @ p["d"]

    params = parameters() | {
        "b": jnp.ones((1, 1, 5, 4)),
        "inner": jax.random.normal(jax.random.key(3), (1, 1, 4, 5)),
        "d": jnp.ones((4, 3)),
    }
    _, _, left_out = equalized(fn, params)
    assert set(left_out) == {"a", "b", "d"}  # and `inner` is scaled


def test_a_dead_channel_stays():
    params = parameters()
    params["a"] = params["a"].at[..., 1].set(0.0)
    _, new, _ = equalized(through(jax.nn.relu), params)
    core.check_finite("new", new)
    np.testing.assert_array_equal(new["a"][..., 1], 0.0)


def test_digits_with_badly_scaled_channels_quantize_better(digits):
    """Each channel of `expand` times a factor, which its reader undoes: ReLU lets it through."""
    fn, refold = core.fold(digits.fn, digits.params, digits.images[:1])
    params, images = refold(digits.params), digits.held_out_images
    uneven = 2.0 ** jnp.arange(-6.0, 6.0).reshape(1, 1, 1, 12)
    expand, project = "params/expand/kernel", "params/project/kernel"
    bad = params | {
        expand: params[expand] * uneven,
        f"{expand}/bias": params[f"{expand}/bias"] * uneven.reshape(12),
        project: params[project] / uneven.reshape(1, 1, 12, 1),
    }
    good, left_out = q.equalize(fn, bad, digits.images[:64])
    assert expand not in left_out
    run = jax.jit(fn)
    expected = run(params, images)
    np.testing.assert_allclose(run(good, images), expected, rtol=1e-4, atol=1e-4)
    spec = q.spec(
        core.trace(fn, params, images[:1]),
        [(".*", {"weight": q.Quantizer(8), "activation": q.Quantizer(8, "affine")})],
    )
    q_fn = jax.jit(q.fake_quantized(fn, spec))

    def error(params):
        ranges = q.calibrate(fn, params, [(digits.images[:256],)], spec)
        return float(jnp.mean((q_fn(params, ranges, images) - expected) ** 2))

    assert error(good) < 0.1 * error(bad)


def test_bad_arguments():
    fn, params = through(jax.nn.relu), parameters()
    with pytest.raises(ValueError, match="params must have folded biases, as"):
        q.equalize(fn, params, X)
    folded_fn, refold = core.fold(fn, params, X)
    with pytest.raises(ValueError, match="outputs of fn on inputs must be finite"):
        q.equalize(folded_fn, refold(params), X.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1, got 0"):
        q.equalize(folded_fn, refold(params), X, iterations=0)

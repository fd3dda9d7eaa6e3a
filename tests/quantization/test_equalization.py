import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, PARAMS
from hypothesis import given, settings
from jax import lax
from networks import networks

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax import quantization as q

X = jax.random.normal(jax.random.key(9), (6, 8, 8, 2))
HOMOGENEOUS = "is not followed by positively homogeneous operations alone"


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


def equalized(fn, params, x=X, batch=6, check=True):
    """The program before and after, of which the outputs are the same; and what is left out."""
    program = p.lower(fn, params, x[:2], check=check)
    new, left_out = q.equalize(program, x)
    for before, after in zip(*(jax.tree.leaves(p.run(it)(x[:batch])) for it in (program, new))):
        largest = float(jnp.abs(before).max())
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * largest)
    return program, new, left_out


def reach(kernel, axis):
    return np.abs(np.moveaxis(kernel, axis, 0)).reshape(kernel.shape[axis], -1).max(1)


def test_channels_come_to_have_the_ranges_of_those_that_read_them():
    _, new, left_out = equalized(through(jax.nn.relu), parameters())
    assert left_out == {"d": "makes an output of the function"}
    kernels = {name: new.params[name]["kernel"] for name in "abcd"}
    # Of a grouped convolution the same channel of every group is one unit, in and out: channels 0
    # and 2, 1 and 3 have one scale, from the first layer to the last.
    made, kept, out = (reach(kernels[name], 3).reshape(2, 2).max(0) for name in "abc")
    np.testing.assert_allclose(made, kept, rtol=1e-3)
    np.testing.assert_allclose(kept, reach(kernels["c"], 2), rtol=1e-3)
    # The dense layer reads four positions of each channel.
    read = reach(kernels["d"].reshape(4, 2, 2, 3), 2)
    np.testing.assert_allclose(out, read, rtol=1e-3)


def test_what_is_not_homogeneous_is_left_out():
    for between in (jax.nn.relu6, jax.nn.silu):
        program, new, left_out = equalized(through(between), parameters())
        assert {left_out[name] for name in "abc"} == {HOMOGENEOUS}
        chex.assert_trees_all_equal(new.params, program.params)


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


def test_an_output_beside_larger_ones_is_looked_at_by_itself():
    def fn(p, x):
        y = jax.nn.relu(x @ p["a"])
        return (y @ p["b"]) * 1e6, jnp.tanh(y) @ p["c"]

    params = {name: jax.random.normal(jax.random.key(i), (3, 3)) for i, name in enumerate("abc")}
    _, _, left_out = equalized(fn, params, jax.random.normal(jax.random.key(3), (6, 3)))
    assert left_out["a"] == HOMOGENEOUS


def test_a_dead_channel_stays():
    params = parameters()
    params["a"] = params["a"].at[..., 1].set(0.0)
    _, new, _ = equalized(through(jax.nn.relu), params)
    core.check_finite("new", new.params)
    np.testing.assert_array_equal(new.params["a"]["kernel"][..., 1], 0.0)


def test_a_program_without_kernels_stays():
    program = p.lower(lambda params, x: jax.nn.relu(x), {}, X)
    assert q.equalize(program, X) == (program, {})


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_between_layers_stays_what_it_is(name):
    random = np.random.default_rng(3)
    first = jnp.asarray(random.standard_normal((4, 4)) * [0.01, 1, 30, 4], jnp.float32)
    x = jnp.asarray(random.standard_normal((3, 6, 6, 4)), jnp.float32)

    def fn(params, x):
        return BLOCKS[name](params, jax.nn.relu(x @ params["first"]))

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        equalized(fn, PARAMS | {"first": first}, x, 3, check=False)


@settings(max_examples=5)
@given(networks())
def test_a_drawn_network_stays_what_it_is(network):
    with jax.numpy_rank_promotion("allow"):
        equalized(network.fn, network.params, network.images(3), 3, check=False)


def test_ranges_of_sites_hold_for_the_scaled_kernels():
    """A kernel has its site's range times its scales; a scaled edge has one of its own."""
    fn, params = through(jax.nn.relu), parameters()
    program, new, _ = equalized(fn, params)
    spec = q.spec(core.trace(fn, params, X))
    sites = q.calibrate(fn, params, [(X,)], spec)
    before, after = q.plan(program, spec), q.plan(new, spec)
    assert {slot.site for slot in before.stored.values()} == set("abcd")
    assert {slot.site for slot in after.stored.values()} == {"a", None}
    found, expected = q.edge_ranges(after, sites, X), q.calibrate_edges(after, [(X,)])
    for name in "abcd":
        assert np.any(new.params[name]["kernel"] != program.params[name]["kernel"])
        span, wanted = (np.abs(own[name]["weight"]).max(0) for own in (found, expected))
        np.testing.assert_allclose(span, wanted, rtol=1e-5)
    errors = []
    for made in (after, before):
        spans = q.edge_ranges(made, sites, X)
        y = q.as_deployed(made)(made.program.params, spans, X)
        errors.append(float(jnp.abs(y - fn(params, X)).max()))
    assert errors[0] < errors[1]


def test_a_range_that_was_learned_is_scaled_with_the_kernel():
    # a = (1, 16) becomes (2, 4): scales 2 and 1/4. Its learned ends of 0.5 and 4 become 1 and 1.
    params = {"a": jnp.array([[1.0, 16.0]]), "c": jnp.array([[4.0], [1.0]])}
    x = jnp.array([[1.0], [-3.0]])

    def fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["c"]

    _, new, _ = equalized(fn, params, x, 2)
    spec = q.spec(core.trace(fn, params, x))
    sites = q.calibrate(fn, params, [(x,)], spec)
    ends = jnp.array([[0.5, 4.0]])
    sites["a"]["weight"] = q.Range(-ends, ends)
    found = q.edge_ranges(q.plan(new, spec), sites, x)
    np.testing.assert_allclose(found["a"]["weight"].high, [[1.0, 1.0]])


def test_digits_with_badly_scaled_channels_quantize_better(digits):
    """Each channel of `expand` times a factor, which its reader undoes: ReLU lets it through."""
    images, held_out = digits.images[:256], digits.held_out_images
    program = p.lower(digits.fn, digits.params, images[:2])
    uneven = np.float32(2) ** np.arange(-6, 6, dtype=np.float32)
    expand, project = (f"params/{name}/kernel" for name in ("expand", "project"))
    (first,) = (name for name, source in program.sources.items() if source.site == expand)
    (second,) = (name for name, source in program.sources.items() if source.site == project)
    params = {name: dict(own) for name, own in program.params.items()}
    params[first] = {name: leaf * uneven for name, leaf in params[first].items()}
    params[second]["kernel"] = params[second]["kernel"] / uneven[:, None]
    bad = program.replace(params)
    good, left_out = q.equalize(bad, images[:64])
    assert first not in left_out
    expected = p.run(program)(held_out)
    np.testing.assert_allclose(p.run(good)(held_out), expected, rtol=1e-4, atol=1e-4)
    rules = [(".*", {"weight": q.Quantizer(8), "activation": q.Quantizer(8, "affine")})]
    spec = q.spec(core.trace(digits.fn, digits.params, images), rules)

    def error(program):
        planned = q.plan(program, spec)
        ranges = q.calibrate_edges(planned, [(images,)])
        y = jax.jit(q.as_deployed(planned))(program.params, ranges, held_out)
        return float(jnp.mean((y - expected) ** 2))

    assert error(good) < 0.1 * error(bad)


def test_bad_arguments():
    program = p.lower(through(jax.nn.relu), parameters(), X)
    with pytest.raises(ValueError, match="outputs of program on inputs must be finite"):
        q.equalize(program, X.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1, got 0"):
        q.equalize(program, X, iterations=0)
    with pytest.raises(ValueError, match="inputs must be 1 arrays, got 0"):
        q.equalize(program)

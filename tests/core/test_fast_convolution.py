import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from hybrid_jax import core
from hybrid_jax.core import convolution, fast_convolution

LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CWNH", "WIOH", "HNCW")]
OPTIONS = {
    "same": dict(window_strides=(1, 1), padding="SAME"),
    "strided": dict(window_strides=(2, 3), padding=[(1, 2), (0, -1)], rhs_dilation=(1, 2)),
    "transposed": dict(window_strides=(1, 2), padding=[(3, 0), (1, 1)], lhs_dilation=(2, 3)),
}
GROUPS = {"whole": (1, 3, 4), "two groups": (2, 4, 6), "depthwise": (4, 4, 4)}


class Told(core.Choices):
    """Takes the form of this place; keeps what was asked."""

    def __init__(self, place):
        super().__init__()
        self.place, self.asked = place, []

    def choose(self, question, forms, *args):
        for form in forms.values():
            jax.eval_shape(form, *args)
        self.asked.append((question, list(forms)))
        return list(forms)[self.place % len(forms)]


@pytest.fixture
def every_size_is_measured(monkeypatch):
    monkeypatch.setattr(fast_convolution, "_WORTH_MEASURING", 0)


def drawn(sizes, axes, seed):
    shape = [sizes[axis] for axis in axes]
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), got, want)


def weighted(fn):
    return jax.grad(lambda kernel, x: jnp.sin(fn(kernel, x)).sum(), (0, 1))


@pytest.mark.usefixtures("every_size_is_measured")
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("layout", "options"), list(zip(LAYOUTS, OPTIONS.values())), ids=OPTIONS)
def test_every_form_of_result_and_gradients(layout, options, groups):
    """Alone and in a loop, by itself and for each of two kernels."""
    count, inputs, outputs = groups
    x = drawn({"N": 2, "C": inputs, "H": 7, "W": 9}, layout[0], 0)
    kernel = drawn({"I": inputs // count, "O": outputs, "H": 3, "W": 2}, layout[1], 1)

    def fn(kernel, x):
        return lax.conv_general_dilated(
            x, kernel, dimension_numbers=layout, feature_group_count=count, **options
        )

    both = jax.vmap(weighted(fn), (0, None))
    kernels = jnp.stack([kernel, 2 * kernel])
    cases = [(weighted(fn), kernel), (both, kernels)]
    for (case, weights), loop in itertools.product(cases, (False, True)):
        want = jax.jit(case)(weights, x)
        for place in range(4):
            choices = Told(place)
            got = jax.jit(core.fast_convolutions(case, loop=loop, choices=choices))(weights, x)
            assert_close(got, want)
            if place >= max((len(forms) for _, forms in choices.asked), default=0) - 1:
                break


@settings(max_examples=10)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3)),
    taps=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_windows_of_any_size(sizes, taps, stride, dilation, padding):
    """In one dimension, against JAX, in a loop, where no form is XLA's own."""
    batch, length, channels = sizes
    if length + sum(padding) < (taps - 1) * dilation + 1:
        return
    x = drawn({"N": batch, "W": length, "C": channels}, "NWC", 0)
    kernel = drawn({"W": taps, "I": channels, "O": 2}, "WIO", 1)

    def fn(kernel, x):
        return lax.conv_general_dilated(
            x, kernel, (stride,), [padding], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    fast = core.fast_convolutions(weighted(fn), loop=True)
    assert_close(fast(kernel, x), weighted(fn)(kernel, x))


@settings(max_examples=10)
@given(
    length=st.integers(1, 12),
    taps=st.integers(1, 5),
    outputs=st.sampled_from((3, 8, 16)),
    stride=st.integers(1, 2),
    padding=st.tuples(st.integers(-1, 3), st.integers(-1, 3)),
)
def test_neighbours_as_outputs_of_one_place(length, taps, outputs, stride, padding):
    if length + sum(padding) < taps:
        return
    x, kernel = drawn((2, 3, length, 2), range(4), 0), drawn((2, taps, 2, outputs), range(4), 1)
    conv = convolution.Conv((1, stride), ((1, 0), padding), (1, 1), (1, 1))
    assert_close(convolution.together(conv, x, kernel), convolution.channels_last(conv, x, kernel))


def test_how_many_neighbours():
    conv = convolution.Conv((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    assert convolution.neighbours(conv, (3, 3, 16, 8), (32, 32)) == 4
    assert convolution.neighbours(conv, (3, 3, 16, 12), (32, 32)) == 2
    assert convolution.neighbours(conv, (3, 3, 16, 16), (7, 7)) == 1
    assert convolution.neighbours(conv, (3, 3, 16, 64), (32, 32)) == 1
    # A window of one entry sees nothing that its neighbour sees.
    assert convolution.neighbours(conv, (1, 1, 16, 8), (32, 32)) == 2
    assert convolution.neighbours(conv._replace(strides=(2, 2)), (3, 3, 8, 8), (16, 16)) == 2
    assert convolution.neighbours(conv._replace(groups=2), (3, 3, 8, 8), (16, 16)) == 1
    assert convolution.neighbours(conv._replace(dilation=(1, 2)), (3, 3, 8, 8), (16, 16)) == 1


def test_images_are_taken_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(core.convolution, "_PATCHES", 3 * 3 * 8 * 8 * 2 * 2)
    x, kernel = drawn({"N": 6, "H": 8, "C": 2}, "NHHC", 0), drawn({"H": 3, "C": 2}, "HHCC", 1)

    def fn(kernel, x):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    fast = core.fast_convolutions(weighted(fn), loop=True)
    assert "scan[" in str(jax.make_jaxpr(fast)(kernel, x))
    assert_close(fast(kernel, x), weighted(fn)(kernel, x))


def test_loops_inside_are_seen():
    """A gradient inside of a scan is a matrix product there, and outside XLA's own."""
    x, kernel = jnp.ones((2, 8, 3)), jnp.ones((3, 3, 3))

    def conv(kernel, x):
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def steps(kernel, x):
        def step(kernel, _):
            return kernel - 0.1 * jax.grad(lambda k: conv(k, x).sum())(kernel), None

        return lax.scan(step, kernel, length=2)[0]

    text = str(jax.make_jaxpr(core.fast_convolutions(steps))(kernel, x))
    assert "dot_general" in text
    assert "dot_general" not in str(jax.make_jaxpr(core.fast_convolutions(conv))(kernel, x))
    assert_close(jax.jit(core.fast_convolutions(steps))(kernel, x), jax.jit(steps)(kernel, x))


def test_same_shapes_are_one_question(every_size_is_measured):
    choices, x = Told(0), jnp.ones((1, 5, 4))

    def fn(kernels, x):
        for kernel in kernels:
            x = nn.relu(lax.conv(x, kernel, (1,), "SAME"))
        return x

    kernels = [jnp.ones((5, 5, 3)), jnp.ones((5, 5, 3)), jnp.ones((5, 5, 1))]
    core.fast_convolutions(fn, choices=choices)(kernels, x)
    assert len({question for question, _ in choices.asked}) == 2


class Net(nn.Module):
    """Depthwise, strided, grouped, transposed and dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (1, 1))(x)))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4)(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2)(x))
        x = nn.relu(nn.ConvTranspose(3, (2, 2), strides=(2, 2))(x))
        return nn.Dense(2)(x.mean((1, 2)))


def test_the_gradient_of_a_network():
    images = drawn({"N": 3, "H": 12, "C": 3}, "NHHC", 0)
    variables = jax.jit(Net().init)(jax.random.key(0, impl="rbg"), images)

    def loss(params, images):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, _ = Net().apply(given, images, mutable=["batch_stats"])
        return jnp.square(logits).mean()

    args = variables["params"], images
    fast = core.fast_convolutions(jax.grad(loss), loop=True)
    assert_close(jax.jit(fast)(*args), jax.jit(jax.grad(loss))(*args))


def test_derivatives_of_what_is_fast_and_checkpoints():
    x, kernel = drawn({"N": 2, "C": 2, "W": 5}, "NCW", 0), drawn({"O": 2, "W": 3}, "OOW", 1)

    @jax.checkpoint
    def fn(kernel, x):
        return lax.conv(x, kernel, (1,), "SAME")

    want = weighted(fn)(kernel, x)
    fast = core.fast_convolutions(fn)
    assert_close(weighted(fast)(kernel, x), want)
    assert_close(core.fast_convolutions(weighted(fast))(kernel, x), want)
    tangent = jax.jvp(fast, (kernel, x), (kernel, x))[1]
    assert_close(tangent, 2 * fn(kernel, x))


def test_a_derivative_rule_is_not_looked_at_unless_somebody_differentiates():

    @jax.custom_jvp
    def fn(kernel, x):
        return lax.conv(x, kernel, (1,), "SAME")

    @fn.defjvp
    def rule(primals, tangents):
        raise AssertionError

    x, kernel = drawn({"N": 2, "C": 2, "W": 5}, "NCW", 0), drawn({"O": 2, "W": 3}, "OOW", 1)
    np.testing.assert_allclose(core.fast_convolutions(fn)(kernel, x), fn(kernel, x), atol=1e-5)


def test_inside_shard_map():
    """Each device's images, by a kernel that all of them have."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x, kernel = drawn({"N": 4, "C": 2, "W": 5}, "NCW", 0), drawn({"O": 2, "W": 3}, "OOW", 1)
    gradient = jax.grad(lambda kernel, x: jnp.square(lax.conv(x, kernel, (1,), "SAME")).sum())

    def sharded(fn):
        specs = dict(in_specs=(spec(), spec("data")), out_specs=spec())
        return jax.jit(jax.shard_map(fn, mesh=mesh, **specs))

    fast = core.fast_convolutions(gradient, loop=True)
    assert_close(sharded(fast)(kernel, x), sharded(gradient)(kernel, x))


def test_what_is_left_as_it_is(monkeypatch):
    kernel, x = jnp.ones((2, 2, 3), jnp.int8), jnp.ones((1, 2, 5), jnp.int8)

    def fn(kernel, x):
        return lax.conv_general_dilated(x, kernel, (1,), "SAME", preferred_element_type=jnp.int32)

    fast = core.fast_convolutions(fn, loop=True)
    assert str(jax.make_jaxpr(fast)(kernel, x)) == str(jax.make_jaxpr(fn)(kernel, x))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    kernel, x = kernel.astype(jnp.float32), x.astype(jnp.float32)
    fast = core.fast_convolutions(jax.grad(lambda k, x: lax.conv(x, k, (1,), "SAME").sum()))
    assert "conv_general_dilated" in str(jax.make_jaxpr(fast)(kernel, x))

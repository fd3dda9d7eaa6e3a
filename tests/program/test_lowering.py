"""Lowering: the graph computes what the function does, whoever wrote it, with the same integers."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from kernels import stored_kernels
from lowered import in_integers

from hybrid_jax import core, models, quantization
from hybrid_jax import program as p
from hybrid_jax.program import (
    AveragePool,
    Clip,
    Conv,
    Convert,
    Dense,
    Function,
    MatMul,
    MaxPool,
    Mean,
    Multiply,
    Pad,
    Reshape,
    Slice,
    Softmax,
    Transpose,
)


def kinds(program):
    return collections.Counter(type(op) for op in program.operations)


def in_floats(fn, params, x):
    """The graph of a function, after a check that it computes the same."""
    program = p.lower(fn, params, x)
    expected = jax.jit(fn)(params, x)
    got = jax.jit(p.run(program))(x)
    tolerance = 1e-5 * max(1.0, float(jnp.abs(expected).max()))
    np.testing.assert_allclose(got, expected, atol=tolerance)
    return program


class Sites(NamedTuple):
    """A function quantized at its sites, and in integers with the ranges that these have."""

    program: p.Program
    fake: Callable[..., Any]  # of its inputs
    spec: Any
    ranges: Any


def of_sites(fn, params, x, rules=None, **options):
    spec = quantization.spec(core.trace(fn, params, x), rules, **options)
    ranges = quantization.calibrate(fn, params, [(x,)], spec)
    q_fn = jax.jit(quantization.fake_quantized(fn, spec))
    program = in_integers(fn, params, spec, ranges, x)
    return Sites(program, lambda x: q_fn(params, ranges, x), spec, ranges)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", models.names())
def test_every_model_that_we_ship(small_model, name):
    model = small_model(name)
    program = in_floats(model.fn, model.params, model.images)
    # BatchNorm, ReLU and padding are part of other operations, but for what normalizes a sum or a
    # concatenation, of which it makes a 1×1 depthwise convolution.
    assert not {Clip, Transpose} & set(kinds(program))
    sites = {site.name for site in core.trace(model.fn, model.params, model.images).sites}
    extra = {op.name for op in program.weighted} - sites
    assert sites <= {op.name for op in program.weighted}
    assert not extra or name.startswith("densenet")


# Of layers that others have too.
DEEP = ("resnet50", "vgg16_bn")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n for n in models.names()],
)
def test_integers_of_every_model_that_we_ship(small_model, name):
    model = small_model(name)
    program, fake, spec, ranges = of_sites(model.fn, model.params, model.images, weight_bits=4)
    kernels = stored_kernels(model.fn, spec, model.params, ranges, model.images)
    weights = {op.name: op.weights for op in program.weighted}
    for site, stored in kernels.items():
        # Up to the sign of a BatchNorm's scale the integers are those of fake-quantization, in the
        # high bits of [−63, 63].
        bits = spec[site].weight.bits
        assert weights[site].bits == bits
        step = {8: 1, 4: 8}[bits]
        ours = np.abs(weights[site].values.astype(int)).ravel() / step
        np.testing.assert_array_equal(ours, np.abs(np.asarray(stored[0], int)).ravel())
    # Between the input and the logits nothing is a float.
    floats = {name for name, t in program.tensors.items() if t.encoding is None}
    assert floats == {program.input, program.output}
    expected, got = fake(model.images), jax.jit(p.run(program))(model.images)
    # What enters no site is rounded to 8 bits by the graph alone.
    assert float(jnp.abs(got - expected).max()) < 0.06 * float(jnp.abs(expected).max())


def test_digits_agree_with_fake_quantization(digits):
    program, fake, *_ = of_sites(digits.fn, digits.params, digits.images)
    images = jnp.concatenate([digits.images, digits.held_out_images])
    same = jax.jit(p.run(program))(images).argmax(-1) == fake(images).argmax(-1)
    assert float(same.mean(dtype=jnp.float32)) >= 0.999


def test_a_chain_of_sites_is_fake_quantization_to_rounding(digits):
    # Without a residual sum every tensor is read by one site: the graph rounds nowhere else.
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.standard_normal((64, 64)) / 8, jnp.float32) for n in "abc"}
    params["scale"] = jnp.asarray(rng.standard_normal(64), jnp.float32)

    def fn(params, x):
        x = jax.nn.relu((x.reshape(x.shape[0], -1) @ params["a"]) * params["scale"][None] + 0.25)
        return jax.nn.relu6(x @ params["b"]) @ params["c"]

    x = digits.images
    program, fake, *_ = of_sites(fn, params, x, weight_bits=3, activation_bits=4)
    assert kinds(program) == {Convert: 1, Reshape: 1, Dense: 3}
    expected, got = fake(x), jax.jit(p.run(program))(x)
    # Where the float sum lies next to half a step, the integer sum may fall on the other side.
    close = np.isclose(got, expected, atol=1e-4).all(-1)
    assert close.mean() > 0.97
    agreement = (got.argmax(-1) == expected.argmax(-1)).mean(dtype=jnp.float32)
    assert float(agreement) >= 0.999


FOUR_BITS = [(".*", {"weight": 4, "activation": 8})]


def test_a_bias_is_kept_to_an_eighth_of_the_step_of_four_bits():
    def fn(params, x):
        return x @ params["w"] + params["b"][None]

    params = {"w": jnp.float32([[7.0], [-3.0]]), "b": jnp.float32([0.4])}
    x = jnp.float32([[1.0, 2.0], [255.0, 0.0]])
    program = of_sites(fn, params, x, FOUR_BITS).program
    # The kernel is 7 and −3 steps of 1 and the inputs are steps of 1, so 0.4 is 0 of the sums'
    # steps. Stored, the kernel is 56 and −24 steps of 1/8, and 0.4 is 3 of them: 7 − 6 + 0.375.
    weights = next(program.weighted).weights
    np.testing.assert_array_equal(weights.values.ravel(), [56, -24])
    np.testing.assert_array_equal(weights.scale, [1 / 8])
    np.testing.assert_array_equal(p.run(program)(x), [[1.375], [1785.375]])


def test_integers_of_four_bits_are_those_of_the_exact_bias(digits):
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32)
        for name, shape in {"a": (64, 64), "bias": (64,), "b": (64, 8)}.items()
    }

    def fn(params, x):
        x = x.reshape(x.shape[0], -1) @ params["a"] + params["bias"][None]
        return jax.nn.relu(x) @ params["b"]

    program = of_sites(fn, params, digits.images, FOUR_BITS).program
    made = jax.jit(lambda x: p.edges(program, [x]))(digits.images)
    op = next(program.weighted)
    (x,), y = map(program.encoding, op.inputs), program.encoding(op.output)
    values = x.scale * (np.float64(made[op.inputs[0]]) - x.zero_point)
    sums = values @ (op.weights.values * np.float64(op.weights.scale)) + op.weights.bias
    exact = np.clip(np.rint(sums / y.scale) + y.zero_point, y.low, y.high)
    # It is 0.02 %. With the integers in the low bits it was 0.31 %.
    assert (np.asarray(made[op.output]) != exact).mean() < 0.0005


def test_a_kernel_of_many_inputs_keeps_its_integers_lower():
    def fn(params, x):
        return x @ params["w"]

    params, x = {"w": jnp.full((200_000, 1), 7.0)}, jnp.full((1, 200_000), 255.0)
    program, fake, *_ = of_sites(fn, params, x, FOUR_BITS)
    weights = next(program.weighted).weights
    # Sums reach 255 · 7 · 200000 = 3.6e8 steps: 7.1e8 if the steps are halved, and 2^30 = 1.1e9 is
    # the most that leaves as much to the bias.
    assert weights.bits == 6
    assert set(weights.values.ravel()) == {14}
    np.testing.assert_allclose(p.run(program)(x), fake(x), rtol=1e-5)


class Squeeze(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.swish(nn.Conv(8, (3, 3))(x))
        gate = nn.relu(nn.Dense(4)(x.mean((1, 2), keepdims=True)))
        x = x * nn.sigmoid(nn.Dense(8)(gate))
        x = nn.max_pool(x, (2, 2), (2, 2))
        # Not nn.avg_pool, which divides by a NumPy integer: an error under strict promotion.
        means = nn.pool(x, 0.0, lax.add, (3, 3), (1, 1), "SAME") / 9.0
        x = jnp.concatenate([x, means], -1)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Dropout(0.5, deterministic=True)(x)
        return nn.softmax(nn.Dense(5)(x.reshape(x.shape[0], -1)))


@pytest.fixture(scope="module")
def squeeze():
    net, x = Squeeze(), draw(4, 8, 8, 3)
    params = net.init(jax.random.key(0), x)
    return (lambda params, x: net.apply(params, x)), params, x


def test_squeeze_and_excite_pools_and_softmax(squeeze):
    program = in_floats(*squeeze)
    assert kinds(program)[Softmax] == kinds(program)[MaxPool] == kinds(program)[AveragePool] == 1
    assert kinds(program)[Mean] == 1
    assert kinds(program)[Multiply] == 1  # the gate; a swish is a function
    assert kinds(program)[Function] == 2


def test_squeeze_and_excite_in_integers(squeeze):
    fn, params, x = squeeze
    got, expected = jax.jit(p.run(of_sites(*squeeze).program))(x), fn(params, x)
    assert float(jnp.abs(got - expected).max()) < 0.03


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
            self.head = nnx.Linear(4 * 16, 5, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x)))
            return self.head(x.reshape(x.shape[0], -1))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))

    def fn(params, x):
        return nnx.merge(graphdef, params)(x)

    program = in_floats(fn, state, draw(2, 8, 8, 3))
    assert kinds(program) == {Conv: 1, Reshape: 1, Dense: 1}


def test_channels_first():
    params = {"a": draw(4, 3, 3, 3), "b": draw(4, 4, 1, 1), "w": draw(4 * 16, 5)}

    def conv(x, kernel, stride):
        numbers = ("NCHW", "OIHW", "NCHW")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
        )

    def fn(params, x):
        x = jax.nn.relu(conv(x, params["a"], 2))
        x = x + conv(x, params["b"], 1)
        return x.reshape(x.shape[0], -1) @ params["w"]

    program = in_floats(fn, params, draw(2, 3, 8, 8))
    # One for the images, one for the order in which the dense layer reads.
    assert kinds(program)[Transpose] == 2


def test_padding_becomes_part_of_the_convolution():
    def fn(params, x):
        x = jnp.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, params, (2, 2), "VALID", dimension_numbers=numbers)
        return x.sum((1, 2))

    program = in_floats(fn, draw(3, 3, 3, 4), draw(2, 8, 8, 3))
    assert Pad not in kinds(program)
    assert next(program.weighted).padding == ((1, 2), (1, 2))


def test_a_slice_of_a_slice_is_one():
    def fn(params, x):
        x = lax.slice(x, (0, 1, 0, 0), (len(x), 9, 12, 4), (1, 1, 2, 1))
        # As `core.shrink` leaves it where nothing was cut off.
        x = lax.slice_p.bind(x, start_indices=(0,) * 4, limit_indices=x.shape, strides=None)
        x = lax.slice(x.transpose(0, 3, 1, 2), (0, 0, 0, 1), (len(x), 3, 8, 6), (1, 1, 3, 2))
        return x.sum((2, 3)) @ params

    program = in_floats(fn, draw(3, 2), draw(2, 9, 12, 4))
    (cut,) = (op for op in program.operations if isinstance(op, Slice))
    # Rows 1, 4 and 7; columns 2, 6 and 10; channels 0, 1 and 2.
    assert (cut.starts, cut.stops, cut.strides) == ((1, 2, 0), (8, 11, 3), (3, 4, 1))


def test_what_two_read_is_computed_once():
    def fn(params, x):
        y = x @ params["a"]
        return (jax.nn.relu(y) + y) @ params["b"]

    program = in_floats(fn, {"a": draw(3, 4), "b": draw(4, 2)}, draw(5, 3))
    assert kinds(program) == {Dense: 2, Function: 1}


def test_signs_constants_and_bounds():
    def fn(params, x):
        y = jnp.minimum(1.5 - (x @ params["a"]) / 2.0, 1.0)
        y = jnp.clip(-y, -0.5, 3.0)
        return (2.0 * y - x @ params["a2"]) @ params["b"]

    in_floats(fn, {"a": draw(3, 4), "a2": draw(3, 4), "b": draw(4, 2)}, draw(5, 3))


@pytest.mark.parametrize(
    ("low", "high", "then"),
    [(0.0, 6.0, (-1.0, 2.0)), (0.0, 1.0, (2.0, 3.0)), (-1.0, 1.0, (-3.0, -2.0))],
)
def test_bounds_of_bounds(low, high, then):
    def fn(params, x):
        return jnp.minimum(jnp.maximum(jnp.clip(x @ params, low, high), then[0]), then[1])

    in_floats(fn, 5 * draw(3, 4), draw(6, 3))


def test_dense_layers_at_each_place():
    def fn(params, x):
        return jax.nn.relu(x @ params["a"]).max((1, 2)) @ params["b"]

    program = in_floats(fn, {"a": draw(3, 4), "b": draw(4, 2)}, draw(2, 5, 5, 3))
    assert kinds(program)[Conv] == 1


def test_a_removed_model_lowers(digits):
    graph = core.trace(digits.fn, digits.params, digits.images[:2])
    keep = {g.name: np.arange(g.size) % 2 == 0 for g in graph.groups}
    masks = core.expand(keep, graph.groups, digits.params)
    fn, params, _ = core.shrink(digits.fn, digits.params, masks, digits.images[:2])
    in_floats(fn, params, digits.images[:8])


def test_fewer_bits_before_a_site_than_a_sum_needs():
    # The residual sum is read by a site of 3 bits and by the next sum: it is stored at 8 bits.
    def fn(params, x):
        y = jax.nn.relu(x @ params["a"])
        y = jax.nn.relu(y + y @ params["b"])
        return y @ params["c"]

    params, x = {"a": draw(6, 6), "b": draw(6, 6), "c": draw(6, 2)}, draw(64, 6)
    program = of_sites(fn, params, x, activation_bits=3, first_last_bits=2).program
    assert program.encoding("a").high == 255
    # One before each site that reads a tensor of other bits, and one for the input.
    assert kinds(program)[Convert] == 2
    assert {program.encoding(op.inputs[0]).high for op in program.weighted} == {7}


def test_floats_where_a_site_has_32_bits():
    def fn(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]

    params, x = {"a": draw(6, 6), "b": draw(6, 6), "c": draw(6, 2)}, draw(16, 6)
    rules = [("b", {"weight": 32, "activation": 32}), ("c", {"activation": 32}), (".*", {})]
    program, fake, *_ = of_sites(fn, params, x, rules)
    np.testing.assert_allclose(jax.jit(p.run(program))(x), fake(x), atol=1e-4)


def test_a_scale_of_zero():
    def fn(params, x):
        return jax.nn.relu((x @ params["a"]) * params["scale"] + 1.0) @ params["b"]

    params = {"a": draw(3, 4), "scale": jnp.float32([[1.0, 0.0, -2.0, 0.5]]), "b": draw(4, 2)}
    x = draw(64, 3)
    program, fake, *_ = of_sites(fn, params, x)
    assert (next(program.weighted).weights.scale > 0).all()
    np.testing.assert_allclose(p.run(program)(x), fake(x), atol=0.05)


BAD = {
    "keep its examples apart": lambda params, x: x - x.mean(0, keepdims=True),
    "examples cannot meet": lambda params, x: x @ params @ (x @ params).T,
    "got a constant": lambda params, x: params,
    "take any number of examples": lambda params, x: x + jnp.arange(8.0).reshape(2, 4),
    "fn must return": lambda params, x: (x @ params).T,
}


@pytest.mark.parametrize(
    "fn",
    [
        lambda params, x: jnp.split(x, 2, -1)[0],
        lambda params, x: jnp.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=1.5),
    ],
)
def test_lengths_of_edges_are_ints(fn):
    program = p.lower(fn, {"unused": jnp.ones(1)}, jnp.ones((2, 4, 6)))
    lengths = [length for tensor in program.tensors.values() for length in tensor.shape]
    assert {type(length) for length in lengths} == {int}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_lowered_is_named(message):
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=message):
        p.lower(BAD[message], draw(4, 4), draw(2, 4))


def test_arguments_that_are_none_are_named():
    fn, params, x = (lambda params, x: x @ params), draw(4, 4), draw(2, 4)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda params: p.lower(fn, params, x).inputs)(params)
    with pytest.raises(ValueError, match="inputs must be arrays"):
        p.lower(fn, params, 3.0)


def test_a_function_without_parameters():
    program = p.lower(lambda params, x: jnp.tanh(x) * 2.0, {}, draw(2, 4))
    np.testing.assert_allclose(p.run(program)(draw(3, 4)), jnp.tanh(draw(3, 4)) * 2.0, rtol=1e-6)


def test_what_cancels_is_no_difference():
    # A variance from two means of values that are all but alike.
    def fn(params, x):
        y = 30.0 + x * params
        centred = y - y.mean(-1, keepdims=True)
        variance = (y * y).mean(-1, keepdims=True) - y.mean(-1, keepdims=True) ** 2
        return centred * lax.rsqrt(jnp.maximum(variance, 0.0) + 1e-6)

    program = p.lower(fn, jnp.float32(0.1), draw(4, 3, 3, 2))
    assert any(isinstance(op, p.Normalize) for op in program.operations)


def test_binary_kernels_and_symmetric_activations():
    def fn(params, x):
        return x @ params["w"]

    params, x = {"w": draw(16, 4)}, draw(32, 16)
    sides = {
        "weight": quantization.Quantizer(1, "binary", per_channel=True, learning="fixed"),
        "activation": quantization.Quantizer(6, "symmetric"),
    }
    program, fake, *_ = of_sites(fn, params, x, [("w", sides)])
    np.testing.assert_allclose(p.run(program)(x), fake(x), atol=1e-4)
    assert set(np.unique(next(program.weighted).weights.values)) == {-32, 32}


def test_a_binary_channel_that_is_multiplied_by_zero():
    def fn(params, x):
        return (x @ params["w"]) * params["scale"]

    params, x = {"w": draw(16, 3), "scale": jnp.float32([[1.0, 0.0, -2.0]])}, draw(32, 16)
    binary = quantization.Quantizer(1, "binary", per_channel=True, learning="fixed")
    program, fake, *_ = of_sites(fn, params, x, [("w", {"weight": binary})])
    np.testing.assert_allclose(p.run(program)(x), fake(x), atol=1e-4)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_channel_that_is_all_but_dead_beside_its_bias(bits):
    # As where BatchNorm's scale was driven to 0: a bias of 3 is 10^10 steps of its kernel.
    def fn(params, x):
        return jax.nn.relu(x @ params["a"] * params["gamma"] + params["beta"]) @ params["b"]

    params = {"a": draw(4, 3), "b": draw(3, 2)}
    params |= {"gamma": jnp.array([[1e-9, 1.0, 1e-5]]), "beta": jnp.array([[3.0, 0.1, -2.0]])}
    x = draw(16, 4)
    own = quantization.Quantizer(
        bits, "binary" if bits == 1 else "symmetric", True, "fixed" if bits == 1 else "lsq"
    )
    program, fake, *_ = of_sites(fn, params, x, [("a", {"weight": own})])
    np.testing.assert_allclose(p.run(program)(x), fake(x), atol=0.02)


def test_an_activation_that_was_always_zero_is_zero_on_other_images_too():
    # In calibration all inputs are -1, so that the ReLU has the range [0, 0], and the output is β.
    def fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"] + params["beta"]

    params = {"a": jnp.eye(2), "b": jnp.eye(2), "beta": jnp.array([[0.25, 0.5]])}
    x, other = -jnp.ones((2, 2)), jnp.array([[1.0, 0.5], [0.25, 1.0]])
    *_, spec, ranges = of_sites(fn, params, x)
    ranges["a"]["activation"] = quantization.Range(jnp.float32(-1), jnp.float32(1))
    trained = quantization.fake_quantized(fn, spec)(params, ranges, other)
    deployed = p.run(in_integers(fn, params, spec, ranges, x))(other)
    np.testing.assert_allclose(trained, [[0.25, 0.5]] * 2, rtol=1e-6)
    np.testing.assert_allclose(deployed, [[0.25, 0.5]] * 2, rtol=1e-6)


def test_an_activation_that_is_always_zero_has_no_scale_that_runtimes_refuse():
    # As XNNPACK does where the product of the scales is 256 times that of the result or more.
    def fn(params, x):
        return jax.nn.relu(x @ params["a"] - 100.0) @ params["b"]

    params, x = {"a": draw(4, 3), "b": draw(3, 2)}, draw(16, 4)
    program = of_sites(fn, params, x).program
    first, second = program.weighted
    scales = [program.encoding(op.inputs[0]).scale for op in (first, second)]
    assert scales[1] == scales[0] / 128
    assert np.all(first.weights.scale * scales[0] / scales[1] < 256)
    np.testing.assert_array_equal(p.run(program)(x), np.zeros((16, 2)))


def test_an_accumulator_that_may_overflow():
    weights = p.Weights(np.full((1, 1), 127, np.int8), np.float32([1e-20]), np.float32([1.0]), 8)
    program = p.Program(
        "x",
        "y",
        {"x": p.Tensor((1,)), "q": p.Tensor((1,), p.Encoding(1.0)), "y": p.Tensor((1,))},
        (Convert(("x",), "q"), Dense(("q",), "y", "dense", weights)),
    )
    with pytest.raises(ValueError, match="accumulator below"):
        p.run(program)(jnp.ones((1, 1)))


def test_a_product_of_activations_that_may_overflow():
    # 33,026 products of at most 255 · 255 are the first that do not fit.
    x, tokens = p.Encoding(1.0), 33_026
    tensors = {"x": p.Tensor((1, tokens)), "y": p.Tensor((1, 1))}
    tensors |= {"a": p.Tensor((1, tokens), x), "b": p.Tensor((tokens, 1), x)}
    steps = Convert(("x",), "a"), Reshape(("a",), "b", (tokens, 1)), MatMul(("a", "b"), "y")
    with pytest.raises(ValueError, match="sums of the matrix product 'y' must stay below"):
        p.run(p.Program("x", "y", tensors, steps))(jnp.ones((1, 1, tokens)))
    zero = dataclasses.replace(x, zero_point=128)
    tensors |= {name: dataclasses.replace(tensors[name], encoding=zero) for name in "ab"}
    assert p.run(p.Program("x", "y", tensors, steps))(jnp.ones((1, 1, tokens))) == tokens


def test_every_tensor_has_the_shape_that_the_graph_says(squeeze):
    fn, params, x = squeeze
    program = p.lower(fn, params, x)
    for name, value in p.edges(program, [x]).items():
        assert value.shape[1:] == program.tensors[name].shape, name

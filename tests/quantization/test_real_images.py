"""On a network that has learned real images: the order of methods, and training quantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core
from hybrid_jax import quantization as q


@pytest.fixture(scope="module")
def graph(digits):
    return core.trace(digits.fn, digits.params, digits.images[:2])


def low_bits(graph, weight, activation):
    """Few bits everywhere but in the first and the last site."""
    return q.spec(graph, weight_bits=weight, activation_bits=activation)


def accuracy(fn, digits):
    return float((jax.jit(fn)(digits.held_out_images).argmax(-1) == digits.held_out_labels).mean())


@pytest.fixture(scope="module")
def errors(digits, graph):
    """{method: {site: {role: mean squared error of 4 bits}}}, over weights or activations."""
    spec = q.spec(graph, weight_bits=4, activation_bits=4, first_last_bits=4)
    images = digits.images[:256]

    def errors_of(ranges):
        def rule(site, x, kernel, apply):
            found = {}
            for role, tensor in (("weight", kernel), ("activation", x)):
                grid = getattr(spec[site.name], role).grid(ranges[site.name][role])
                found[role] = jnp.mean((q.fake_quant(tensor, grid) - tensor) ** 2)
            return apply(x, kernel), found

        return core.at_sites(digits.fn, rule)(digits.params, images)[1]

    measure = jax.jit(errors_of)
    batches = [(images[:128],), (images[128:],)]
    return {
        method: measure(q.calibrate(digits.fn, digits.params, batches, spec, method))
        for method in ("minmax", "mse")
    }


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_mse_ranges_lose_no_more_than_minmax_ranges(errors, role):
    better = 0
    for site, least in errors["mse"].items():
        widest = errors["minmax"][site][role]
        # The search is in bins of a histogram: to its resolution.
        assert least[role] <= 1.001 * widest, site
        better += bool(least[role] < 0.95 * widest)
    assert better >= len(errors["mse"]) // 2


def fit(forward, digits, trained, steps, rate):
    """Descends on (params, ranges) by distillation from the float model; one compilation."""
    tx = optax.adam(rate)
    soft = jax.nn.softmax(jax.jit(digits.fn)(digits.params, digits.images))

    @jax.jit
    def step(trained, state, number, key):
        batch = jax.random.randint(key, (64,), 0, len(digits.images))

        def loss(trained):
            logits = forward(trained, digits.images[batch], number)
            return optax.softmax_cross_entropy(logits, soft[batch]).mean()

        with jax.numpy_dtype_promotion("standard"):  # Adam's step count needs it
            updates, state = tx.update(jax.grad(loss)(trained), state)
        return optax.apply_updates(trained, updates), state

    state = tx.init(trained)
    for number, key in enumerate(jax.random.split(jax.random.key(0), steps)):
        trained, state = step(trained, state, jnp.int32(number), key)
    assert step._cache_size() == 1
    return trained


@pytest.mark.slow
def test_training_quantized_beats_calibration(digits, graph):
    """2-bit weights and activations, annealed from floats over 8 bits."""
    spec = low_bits(graph, 2, 2)
    ranges = q.calibrate(digits.fn, digits.params, [(digits.images[:256],)], spec, "mse")
    q_fn = q.fake_quantized(digits.fn, spec)
    schedule = q.annealing(spec.bits(), [(5, 32), (15, 8), (25, 4)])

    def forward(trained, images, number):
        params = digits.params | {"params": trained[0]}
        return q_fn(params, trained[1], images, bits=schedule(number))

    before = accuracy(functools.partial(q_fn, digits.params, ranges), digits)
    start = (digits.params["params"], ranges)
    params, ranges = fit(forward, digits, start, steps=60, rate=0.003)
    params = digits.params | {"params": params}
    after = accuracy(functools.partial(q_fn, params, ranges), digits)
    assert after > before + 0.2


def test_training_through_the_folding(digits, graph):
    """What is quantized, and stored, is the kernel with BatchNorm in it; what is trained is not."""
    folded, refold = core.fold(digits.fn, digits.params, digits.images[:2])
    start = jax.jit(refold)(digits.params)
    spec = low_bits(core.trace(folded, start, digits.images[:2]), 2, 2)
    ranges = q.calibrate(folded, start, [(digits.images[:256],)], spec, "mse")
    q_fn = q.fake_quantized(folded, spec)

    def forward(trained, images, number):
        return q_fn(refold(trained[0]), trained[1], images)

    before = accuracy(functools.partial(q_fn, start, ranges), digits)
    params, ranges = fit(forward, digits, (digits.params, ranges), steps=40, rate=0.003)
    # BatchNorm's scale, and its statistics, have learned along with the kernels.
    for path, leaf in core.flatten_paths(params).items():
        assert np.any(leaf != core.flatten_paths(digits.params)[path]), path
    end = jax.jit(refold)(params)
    after = accuracy(functools.partial(q_fn, end, ranges), digits)
    assert after > before + 0.2
    # The device's kernels are the folded ones.
    stored = q.integer_kernels(folded, spec, end, ranges, digits.images[:2])
    assert set(stored) == {site.name for site in graph.sites}
    for name, (values, grid) in stored.items():
        np.testing.assert_array_equal(q.dequantize(values, grid), q.fake_quant(end[name], grid))
        assert int(jnp.abs(values).max()) <= (127 if grid.high == 127 else 1)

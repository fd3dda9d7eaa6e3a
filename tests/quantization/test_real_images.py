"""On a network that has learned real images: the order of methods, and training quantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core
from hybrid_jax import program as p
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


def test_training_as_deployed(digits, graph):
    """What is quantized, stored and trained is the kernel with BatchNorm in it."""
    images = digits.images[:256]
    program = p.lower(digits.fn, digits.params, images[:2])
    plan = q.plan(program, low_bits(graph, 2, 2))
    ranges = q.calibrate_edges(plan, [(images,)], "mse")
    q_fn = q.as_deployed(plan)

    def forward(trained, images, number):
        return q_fn(*trained, images)

    before = accuracy(functools.partial(q_fn, program.params, ranges), digits)
    start = jax.tree.map(jnp.asarray, (program.params, ranges))
    params, ranges = fit(forward, digits, start, steps=40, rate=0.003)
    for name, own in params.items():
        assert all(np.any(leaf != program.params[name][role]) for role, leaf in own.items())
    after = accuracy(functools.partial(q_fn, params, ranges), digits)
    assert after > before + 0.2
    # The device answers as what was trained.
    integers = q.encode(plan.replace(params), ranges, images)
    assert accuracy(p.run(integers), digits) == pytest.approx(after, abs=0.01)
    assert {op.weights.bits for op in integers.weighted} == {2, 8}

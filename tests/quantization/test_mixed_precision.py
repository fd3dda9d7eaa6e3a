"""Bits, and widths with them, chosen for a network that has learned real images."""

import contextlib
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, cost, pruning
from hybrid_jax import quantization as q

CHOICES = (2, 3, 4, 5, 6, 8)


class Measured(NamedTuple):
    graph: core.Graph
    formula: cost.Formula
    spec: q.Spec
    ranges: dict[int, Any]
    images: jax.Array
    sensitivity: Any


@pytest.fixture(scope="module")
def measured(digits):
    """Sensitivities on training images; one range for each kernel, as many devices ask for."""
    graph = core.trace(digits.fn, digits.params, digits.images[:1])
    spec = q.spec(graph, [(".*", {"weight": q.Quantizer(8)})])
    images = digits.images[:192]
    # One calibration for all bit-widths: as many experts with the same parameters.
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(CHOICES)), digits.params)
    bits = jax.tree.map(lambda _: jnp.array(CHOICES, jnp.int32), spec.bits())
    stacked = q.calibrate(digits.fn, stack, [(images,)], spec, "mse", bits=bits, stacked=True)
    ranges = {b: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i, b in enumerate(CHOICES)}
    found = q.sensitivity(digits.fn, digits.params, [(images,)], spec, ranges)
    return Measured(graph, cost.formula(graph), spec, ranges, images, found)


@pytest.fixture(scope="module")
def divergence(digits, measured):
    """From bits to the divergence from the float model on held-out images."""
    q_fn = q.fake_quantized(digits.fn, measured.spec)
    expected = digits.fn(digits.params, digits.held_out_images)

    @jax.jit
    def evaluate(ranges, bits):
        logits = q_fn(digits.params, ranges, digits.held_out_images, bits=bits)
        return q.kl_divergence(logits, expected)

    def judged(bits):
        ranges = {
            site: {role: measured.ranges[width][site][role] for role, width in roles.items()}
            for site, roles in bits.items()
        }
        return float(evaluate(ranges, jax.tree.map(jnp.int32, bits)))

    return judged


def counted(graph, bits):
    weight, activation = (
        {site: roles[role] for site, roles in bits.items()} for role in ("weight", "activation")
    )
    return cost.count(graph, None, weight, activation)


def uniform(graph, weight, activation):
    return {site.name: {"weight": weight, "activation": activation} for site in graph.sites}


def damage_of(sensitivity, bits):
    """The sum that an allocation makes least."""
    return sum(
        t[bits[site][role]] for site, roles in sensitivity.items() for role, t in roles.items()
    )


@pytest.mark.parametrize("width", [4, 5])
def test_mixed_weights_do_the_least_damage_of_the_same_bytes(measured, divergence, width):
    base = uniform(measured.graph, width, 8)
    budget = counted(measured.graph, base).bytes
    weights = {site: {"weight": t["weight"]} for site, t in measured.sensitivity.items()}
    found = q.allocate_bits(weights, measured.formula, measured.spec, {"bytes": budget})
    assert counted(measured.graph, found.bits).bytes == found.costs["bytes"] <= budget
    assert found.damage == pytest.approx(damage_of(weights, found.bits), rel=1e-6)
    rng, others = np.random.default_rng(0), []
    while len(others) < 16:
        bits = {site: {"weight": int(rng.choice(CHOICES)), "activation": 8} for site in weights}
        if 0.95 * budget <= counted(measured.graph, bits).bytes <= budget:
            others.append(bits)
    least = min(damage_of(weights, bits) for bits in [base, *others])
    assert found.damage <= least * (1 + 1e-6)
    # What was measured on some images holds on others: chance does worse with as many bytes.
    assert divergence(found.bits) < np.median([divergence(bits) for bits in others])


@pytest.mark.parametrize("width", [3, 4, 5])
def test_mixed_precision_beats_uniform_of_the_same_operations(measured, divergence, width):
    base = uniform(measured.graph, width, width)
    budget = counted(measured.graph, base).bops
    found = q.allocate_bits(measured.sensitivity, measured.formula, measured.spec, {"bops": budget})
    assert counted(measured.graph, found.bits).bops == found.costs["bops"] <= budget
    assert divergence(found.bits) < divergence(base)


@pytest.fixture(scope="module")
def widths(digits, measured):
    """What it costs to keep three quarters of the channels of each group, or all; the scores."""
    groups = measured.graph.groups
    scores = pruning.magnitude(measured.graph.kernels, digits.params)
    expected = digits.fn(digits.params, measured.images)

    def divergence(params, images):
        return q.kl_divergence(digits.fn(params, images), expected)

    kept = (0.75, 1.0)
    removed = [1 - part for part in kept]
    found = pruning.sensitivity(
        divergence,
        digits.params,
        scores,
        removed,
        measured.images,
        granularity=pruning.channels(groups),
    )
    damage = {
        group.name: {
            int(group.size * part): float(value)
            for part, value in zip(kept, found[group.name], strict=True)
        }
        for group in groups
    }
    return damage, pruning.group_scores(scores, groups)


def test_bits_and_widths_fit_a_device(digits, measured, widths):
    """Bytes and operations at once, counted on the network that is really smaller."""
    damage, scores = widths
    whole = counted(measured.graph, uniform(measured.graph, 8, 8))
    budgets = {
        "bytes": whole.bytes * 6 // 10,
        "macs": whole.macs * 8 // 10,
    }
    sensitivity = {
        site: {role: {b: table[b] for b in (3, 4, 8)} for role, table in roles.items()}
        for site, roles in measured.sensitivity.items()
    }

    def fit(widths):
        return q.allocate_bits(sensitivity, measured.formula, measured.spec, budgets, widths=widths)

    def small_network(found):
        whole_groups = {name: jnp.ones(len(each), bool) for name, each in scores.items()}
        keep = pruning.to_widths(whole_groups, scores, {n: (w,) for n, w in found.widths.items()})
        masks = core.expand(keep, measured.graph.groups, digits.params)
        return core.shrink(digits.fn, digits.params, masks, digits.held_out_images[:8])

    def accuracy(found):
        """Of the small network, quantized; the spec fits it: it has the same sites."""
        small_fn, small, _ = small_network(found)
        stated = q.with_bits(measured.spec, found.bits)
        ranges = q.calibrate(small_fn, small, [(measured.images,)], stated, "mse")
        q_fn = jax.jit(q.fake_quantized(small_fn, stated))
        labels = jnp.argmax(q_fn(small, ranges, digits.held_out_images), -1)
        return float((labels == digits.held_out_labels).mean())

    found = fit(damage)
    small_fn, small, certificate = small_network(found)
    assert certificate.difference < 1e-4
    real = counted(core.trace(small_fn, small, digits.images[:1]), found.bits)
    for name, planned in found.costs.items():
        assert planned == getattr(real, name)
        assert planned <= budgets.get(name, planned)
    # Neither alone does: all widths whole are too many operations.
    with pytest.raises(ValueError, match="budget of macs must be at least"):
        fit(None)

    every = []
    for chosen in itertools.product(*damage.values()):
        with contextlib.suppress(ValueError):  # some are too large with any bits
            every.append(fit({n: {w: damage[n][w]} for n, w in zip(damage, chosen, strict=True)}))
    every.sort(key=lambda each: each.damage)
    assert found.damage == pytest.approx(every[0].damage, rel=1e-6)
    # How much is right at all depends on the network that is cut: nothing was retrained.
    assert accuracy(found) > accuracy(every[-1])

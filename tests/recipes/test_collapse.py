"""The mixture distilled into one network, on real images."""

import jax
import numpy as np
import optax
import pytest

from hybrid_jax import core, data, experts, pruning, recipes, training


def test_the_student_agrees_with_the_mixture_better_than_before(digits):
    graph = core.trace(digits.fn, digits.params, digits.images[:1])
    # Two experts: the network as trained, and with half of its weights removed.
    sparse = pruning.masks(pruning.magnitude(graph.kernels, digits.params), 0.5)
    stack = experts.stack([digits.params, pruning.apply_masks(digits.params, sparse)])
    gate = experts.gate_linear(2)
    gate_params = gate.init(jax.random.key(0), digits.images[:1])
    moe = experts.mixture(digits.fn, gate.apply, experts.soft(), "unroll")
    # The student: the network with a third of its channels removed, and nothing done about it yet.
    scores = pruning.magnitude(graph.kernels, digits.params)
    masks = pruning.masks(scores, 1 / 3, pruning.channels(graph.groups))
    small_fn, small, certificate = core.shrink(digits.fn, digits.params, masks, digits.images[:1])
    train = core.narrow(digits.train, digits.params, certificate.kept)
    # With labels that say nothing, all it can learn is the mixture.
    arrays = data.Arrays(np.asarray(digits.images), np.zeros(len(digits.labels), np.int32))
    start = training.create_state(
        {"params": small["params"]},
        {"batch_stats": small["batch_stats"]},
        optax.adam(1e-2),
        jax.random.key(0),
    )
    student = recipes.collapse(
        moe,
        stack,
        gate_params,
        lambda params, state, images, key: train(params | state, images),
        start,
        lambda first: data.batches(arrays, 64, seed=0, start_step=first),
        steps=150,
    )
    teacher = moe(stack, gate_params, digits.held_out_images)[0].argmax(-1)

    def agreement(variables):
        return (small_fn(variables, digits.held_out_images).argmax(-1) == teacher).mean()

    before, after = agreement(small), agreement(student.params | student.state)
    assert after > max(before + 0.3, 0.8)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="alpha must be above 0, got 0"):
        recipes.collapse(None, None, None, None, None, None, steps=1, alpha=0)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        recipes.collapse(None, None, None, None, None, None, steps=1, alpha=1.5)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        recipes.collapse(None, None, None, None, None, None, steps=1, temperature=0)

"""Mixtures and cascades: who answers for an image, and that equal outputs decide alike."""

import dataclasses
import functools

import choices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import experts
from hybrid_jax import program as p
from hybrid_jax.program import Encoding, Program, Tensor, choice


@pytest.mark.parametrize("shape", [(2,), (1, 2)])
@pytest.mark.parametrize(("share", "want"), choices.BY_HAND.items())
def test_three_images_by_hand(share, want, shape):
    x, cascade = choices.IMAGES.reshape(-1, *shape), choices.by_hand(share, shape)
    want = np.reshape(want, x.shape)
    for way in (p.run, p.simulate):
        fn = jax.jit(way(cascade))
        np.testing.assert_array_equal(fn(x), np.float32(want))
        for i in range(3):
            np.testing.assert_array_equal(fn(x[i : i + 1]), np.float32(want[i : i + 1]))


def test_each_image_has_one_expert():
    mixture, x = choices.mixture(), choices.images()
    gate, *experts = (jax.jit(p.run(part))(x) for part in mixture.parts)
    chosen = np.asarray(gate.argmax(-1))
    assert set(chosen) == {0, 1, 2}
    want, got = np.stack(experts)[chosen, np.arange(len(x))], jax.jit(p.run(mixture))
    np.testing.assert_array_equal(got(x), want)
    np.testing.assert_array_equal(got(x[:1]), want[:1])


def test_a_gate_that_is_not_a_number():
    tensors = {"x": Tensor((2,)), "y": Tensor((2,))}
    expert = Program("x", "y", tensors, (p.Clip(("x",), "y", 0.0, 1.0),))
    x = jnp.float32([[2, 1], [np.nan, 1]])
    got = p.run(p.Mixture(identity(2), (expert, identity(2))))(x)
    np.testing.assert_array_equal(got, [[1, 1], [np.nan, np.nan]])


def test_the_simulation_is_the_integers_up_to_halves():
    mixture, x = choices.mixture(), choices.images()
    for program in (*mixture.experts, mixture):
        integers, floats = (jax.jit(way(program))(x) for way in (p.run, p.simulate))
        # Two steps of the mean, 0.02, through the largest entry of a head.
        assert float(jnp.abs(integers).max()) > 0.1
        np.testing.assert_allclose(floats, integers, atol=2 * 0.02 * 1.5 / 5**0.5)
        # Halves are rare: almost every logit is the same, but for the bias in whole steps.
        assert float(np.isclose(floats, integers, atol=1e-4).mean()) > 0.8


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_cascade_is_that_of_experts(share):
    cascade, x = dataclasses.replace(choices.cascade(), share=share), choices.images()
    logits = jnp.stack([p.run(stage)(x) for stage in cascade.stages])
    want = experts.cascade(logits, jnp.float32(cascade.thresholds), share=share)
    assert set(np.asarray(want.stage)) >= {0, 1}
    np.testing.assert_array_equal(jax.jit(p.run(cascade))(x), want.logits)


def test_a_stage_runs_where_it_is_needed():
    ran = []

    def stage(i, factor, *unsure):
        def fn(x):
            jax.debug.callback(lambda: ran.append(i))
            return (factor * x, x[:, 0] < unsure[0]) if unsure else factor * x

        return fn

    fns = [stage(0, 1, 3.0), stage(1, 2, 2.0), stage(2, 3)]
    answer = jax.jit(functools.partial(p.Cascade((identity(2),) * 3, 0.5).answer, fns))
    for x, stages in ((3, [0]), (2, [0, 1]), (1, [0, 1, 2])):
        y = answer(jnp.full((1, 2), x, jnp.float32))
        jax.effects_barrier()
        assert ran == stages
        np.testing.assert_array_equal(y, np.full((1, 2), x * len(stages)))
        ran.clear()


def identity(count):
    return Program("x", "x", {"x": Tensor((count,))}, ())


@settings(max_examples=20)
@given(st.integers(0, 999), st.sampled_from([1, 2, 10, 100, 1000]), st.floats(0.05, 0.99))
def test_a_confidence_is_the_largest_probability(seed, count, threshold):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=rng.uniform(0.1, 8), size=(64, count)).astype(np.float32)
    _, unsure = p.run(choice.below(identity(count), threshold))(logits)
    confidence = choices.softmax(logits.astype(np.float64)).max(-1)
    room = 2e-4 + count / 2 ** (25 - (count - 1).bit_length())
    clear = np.abs(confidence - threshold) > room
    np.testing.assert_array_equal(np.asarray(unsure)[clear], (confidence < threshold)[clear])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_what_reaches_its_threshold_is_sure(count):
    x = np.full((1, count), 0.3, np.float32)
    for threshold in (1 / count, np.float32(1) / np.float32(count)):
        _, unsure = p.run(choice.below(identity(count), threshold))(x)
        assert unsure.tolist() == [False]
    if count > 1:
        _, unsure = p.run(choice.below(identity(count), 1.0001 / count))(x)
        assert unsure.tolist() == [True]


def test_ends_of_thresholds_and_what_is_not_finite():
    inf, nan = np.inf, np.nan
    x = np.float32([[0, 0], [40, 0], [nan, 0], [inf, 0], [-inf, 0], [inf, inf]])
    # 0 never hands on; 1 does where it is not certain; what has no probability is an answer.
    for threshold, want in {0.0: [False] * 6, 1.0: [True] + [False] * 5}.items():
        _, unsure = p.run(choice.below(identity(2), threshold))(x)
        assert unsure.tolist() == want


def test_an_encoded_output_decides_by_its_values():
    # 12 steps of 0.25 from zero are 3: a confidence of 0.953.
    tensors = {"x": Tensor((2,)), "y": Tensor((2,), Encoding(0.25, 128))}
    stage = Program("x", "y", tensors, (p.Convert(("x",), "y"),))
    x = np.float32([[3.1, 0.1]])
    for threshold, unsure in ((0.952, False), (0.954, True)):
        y, got = p.run(choice.below(stage, threshold))(x)
        np.testing.assert_array_equal(y, [[3.0, 0.0]])
        assert got.tolist() == [unsure]


def test_one_threshold_is_that_of_all_stages():
    stages = (identity(2),) * 3
    assert p.Cascade(stages, 0.7).thresholds == (0.7, 0.7)
    assert p.Cascade(stages[:1], ()).thresholds == ()
    np.testing.assert_array_equal(
        p.run(p.Cascade(stages[:1], ()))(np.ones((2, 2))), np.ones((2, 2))
    )


@pytest.mark.parametrize(
    ("stages", "thresholds", "message"),
    [
        ((identity(2), identity(2)), (0.5, 0.5), r"thresholds must be 1, one for each stage"),
        ((identity(2), identity(2)), 1.5, r"thresholds must be in \[0, 1\], got 1.5"),
        ((identity(2), identity(3)), 0.5, "one input shape, got"),
        ((Program("x", "x", {"x": Tensor((2, 2))}, ()),), (), r"must return shape \(N,\), got"),
        ((Program("x", "x", {"x": Tensor((2,), dtype="int32")}, ()),), (), "must return float32"),
    ],
)
def test_what_is_no_cascade(stages, thresholds, message):
    with pytest.raises(ValueError, match=message):
        p.Cascade(stages, thresholds)


def test_a_confidence_is_a_number_for_each_answer():
    with pytest.raises(ValueError, match=r"confidence must be of shape \(2,\) to \(\), got \(2,\)"):
        p.Cascade((identity(2), identity(2)), 0.5, confidence=identity(2))


def test_a_share_is_a_fraction():
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 2"):
        p.Cascade((identity(2), identity(2)), 0.5, 2)


def test_parts_of_a_mixture_return_floats():
    gate = choices.coarse_gate()
    tensors = gate.tensors | {gate.output: Tensor((3,), dtype="int32")}
    with pytest.raises(ValueError, match="a choice must return float32, got float32, int32"):
        p.Mixture(dataclasses.replace(gate, tensors=tensors), (choices.part(1),) * 3)


def test_gate_and_experts_have_inputs_of_one_dtype():
    def part(dtype):
        tensors = {"x": p.Tensor((2,), None, dtype), "y": p.Tensor((2,))}
        return p.Program("x", "y", tensors, (p.Clip(("x",), "y", 0.0, 1.0),))

    with pytest.raises(ValueError, match=r"inputs of one dtype, got \['float32', 'uint8'\]"):
        p.Mixture(part("uint8"), (part("uint8"), part("float32")))

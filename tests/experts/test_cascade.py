import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts

# Probabilities of 3 experts for 4 inputs of 2 classes. Expert 0 is sure of input 0 alone at 0.8;
# of the others expert 1 is sure of inputs 1 and 0 at 0.7.
PROBABILITIES = jnp.array(
    [
        [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.4, 0.6]],
        [[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.55, 0.45]],
        [[0.1, 0.9], [0.1, 0.9], [0.2, 0.8], [0.5, 0.5]],
    ]
)
LOGITS = jnp.log(PROBABILITIES)
X = jax.random.normal(jax.random.key(0), (6, 5))

cascade = jax.jit(experts.cascade, static_argnums=2)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x)))


NETS = [Net(2), Net(4), Net(8)]


@functools.cache
def parameters():
    return [jax.jit(net.init)(jax.random.key(i), X) for i, net in enumerate(NETS)]


def linear(params, x):
    return x @ params


def test_confidences():
    # Of 6, 3 and 1 tenths: 0.6, and 0.6 - 0.3; of two equal ones 1/2 and 0.
    logits = jnp.log(jnp.array([[6.0, 3.0, 1.0], [1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(experts.max_probability(logits), [0.6, 0.5], rtol=1e-6)
    np.testing.assert_allclose(experts.margin(logits), [0.3, 0.0], atol=1e-6)


def test_hand_worked():
    # Thresholds 0.8 and 0.65: expert 0 keeps input 0 (0.9) and hands on 0.7, 0.5 and 0.6; expert 1
    # keeps input 1 (0.7) and hands on 0.6 and 0.55.
    got = cascade(LOGITS, jnp.array([0.8, 0.65]), experts.max_probability)
    np.testing.assert_array_equal(got.stage, [0, 1, 2, 2])
    np.testing.assert_array_equal(got.went_on, [3, 2])
    want = [LOGITS[0, 0], LOGITS[1, 1], LOGITS[2, 2], LOGITS[2, 3]]
    np.testing.assert_array_equal(got.logits, want)
    assert got.stage.dtype == got.went_on.dtype == jnp.int32
    # Costs 1, 2 and 4: 1 for all, 2 for three of four, 4 for two of four: 1 + 1.5 + 2.
    np.testing.assert_allclose(experts.cascade_cost(got, [1.0, 2.0, 4.0]), 4.5)


def test_a_share_of_the_answer_before():
    # Half of (log 7, log 3) beside (log 3, log 7): odds of (3 / 7) · √(7 / 3), a probability of
    # 0.6, so that input 1 goes on to the last: all but input 0 do.
    got = cascade(LOGITS, jnp.array([0.8, 0.65]), experts.max_probability, share=0.5)
    np.testing.assert_array_equal(got.stage, [0, 2, 2, 2])
    second = LOGITS[1] + 0.5 * LOGITS[0]
    np.testing.assert_allclose(got.logits[1:], (LOGITS[2] + 0.5 * second)[1:], rtol=1e-6)


def test_by_margin():
    # Margins of expert 0: 0.8, 0.4, 0, 0.2; of expert 1: 0.6, 0.4, 0.2, 0.1. At 0.3 for both:
    # inputs 0 and 1 stay with expert 0, the others go on to the last.
    got = cascade(LOGITS, 0.3, experts.margin)
    np.testing.assert_array_equal(got.stage, [0, 0, 2, 2])
    np.testing.assert_array_equal(got.went_on, [2, 2])


def test_an_expert_that_is_sure_answers_whatever_comes_after():
    # Expert 1 is unsure of input 0, but is not asked.
    logits = LOGITS.at[1, 0].set(0.0).at[2, 0].set(jnp.nan)
    got = cascade(logits, 0.8, experts.max_probability)
    assert got.stage[0] == 0
    np.testing.assert_array_equal(got.logits[0], LOGITS[0, 0])


@pytest.mark.parametrize(("threshold", "stage"), [(0.0, 0), (1.0, 2)])
def test_the_ends(threshold, stage):
    got = cascade(LOGITS, threshold, experts.max_probability)
    np.testing.assert_array_equal(got.stage, stage)
    np.testing.assert_array_equal(got.logits, LOGITS[stage])


def test_nan_is_the_answer_and_is_not_handed_on():
    logits = LOGITS.at[0, 2, 0].set(jnp.nan)
    got = cascade(logits, 0.8, experts.max_probability)
    assert got.stage[2] == 0
    assert np.isnan(got.logits[2]).any()
    edge = experts.cascade_edge([linear, linear], 0.9)
    got = jax.jit(edge)([jnp.full((5, 3), jnp.nan), jnp.ones((5, 3))], X)
    np.testing.assert_array_equal(got.stage, 0)
    assert np.isnan(got.logits).all()


@pytest.mark.parametrize(
    ("confidence", "threshold"),
    [(experts.max_probability, [0.6, 0.5]), (experts.margin, [0.33, 0.3])],
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_edge_gives_what_the_batch_gives(confidence, threshold, share):
    """With experts of different shapes; outputs, and gradients by their parameters."""
    fns = [net.apply for net in NETS]

    def edge(params):
        got = experts.cascade_edge(fns, threshold, confidence, share)(params, 2 * X)
        return jnp.square(got.logits).sum(), got

    def batch(params):
        logits = jnp.stack([fn(p, 2 * X) for fn, p in zip(fns, params, strict=True)])
        got = experts.cascade(logits, threshold, confidence, share=share)
        return jnp.square(got.logits).sum(), got

    results = [jax.jit(jax.value_and_grad(fn, has_aux=True))(parameters()) for fn in (edge, batch)]
    assert len(set(results[0][0][1].stage.tolist())) == 3  # or this shows little
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_the_edge_runs_what_it_needs():
    ran = []

    def expert(e):
        def fn(params, x):
            jax.debug.callback(lambda: ran.append(e))
            return params * x

        return fn

    edge = jax.jit(experts.cascade_edge([expert(e) for e in range(3)], [0.9, 0.9]))
    params = [jnp.float32(1), jnp.float32(2), jnp.float32(3)]
    # Logits (x, 0): e^x / (e^x + 1) is 0.95 at x = 3, 0.88 at 2, so input 2 needs the second
    # expert's 4 (0.98), and input 1 the third, after 1 (0.73) and 2.
    x = jnp.array([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    for i, stages in enumerate([[0], [0, 1, 2], [0, 1]]):
        answer = edge(params, x[i : i + 1])
        jax.effects_barrier()
        assert ran == stages
        assert answer.stage == stages[-1]
        ran.clear()
    answer = edge(params, x)
    jax.effects_barrier()
    assert ran == [0, 0, 1, 2, 0, 1]
    np.testing.assert_array_equal(answer.logits, [[3, 0], [3, 0], [4, 0]])
    np.testing.assert_array_equal(answer.went_on, [2, 1])
    # 1 for three, 2 for two of three, 6 for one of three: 1 + 4/3 + 2.
    np.testing.assert_allclose(experts.cascade_cost(answer, [1.0, 2.0, 6.0]), 13 / 3, rtol=1e-6)


def test_padding_is_not_counted():
    weight = jnp.array([0.0, 1.0, 0.0, 3.0])
    got = experts.cascade(LOGITS, 0.3, experts.margin, weight=weight)
    # Stages 0, 0, 2 and 2 (see above): of those that count one goes on, past both experts.
    np.testing.assert_array_equal(got.went_on, [1, 1])
    # Costs 1 for input 1 and 1 + 2 + 4 for input 3: (1 + 3 * 7) / 4.
    np.testing.assert_allclose(experts.cascade_cost(got, [1.0, 2.0, 4.0], weight=weight), 5.5)


def test_one_expert_answers_all():
    got = experts.cascade(LOGITS[:1], 0.8)
    np.testing.assert_array_equal(got.logits, LOGITS[0])
    assert got.went_on.shape == (0,)
    np.testing.assert_allclose(experts.cascade_cost(got, [5.0]), 5)
    edge = experts.cascade_edge([linear], 0.8)([jnp.eye(5)], X)
    np.testing.assert_array_equal(edge.logits, X)
    assert edge.went_on.shape == (0,)


def test_a_threshold_may_change_without_compiling():
    run = jax.jit(lambda threshold: experts.cascade(LOGITS, threshold).went_on.sum())
    counts = [int(run(jnp.float32(t))) for t in (0.0, 0.65, 0.95)]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1]
    assert run._cache_size() == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.3"):
        experts.cascade(LOGITS, 1.3)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got nan"):
        experts.cascade_edge([linear] * 2, jnp.nan)
    with pytest.raises(ValueError, match=r"threshold must .* shape \(2,\), .* got shape \(3,\)"):
        experts.cascade(LOGITS, [0.5] * 3)
    with pytest.raises(ValueError, match=r"the number of classes must be .* at least 2, got 1"):
        experts.cascade(LOGITS[..., :1], 0.5, experts.margin)
    with pytest.raises(ValueError, match="expert_fns must hold at least 1 function, got 0"):
        experts.cascade_edge([], 0.5)
    edge = experts.cascade_edge([linear] * 2, 0.5)
    with pytest.raises(ValueError, match="params_list must hold 2 pytrees, got 1"):
        edge([jnp.eye(5)], X)
    message = r"expert_fns\[1\] must return float32\[1, 5\] as the first does, got float32\[1, 3\]"
    with pytest.raises(ValueError, match=message):
        edge([jnp.eye(5), jnp.eye(5, 3)], X)
    with pytest.raises(ValueError, match=r"costs must have shape \(3,\), .* got \(2,\)"):
        experts.cascade_cost(experts.cascade(LOGITS, 0.5), [1.0, 2.0])

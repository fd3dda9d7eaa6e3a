import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from hybrid_jax import experts

# Every mean over inputs, as a function of gate logits (B, 3) and the inputs' weight.
MEANS = {
    "importance": lambda z, weight: experts.importance(z, weight=weight),
    "load": lambda z, weight: experts.load(z, z, 1, weight=weight),
    "entropy": lambda z, weight: experts.entropy(z, weight=weight),
    "z_loss": lambda z, weight: experts.z_loss(z, weight=weight),
    "cost": lambda z, weight: experts.expected_cost(z, [1.0, 2.0, 3.0], weight=weight),
    "loss": lambda z, weight: experts.expected_loss(z, z.T, weight=weight),
    "usage": lambda z, weight: experts.usage_entropy(experts.usage(z, weight=weight)),
    "per_class": lambda z, weight: experts.usage_per_class(
        z, jnp.zeros(len(z), jnp.int32), 2, weight=weight
    )[0, 0],
    "disagreement": lambda z, weight: experts.disagreement(
        jnp.stack([z, -z]), weight=weight
    ).mean(),
}
LOSSES = jnp.array([[1.0, 4.0], [3.0, 0.0]])  # of two experts on two inputs
LOGITS = jnp.array([[0.0, np.log(3.0)], [0.0, 0.0]])  # softmax: (1/4, 3/4), (1/2, 1/2)


@pytest.fixture(params=MEANS)
def mean(request):
    return MEANS[request.param]


def test_importance():
    # Totals (3, 1): mean 2, variance 1, so 1 / 2^2.
    weights = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(experts.importance(weights), 0.25)
    np.testing.assert_allclose(experts.importance(jnp.full((3, 4), 0.25)), 0)
    # All on one of E: totals (B, 0, ...): mean B/E, variance B^2 (1/E - 1/E^2), so E - 1.
    np.testing.assert_allclose(experts.importance(jnp.eye(4)[:1].repeat(5, 0)), 3, rtol=1e-6)


def test_load():
    # One input, logits (1, 0, -1), no noise drawn, k = 1, deviation 2. What each has to beat: the
    # best of the others: 0, 1, 1. So the chances are Phi(1/2), Phi(-1/2), Phi(-1).
    logits = jnp.array([[1.0, 0.0, -1.0]])
    chance = scipy.stats.norm.cdf([0.5, -0.5, -1.0])
    want = chance.var() / chance.mean() ** 2
    np.testing.assert_allclose(experts.load(logits, logits, 1, noise=2.0), want, rtol=1e-5)
    # k = 2: to beat is the second of the others: -1, -1, 0, so Phi(1), Phi(1/2), Phi(-1/2).
    chance = scipy.stats.norm.cdf([1.0, 0.5, -0.5])
    want = chance.var() / chance.mean() ** 2
    np.testing.assert_allclose(experts.load(logits, logits, 2, noise=2.0), want, rtol=1e-5)


def test_load_is_the_chance_over_new_noise(key):
    # A draw of all the noise, then of one expert's again: its chance to be the best.
    logits = jnp.array([[0.3, 0.0, -0.4]])
    scores = jnp.array([[0.1, 0.9, -0.2]])
    chance = []
    for e in range(3):
        other = jnp.delete(scores[0], e).max()
        drawn = logits[0, e] + 0.7 * jax.random.normal(jax.random.fold_in(key, e), (100_000,))
        chance.append(float((drawn > other).mean()))
    want = np.var(chance) / np.mean(chance) ** 2
    np.testing.assert_allclose(experts.load(logits, scores, 1, noise=0.7), want, rtol=0.05)


def test_load_gradient_evens():
    logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    gradient = jax.grad(lambda z: experts.load(z, logits, 1))(logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1] < 0).all()


@pytest.mark.parametrize("k", [0, 3])
def test_load_bad_k(k):
    with pytest.raises(ValueError, match=rf"k must be an integer in \[1, 2\], got {k}"):
        experts.load(jnp.zeros((1, 3)), jnp.zeros((1, 3)), k)


def test_load_of_one_expert():
    with pytest.raises(ValueError, match=r"the number of experts must be .* at least 2, got 1"):
        experts.load(jnp.zeros((3, 1)), jnp.zeros((3, 1)), 1)


def test_entropy():
    # (3/4, 1/4): log 4 - 3/4 log 3; and a sure one: 0. Their mean.
    logits = jnp.array([[jnp.log(3.0), 0.0], [1000.0, 0.0]])
    want = (np.log(4) - 0.75 * np.log(3)) / 2
    np.testing.assert_allclose(experts.entropy(logits), want, rtol=1e-6)
    assert np.isfinite(jax.grad(experts.entropy)(logits)).all()


def test_z_loss():
    # logsumexp(0, 0) = log 2 and logsumexp(log 3, 0) = log 4 = 2 log 2: (1 + 4) / 2 log^2 2.
    logits = jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0]])
    np.testing.assert_allclose(experts.z_loss(logits), 2.5 * np.log(2) ** 2, rtol=1e-6)


@pytest.mark.parametrize("loss", [experts.entropy, experts.z_loss])
def test_of_one_expert(loss):
    # One expert: sure (0), and logsumexp(z) = z: the mean of 4 and 0.
    want = {experts.entropy: 0, experts.z_loss: 2}[loss]
    np.testing.assert_allclose(loss(jnp.array([[2.0], [0.0]])), want, atol=1e-6)
    np.testing.assert_array_equal(experts.importance(jnp.ones((2, 1))), 0)


@pytest.mark.parametrize(
    "loss",
    [
        experts.importance,
        experts.entropy,
        experts.z_loss,
        lambda logits: experts.load(logits, logits, 1),
        lambda logits: experts.expected_cost(logits, [1.0, 2.0, 3.0]),
    ],
)
def test_nan_is_not_hidden(loss):
    assert np.isnan(loss(jnp.zeros((4, 3)).at[1, 2].set(jnp.nan)))


def test_padding_is_in_no_mean_and_no_gradient(mean, key):
    """Two inputs of weights 3 and 1 are four inputs, three of them the same; the padding is NaN."""
    two = jax.random.normal(key, (2, 3))
    padded = jnp.full((4, 3), jnp.nan).at[jnp.array([1, 3])].set(two)
    weight = jnp.array([0.0, 3.0, 0.0, 1.0])
    want = mean(two[jnp.array([0, 0, 0, 1])], None)
    got, gradient = jax.jit(jax.value_and_grad(mean))(padded, weight)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    alone = jax.grad(mean)(two, weight[jnp.array([1, 3])])
    np.testing.assert_allclose(gradient, jnp.zeros((4, 3)).at[jnp.array([1, 3])].set(alone), 1e-5)
    assert mean(padded, jnp.zeros(4)) == 0
    assert mean(two, jnp.array([True, False])) == pytest.approx(float(mean(two[:1], None)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_mean_over_half_precision_is_in_float32(mean, dtype, key):
    """4,096 inputs: a sum in bfloat16 stops at 256, and a share has 8 bits there."""
    logits = jax.random.normal(key, (4096, 3)).astype(dtype)
    got = mean(logits, None)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, mean(logits.astype(jnp.float32), None), rtol=1e-5)


def test_an_empty_batch_is_an_error(mean):
    with pytest.raises(ValueError, match="must be over at least one example, got shape"):
        mean(jnp.zeros((0, 3)), None)


def test_what_is_allowed_makes_no_nan():
    # No expert has any weight: all are equal. And one of 2, over the inputs that count.
    np.testing.assert_array_equal(experts.importance(jnp.zeros((3, 2))), 0)
    assert np.isfinite(jax.grad(experts.importance)(jnp.zeros((3, 2)))).all()
    # Expert 2 is ruled out: the entropy is that of 3/4 and 1/4.
    logits = jnp.array([[jnp.log(3.0), 0.0, -jnp.inf]])
    np.testing.assert_allclose(experts.entropy(logits), np.log(4) - 0.75 * np.log(3), rtol=1e-6)
    # Two are ruled out and two chosen: chances 1, 0 and 0, so E - 1.
    logits = jnp.array([[1.0, -jnp.inf, -jnp.inf]])
    np.testing.assert_allclose(experts.load(logits, logits, 2), 2, rtol=1e-6)
    for loss in (experts.entropy, experts.z_loss):
        assert np.isfinite(loss(logits))
        assert np.isfinite(jax.grad(loss)(logits)).all()
    assert np.isfinite(jax.grad(lambda z: experts.load(z, z, 2))(logits)).all()
    with pytest.raises(ValueError, match=r"losses must have shape \(2, 3\), got \(2, 3, 1\)"):
        experts.expected_loss(jnp.zeros((3, 2)), jnp.zeros((2, 3, 1)))


@pytest.mark.parametrize(
    ("routing", "value"),
    [
        # (1/4 + 9/4 + 2 + 0) / 2; and of the chosen ones, (3 + 4) / 2 with the tie to the first.
        (experts.soft(), 2.25),
        (experts.straight_through(experts.top_k(1)), 3.5),
    ],
    ids=["soft", "top_1"],
)
def test_expected_loss_and_what_the_gate_learns(routing, value):
    def loss(logits):
        return experts.expected_loss(routing(logits).weights, LOSSES)

    got, gradient = jax.value_and_grad(loss)(LOGITS)
    assert got == pytest.approx(value)
    # Input 0 expects 5/2: 1/4 (1 - 5/2) and 3/4 (3 - 5/2). Input 1 expects 2: 1/2 (4 - 2) and
    # 1/2 (0 - 2). Half of each, for the mean over two inputs.
    np.testing.assert_allclose(gradient, [[-3 / 16, 3 / 16], [1 / 2, -1 / 2]], rtol=1e-6)


def test_an_expert_that_is_not_chosen_learns_nothing():
    weights = experts.top_k(1)(LOGITS).weights  # expert 1, then expert 0
    gradient = jax.grad(lambda losses: experts.expected_loss(weights, losses))(LOSSES)
    np.testing.assert_array_equal(gradient, [[0.0, 0.5], [0.5, 0.0]])

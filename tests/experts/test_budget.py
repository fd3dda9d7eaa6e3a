import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import experts

COSTS = jnp.array([1.0, 3.0])
LOGITS = jnp.array([[0.0, 0.0], [0.0, 3.0]])

expected_cost = jax.jit(experts.expected_cost)
update = jax.jit(experts.budget_update)


def test_expected_cost():
    # (3/4, 1/4) and (1/2, 1/2) of costs 8 and 4: 7 and 6.
    logits = jnp.array([[jnp.log(3.0), 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(expected_cost(logits, jnp.array([8.0, 4.0])), 6.5)


def test_cost_aware():
    # Costs 1 and 3 at 1 logit per unit: (-1, -3) and (-1, 0).
    routed = experts.cost_aware(experts.top_k(1), COSTS, 1.0)(LOGITS)
    np.testing.assert_array_equal(routed.scores, [[-1, -3], [-1, 0]])
    np.testing.assert_array_equal(routed.weights, [[1, 0], [0, 1]])
    # At 2 logits per unit: (-2, -6) and (-2, -3), all to the cheap one.
    dear = experts.cost_aware(experts.top_k(1), COSTS, 2.0)(LOGITS)
    np.testing.assert_array_equal(dear.weights, [[1, 0], [1, 0]])
    free = experts.cost_aware(experts.soft(), COSTS, 0)(LOGITS)
    np.testing.assert_array_equal(free.weights, experts.soft()(LOGITS).weights)


def test_a_price_may_change_without_compiling(key):
    @jax.jit
    def cost(weight, costs):
        routing = experts.cost_aware(experts.noisy_top_k(1), costs, weight)
        return experts.expected_cost(routing(LOGITS, key).scores, costs)

    prices = [float(cost(jnp.float32(weight), COSTS)) for weight in (0.0, 0.5, 2.0)]
    assert prices == sorted(prices, reverse=True)
    assert prices[0] > prices[-1]
    assert cost._cache_size() == 1
    assert np.isnan(cost(jnp.float32(jnp.nan), COSTS))


def test_update():
    # 0.1 + 0.5 (2 - 1.5) = 0.35; 0.1 + 0.5 (1 - 1.5) = -0.15, so 0.
    price = 0.1
    np.testing.assert_allclose(experts.budget_update(price, 2.0, 1.5, 0.5), 0.35)
    np.testing.assert_array_equal(experts.budget_update(price, 1.0, 1.5, 0.5), 0)


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.floats(0, 1e6, width=32), st.floats(0, 1e6, width=32))
def test_the_price_is_never_negative_and_rises_only_above_the_budget(cost, budget):
    price = jnp.float32(1.0)
    price = update(price, cost, budget)
    assert price >= 0
    assert (price > 1) <= (cost > budget)
    assert (price < 1) <= (cost < budget)
    assert price.dtype == jnp.float32


def test_nan_is_passed_on():
    assert np.isnan(update(jnp.float32(0), jnp.nan, 1.0))


def test_the_price_settles_where_the_budget_is_kept():
    """Without training: the price alone moves the choice."""
    # Logits (0, 0), costs (1, 3): at price w the dear one has probability 1 / (1 + e^(2 w)) and
    # the cost is 1 + 2 / (1 + e^(2 w)). It is 1.5 where e^(2 w) = 3: w = log(3) / 2.
    logits = jnp.zeros((1, 2))

    @jax.jit
    def step(price):
        routing = experts.cost_aware(experts.soft(), COSTS, price)
        cost = experts.expected_cost(routing(logits).scores, COSTS)
        return experts.budget_update(price, cost, 1.5, rate=0.5), cost

    price = jnp.float32(0)
    for _ in range(60):
        price, cost = step(price)
    np.testing.assert_allclose(cost, 1.5, atol=1e-4)
    np.testing.assert_allclose(price, np.log(3) / 2, atol=1e-4)
    assert step._cache_size() == 1


def test_the_price_settles_for_a_hard_choice_too(key):
    """What top-1 really takes, on many inputs, which the expected cost would not tell."""
    logits, costs = 3 * jax.random.normal(key, (2000, 3)), jnp.array([1.0, 2.0, 4.0])

    @jax.jit
    def step(price):
        weights = experts.cost_aware(experts.top_k(1), costs, price)(logits).weights
        cost = (weights @ costs).mean()
        return experts.budget_update(price, cost, 1.6, rate=0.2), cost

    price, first = step(jnp.float32(0))
    for _ in range(100):
        price, cost = step(price)
    np.testing.assert_allclose(first, 7 / 3, atol=0.1)  # without a price, an even choice
    np.testing.assert_allclose(cost, 1.6, atol=0.01)


@pytest.mark.parametrize(("budget", "share", "wanted"), [(2.0, 0.5, 0.25), (2.8, 0.75, 0.0)])
def test_a_gate_learns_to_keep_the_budget(budget, share, wanted):
    """Gradient descent on the gate, ascent on the price."""
    # The dear expert's share p costs 1 + 2 p and the task loss is (p - 3/4)^2: least at 3/4, which
    # costs 2.5. A budget of 2.8 does not bind: price 0. One of 2 does, with p = 1/2: there
    # 2 (p - 3/4) + 2 w = 0, so w = 1/4.
    tx = optax.sgd(0.5)

    def loss(logits, price):
        share = jax.nn.softmax(logits)[0, 1]
        cost = experts.expected_cost(logits, COSTS)
        return jnp.square(share - 0.75) + price * (cost - budget), cost

    @jax.jit
    def step(logits, opt_state, price):
        gradient, cost = jax.grad(loss, has_aux=True)(logits, price)
        updates, opt_state = tx.update(gradient, opt_state)
        price = experts.budget_update(price, cost, budget, rate=0.1)
        return optax.apply_updates(logits, updates), opt_state, price, cost

    logits, price = jnp.zeros((1, 2)), jnp.float32(0)
    opt_state = tx.init(logits)
    for _ in range(400):
        logits, opt_state, price, cost = step(logits, opt_state, price)
    np.testing.assert_allclose(jax.nn.softmax(logits)[0, 1], share, atol=1e-2)
    np.testing.assert_allclose(price, wanted, atol=1e-2)
    assert cost <= budget + 1e-2


@pytest.mark.parametrize("price", [-1.0, jnp.nan, jnp.inf])
def test_bad_price(price):
    with pytest.raises(ValueError, match=f"price must be a finite .* at least 0, got {price}"):
        experts.cost_aware(experts.soft(), COSTS, price)


def test_bad_costs_and_rate():
    message = r"costs must have shape \(2,\), one for each expert, got \(1,\)"
    with pytest.raises(ValueError, match=message):
        experts.expected_cost(LOGITS, [1.0])
    with pytest.raises(ValueError, match=message):
        experts.cost_aware(experts.soft(), COSTS[:1], 1.0)(LOGITS)
    with pytest.raises(ValueError, match="rate must be a finite number above 0, got 0"):
        experts.budget_update(jnp.float32(0), 1.0, 1.0, rate=0)

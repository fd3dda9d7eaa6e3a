"""What the chosen experts cost: the expected cost, a price on it, and a budget that sets the price.

The price is a Lagrange multiplier: at a price w per unit of cost, the softmax of `logits - w costs`
is what maximizes expected logit + entropy - w expected cost. Dual ascent raises it while the cost
is above the budget, and lowers it, down to zero, while it is below.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.experts.routing import Routing


def expected_cost(
    logits: jax.Array, costs: Sequence[float] | jax.Array, *, weight: jax.Array | None = None
) -> jax.Array:
    """Mean over inputs of the cost of one expert drawn with the gate's probabilities.

    `logits` are `(B, E)`, of `cost_aware` the `Routed.scores`; `costs` `(E,)`, as MACs or BOPs of
    each expert, in any unit; `weight` `(B,)` that of each input in the mean, and one of weight 0
    may hold anything.
    """
    probabilities = jax.nn.softmax(core.selected(core.widen(logits), weight))
    costs = check_costs(costs, logits.shape[-1]).astype(probabilities.dtype)
    return core.weighted_mean((probabilities * costs[None]).sum(-1), weight)


def cost_aware(
    routing: Routing, costs: Sequence[float] | jax.Array, price: float | jax.Array
) -> Routing:
    """`routing` by the logits less price · cost, so that a dear expert must be that much better.

    For the edge the same shift goes into the gate: `one_of(fns, lambda g, x: gate(g, x) - price *
    costs)`.

    `costs` `(E,)` are of each expert; as shares of the parent's they keep `price`, the logits per
    unit of cost, of the order of the logits. It may be traced, as that of `budget_update` is.

    Example:
      >>> from hybrid_jax.experts import top_k
      >>> logits = jnp.array([[0.0, 1.0], [0.0, 3.0]])
      >>> cost_aware(top_k(1), costs=[1.0, 3.0], price=1.0)(logits).weights
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    if not isinstance(price, jax.core.Tracer) and not 0 <= float(price) < float("inf"):
        raise ValueError(f"price must be a finite number of at least 0, got {price}")

    def route(logits, key=None, weight=None):
        paid = jnp.asarray(price, jnp.float32) * check_costs(costs, logits.shape[-1])
        return routing(logits - paid[None].astype(logits.dtype), key, weight)

    return route


def budget_update(
    price: float | jax.Array,
    cost: float | jax.Array,
    budget: float | jax.Array,
    rate: float = 0.1,
) -> jax.Array:
    """One step of projected dual ascent: price + rate · (cost - budget), at least 0, float32 ().

    The first price is 0: cost does not count until it is above the budget. Two ways to pay it, not
    to be joined: `cost_aware(routing, costs, price)`, which needs no training, or a loss term
    `price * (expected_cost(logits, costs) - budget)`, from which the gate learns (differentiate by
    its parameters alone). While the mean cost is not at the budget the price moves, so that where
    the steps settle the budget is kept; too large a `rate`, the price swings. A `budget` below the
    cheapest expert's cost cannot be kept: the price grows without end. `cost`, float (), is the
    mean of a batch: `expected_cost`, or with one-hot weights what the routing really takes,
    `(weights @ costs).mean()`; NaN makes the price NaN.

    Source: gradient descent-ascent on the Lagrangian, as Gallego-Posada et al., Controlled Sparsity
    via Constrained Optimization, arXiv 2208.04425.

    Example:
      >>> budget_update(0.0, cost=2.0, budget=1.5, rate=0.5)
      Array(0.25, dtype=float32)
      >>> budget_update(0.25, cost=0.5, budget=1.5, rate=0.5)
      Array(0., dtype=float32)
    """
    rate = core.check_positive("rate", rate)
    excess = jnp.asarray(cost, jnp.float32) - jnp.asarray(budget, jnp.float32)
    return jnp.maximum(jnp.asarray(price, jnp.float32) + rate * excess, 0.0)


def check_costs(costs: Sequence[float] | jax.Array, num_experts: int) -> jax.Array:
    """Returns the costs in float32, or raises ValueError if they are not `(E,)`."""
    if np.shape(costs) != (num_experts,):
        raise ValueError(
            f"costs must have shape {(num_experts,)}, one for each expert, got {np.shape(costs)}"
        )
    return jnp.asarray(costs, jnp.float32)

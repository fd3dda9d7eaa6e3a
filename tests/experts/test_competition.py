import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts

LOSSES = jnp.array([[1.0, 4.0], [3.0, 0.0]])  # of two experts on two inputs
LOGITS = jnp.array([[0.0, np.log(3.0)], [0.0, 0.0]])  # softmax: (1/4, 3/4), (1/2, 1/2)


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

"""Re-estimated statistics are those of all images together."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import training


class Normalized(nn.Module):
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)
        return norm(x).mean((1, 2))


def make_forward(model, train=True):
    def forward(params, state, images, key):
        variables = params | {"batch_stats": state["batch_stats"]}
        logits, new = model.apply(variables, images, train=train, mutable=["batch_stats"])
        return logits, state | new

    return forward


def setup(momentum):
    model = Normalized(momentum)
    variables = model.init(jax.random.key(0), jnp.zeros((2, 1, 1, 1)), train=False)
    state = {"batch_stats": variables["batch_stats"], "bits": jnp.int32(4)}
    return model, {"params": variables["params"]}, state


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_by_hand(momentum):
    """Batches (1, 3) and (5, 11): means 2 and 8, variances 1 and 9.

    All four: mean 5, variance (16 + 4 + 0 + 36) / 4 = 14 = (1 + 9) / 2 + 3².
    """
    model, params, state = setup(momentum)
    batches = [jnp.reshape(jnp.array(x), (2, 1, 1, 1)) for x in ([1.0, 3.0], [5.0, 11.0])]
    new = training.reestimate_batchnorm(make_forward(model), params, state, batches)
    layer = new["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(layer["mean"], [5.0], rtol=1e-5)
    np.testing.assert_allclose(layer["var"], [14.0], rtol=1e-5)
    assert new["bits"] == 4
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize("sizes", [(9,), (3, 3, 3), (8, 1), (1, 8), (2, 3, 4)])
def test_batches_are_weighed_by_size(sizes):
    """0, 1, 4, ..., 64: mean 204/9, mean square 8772/9, however they are divided."""
    model, params, state = setup(0.9)
    images = np.square(np.arange(9.0, dtype=np.float32)).reshape(9, 1, 1, 1)
    batches = np.split(images, np.cumsum(sizes)[:-1])
    new = training.reestimate_batchnorm(make_forward(model), params, state, batches)
    layer = new["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(layer["mean"], [204 / 9], rtol=1e-5)
    np.testing.assert_allclose(layer["var"], [8772 / 9 - (204 / 9) ** 2], rtol=1e-4)


def test_narrow_statistics_are_summed_in_float32():
    """A thousand batches of ones after one of 0: in bfloat16 a step of 1/1000 changes nothing."""

    def forward(params, state, x, key):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return None, {
            "mean": 0.9 * state["mean"] + 0.1 * mean,
            "var": 0.9 * state["var"] + 0.1 * var,
        }

    state = {"mean": jnp.zeros(1, jnp.bfloat16), "var": jnp.ones(1, jnp.bfloat16)}
    batches = [jnp.full((1, 1, 1, 1), float(value > 0)) for value in range(1001)]
    new = training.reestimate_batchnorm(forward, {}, state, batches)
    assert new["mean"].dtype == new["var"].dtype == jnp.bfloat16
    np.testing.assert_allclose(new["mean"].astype(jnp.float32), [1000 / 1001], rtol=0.004)
    np.testing.assert_allclose(new["var"].astype(jnp.float32), [1000 / 1001**2], rtol=0.004)


def test_many_batches_far_from_zero():
    """Twenty batches with mean 1000 and deviation 1: no cancellation, no forgetting."""
    images = np.random.default_rng(0).normal(1000, 1, (20, 8, 2, 2, 3)).astype(np.float32)
    # Linen's fast variance, E[x²] - E[x]², would itself cancel here.
    forward = lambda params, state, x, key: (  # noqa: E731
        None,
        jax.tree.map(
            lambda old, new: 0.9 * old + 0.1 * new,
            state,
            {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))},
        ),
    )
    start = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    new = training.reestimate_batchnorm(forward, {}, start, iter(images))
    exact = images.astype(np.float64)
    np.testing.assert_allclose(new["mean"], exact.mean((0, 1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(new["var"], exact.var((0, 1, 2, 3)), rtol=1e-3)


def test_a_stack_is_each_expert(tiny):
    """Experts differ in their first convolution, hence in their statistics; dropout draws keys."""
    images = np.random.default_rng(0).normal(size=(3, 4, 6, 6, 2)).astype(np.float32)
    states = [tiny.make_state(seed) for seed in (0, 1)]
    stack = training.stack_states(states)
    forward = jax.vmap(tiny.forward, in_axes=(0, 0, None, None))
    key = jax.random.key(0)
    new = training.reestimate_batchnorm(forward, stack.params, stack.state, images, key)
    for index, one in enumerate(states):
        alone = training.reestimate_batchnorm(tiny.forward, one.params, one.state, images, key)
        tiny.assert_close(jax.tree.map(lambda x, i=index: x[i], new), alone)


def test_errors_name_the_argument():
    model, params, state = setup(0.9)
    batch = jnp.ones((2, 1, 1, 1))
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        training.reestimate_batchnorm(make_forward(model), params, state, [])
    with pytest.raises(ValueError, match="every batch must hold an example, got none in batch 2"):
        training.reestimate_batchnorm(make_forward(model), params, state, [batch, batch[:0]])
    with pytest.raises(ValueError, match="forward must update running statistics in state, got ev"):
        training.reestimate_batchnorm(make_forward(model, train=False), params, state, [batch])
    mean, var = (f"batch_stats/BatchNorm_0/{name}" for name in ("mean", "var"))
    for statistics, match in [
        ({"none": None}, "statistics must give None, or .*, got 'none': None"),
        ({var: mean}, "statistics must give None, or the path of a mean, .*, got .*mean'$"),
        ({mean: None, var: var}, "statistics must give None, or the path of a mean"),
        ({mean: None, "bits": mean}, "statistics must pair equal shapes, got 'bits'"),
    ]:
        with pytest.raises(ValueError, match=match):
            training.reestimate_batchnorm(
                make_forward(model), params, state, [batch], statistics=statistics
            )
    still = {mean: None, var: mean}
    with pytest.raises(
        ValueError, match=r"forward must update the running statistic '.*mean', got"
    ):
        training.reestimate_batchnorm(
            make_forward(model, train=False), params, state, [batch], statistics=still
        )

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hybrid_jax import core, cost, models


def test_residual_network_by_hand():
    model = models.create("resnet20", 10)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    graph = core.trace(model.apply, variables, images)
    # Worst in the first stage: a block's input (kept for the shortcut), and input and output of
    # its second convolution, each 32·32·16 = 16,384 values.
    assert cost.peak_activation_bytes(graph) == 3 * 16_384 * 4
    bits = {site.name: 8 for site in graph.sites}
    assert cost.peak_activation_bytes(graph, bits) == 3 * 16_384
    assert cost.count(graph, None, bits, bits).peak_activation_bytes == 3 * 16_384


def test_mixed_widths_by_hand():
    params = {"a": jnp.ones((4, 100)), "b": jnp.ones((100, 50)), "c": jnp.ones((50, 2))}

    def fn(params, x):
        x = jax.nn.relu(x @ params["a"])
        x = jax.nn.relu(x @ params["b"])
        return x @ params["c"]

    graph = core.trace(fn, params, jnp.ones((1, 4)))
    # a: 4 + 100 values; b: 100 + 50; c: 50 + 2.
    assert cost.peak_activation_bytes(graph) == 150 * 4
    # What a reads takes 1 byte each, b 2 bytes (of 16 bits), c 4: 100·2 + 50·4.
    assert cost.peak_activation_bytes(graph, {"a": 8, "b": 16}) == 100 * 2 + 50 * 4
    # 4 bits pack two to a byte: 100·4/8 + 50·4/8.
    assert cost.peak_activation_bytes(graph, {"a": 4, "b": 4, "c": 4}) == 50 + 25


def test_what_comes_from_parameters_alone_is_no_activation():
    def fn(params, x):
        kernel = jnp.tanh(params["w"]) / jnp.abs(params["w"]).max()
        return x @ kernel

    graph = core.trace(fn, {"w": jnp.ones((1000, 2))}, jnp.ones((1, 1000)))
    assert cost.peak_activation_bytes(graph) == (1000 + 2) * 4


def test_equal_calls_do_not_share_values():
    # Both calls of the jitted function have one jaxpr; their values are two.
    @jax.jit
    def square(x):
        return jnp.concatenate([x, x], axis=1)[:, :10] * x

    def fn(params, x):
        return square(square(x)) @ params["w"]

    graph = core.trace(fn, {"w": jnp.ones((10, 1))}, jnp.ones((2, 10)))
    # The worst: x for the product, 20 values, and the 10 cut from them.
    assert cost.peak_activation_bytes(graph) == 40 * 4


@pytest.mark.parametrize("length", [1, 5])
def test_scan_holds_one_iteration(length):
    params = {"w": jnp.ones((length, 8, 8))}

    def fn(params, x):
        def body(x, w):
            wide = jnp.concatenate([x, x, x], axis=1)
            return (wide[:, 4:12]) @ w, None

        return lax.scan(body, x, params["w"])[0]

    graph = core.trace(fn, params, jnp.ones((1, 8)))
    # The carry, in place whatever the length, and beside it 24 values in the body.
    assert cost.peak_activation_bytes(graph) == (8 + 24) * 4


def test_cond_holds_the_larger_branch():
    def fn(params, x):
        def wide(x):
            return jnp.concatenate([x, x, x], axis=1)[:, :8] @ params["w"]

        return lax.cond(x[0, 0] > 0, wide, lambda x: x @ params["w"], x)

    graph = core.trace(fn, {"w": jnp.ones((8, 8))}, jnp.ones((1, 8)))
    # The predicate (an index of 4 bytes), the input, whose place the output takes, and 24 values
    # inside.
    assert cost.peak_activation_bytes(graph) == (1 + 8 + 24) * 4

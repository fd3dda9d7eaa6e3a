import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from hybrid_jax import core, cost


def network(params, x):
    x = lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x + params["bias"].reshape(1, 1, 1, -1))
    return x.mean((1, 2)) @ params["head"]


PARAMS = {"conv": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4), "head": jnp.ones((4, 5))}
GRAPH = core.trace(network, PARAMS, jnp.ones((3, 6, 6, 2)))


def test_masks_and_bits_by_hand():
    conv = np.ones((3, 3, 2, 4), bool)
    conv[..., 1] = False  # one of four output channels
    conv[0, 0, 0] = False  # one tap of the three others
    masks = {"conv": conv, "bias": optax.MaskedNode(), "head": optax.MaskedNode()}
    found = cost.count(GRAPH, masks, {"conv": 4, "head": 8}, {"conv": 8})
    first, last = found.sites
    # 72 weights, less 18, less 3: 51 kept, each used at 36 places.
    assert (first.nonzero, first.macs, first.dense_macs) == (51, 51 * 36, 72 * 36)
    assert first.sparsity == pytest.approx(21 / 72)
    assert (first.bops, last.bops) == (51 * 36 * 4 * 8, 20 * 8 * 32)
    assert found.bops == first.bops + last.bops
    assert found.macs == 51 * 36 + 20
    # conv: 72·4 bits, zeros included, are 36 bytes; four scales of 4 bytes.
    assert first.bytes == 36 + 16
    # head: 20 bytes and five scales; bias: 4 floats.
    assert last.bytes == 20 + 20
    assert found.bytes == 52 + 40 + 16
    assert (found.parameters, found.nonzero) == (96, 75)


def test_scales_by_hand():
    bits = {"conv": 4, "head": 8}
    # conv: 72 weights of 4 bits, 36 bytes; head: 20 bytes; bias: 16. Scales of 4 bytes: conv one
    # per tensor; head has 5 channels, and in groups of 2 of its 4 inputs 5·2.
    for scales, stored in [
        (None, (36 + 4 * 4, 20 + 5 * 4)),
        ({"conv": 1}, (36 + 4, 20 + 5 * 4)),
        ({"conv": 1, "head": 10}, (36 + 4, 20 + 10 * 4)),
    ]:
        found = cost.count(GRAPH, None, bits, scales=scales)
        assert tuple(site.bytes for site in found.sites) == stored
        assert found.bytes == sum(stored) + 16
    # A kernel of floats has none.
    assert cost.count(GRAPH, scales={"conv": 1, "head": 10}) == cost.count(GRAPH)


def test_no_masks_in_any_form_is_dense():
    dense = cost.count(GRAPH)
    masked_nodes = jax.tree.map(lambda _: optax.MaskedNode(), PARAMS)
    everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), PARAMS)
    for masks in ({}, masked_nodes, everything):
        assert cost.count(GRAPH, masks) == dense


def test_a_kernel_of_two_sites_is_stored_once_at_its_largest_width():
    graph = core.trace(
        lambda p, x: (x @ p["w"]) @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((1, 4))
    )
    found = cost.count(graph, weight_bits={"w": 4, "w#2": 8})
    # 16 weights of 8 bits and four scales of 4 bytes.
    assert found.bytes == 16 + 16
    # The most that a site has: eight.
    scales = {"w": 1, "w#2": 8}
    assert cost.count(graph, weight_bits={"w": 4, "w#2": 8}, scales=scales).bytes == 16 + 8 * 4
    assert [site.weight_bits for site in found.sites] == [8, 8]
    assert found.bops == 2 * 16 * 8 * 32


def test_batch_statistics_are_stored_but_no_parameters():
    variables = {"params": {"w": jnp.ones((4, 2))}, "batch_stats": {"mean": jnp.ones(2)}}

    def fn(variables, x):
        return x @ variables["params"]["w"] - variables["batch_stats"]["mean"][None]

    found = cost.count(core.trace(fn, variables, jnp.ones((1, 4))))
    assert (found.parameters, found.bytes) == (8, 4 * 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": {"conv": 0}}, r"weight_bits of 'conv' must be .*\[1, 32\], got 0"),
        ({"activation_bits": {"conv": 4.0}}, "activation_bits of 'conv' must be .*, got 4.0"),
        ({"weight_bits": {"cnv": 8}}, "site of weight_bits must .* did you mean conv"),
        ({"scales": {"cnv": 1}}, "site of scales must .* did you mean conv"),
        ({"scales": {"conv": -1}}, "scales of 'conv' must be an integer of at least 0, got -1"),
        ({"masks": {"cnv": np.ones(2, bool)}}, "path of masks must .* did you mean conv"),
        ({"masks": {"bias": np.ones(5, bool)}}, r"masks must have shape \(4,\) at 'bias', got"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cost.count(GRAPH, **arguments)

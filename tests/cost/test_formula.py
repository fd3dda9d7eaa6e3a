import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import core, cost, models

NETWORKS = {
    "residual, padded": ("resnet8", {"blocks": (1, 1), "widths": (4, 6)}),
    "residual, projected": (
        "resnet8",
        {"blocks": (2, 1), "widths": (4, 6), "shortcut": "project"},
    ),
    "bottleneck": ("resnet50", {"blocks": (1, 1), "widths": (4, 6), "stem": "cifar"}),
    "depthwise": ("mobilenet_v2", {"stages": ((1, 4, 1, 1), (3, 6, 2, 2)), "stem": "cifar"}),
    "concatenating": ("densenet40", {"blocks": (2, 2), "growth": 3}),
    "flattened": ("vgg16_bn", {"widths": ((4, 6), (6,))}),
}


def shrunk(fn, params, x, groups, widths):
    """The network with the first channels of each group, from shapes alone."""
    keep = {group.name: np.arange(group.size) < widths[group.name] for group in groups}
    small_fn, small, _ = core.shrink(fn, params, core.expand(keep, groups, params), x)
    return core.trace(small_fn, small, x)


@pytest.mark.parametrize("network", NETWORKS)
def test_equals_what_is_counted_on_the_shrunk_network(network):
    name, overrides = NETWORKS[network]
    model = models.create(name, 5, **overrides)
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    graph = core.trace(model.apply, params, x)
    formula = cost.formula(graph)
    assert formula.widths == {group.name: group.size for group in graph.groups}
    rng = np.random.default_rng(0)
    names = [site.name for site in graph.sites]
    for _ in range(3):
        widths = {name: int(rng.integers(1, n + 1)) for name, n in formula.widths.items()}
        weight, activation = (
            {name: int(rng.choice([2, 3, 4, 8, 32])) for name in names} for _ in range(2)
        )
        found = cost.count(
            shrunk(model.apply, params, x, graph.groups, widths), None, weight, activation
        )
        planned = formula.count(widths, weight, activation)
        assert set(planned) == {"macs", "bops", "bytes"}
        assert planned == {name: getattr(found, name) for name in planned}


def mlp(params, x):
    return jax.nn.relu(x @ params["a"] + params["bias"]) @ params["b"]


MLP = {"a": jnp.ones((3, 10)), "bias": jnp.ones((1, 10)), "b": jnp.ones((10, 2))}


def test_by_hand():
    formula = cost.formula(core.trace(mlp, MLP, jnp.ones((1, 3))))
    found = formula.count({"a": 5}, {"a": 3, "b": 4}, {"a": 8, "b": 4})
    # MACs 3·5 + 5·2; BOPs 15·3·8 + 10·4·4. Bytes: 15·3 bits are 6 bytes, 5 scales; 5 floats;
    # 10·4 bits are 5 bytes, 2 scales.
    assert found == {"macs": 25, "bops": 520, "bytes": 6 + 20 + 20 + 5 + 8}


def test_masks_are_counted_and_fix_the_widths():
    graph = core.trace(mlp, MLP, jnp.ones((1, 3)))
    masks = {"a": jnp.arange(30).reshape(3, 10) % 5 == 0}
    formula = cost.formula(graph, masks)
    assert formula.widths == {}
    # Of a 6 of 30 stay. They take no MACs, but their bits.
    found = formula.count(None, {"a": 8, "b": 4}, {"a": 8, "b": 4})
    assert (found["macs"], found["bops"]) == (6 + 20, 6 * 8 * 8 + 20 * 4 * 4)
    assert found["bytes"] == 30 + 10 * 4 + 10 * 4 + 10 + 2 * 4
    with pytest.raises(ValueError, match="group of widths must be one of"):
        formula.count({"a": 3})


def test_scales_by_hand():
    graph = core.trace(mlp, MLP, jnp.ones((1, 3)))
    bits, floats = {"a": 8, "b": 8}, 4 * 10
    # One scale for a; one for each of the 2 channels of b, or 2 for each in groups of 5.
    tensor = cost.formula(graph, scales={"a": 1})
    groups = cost.formula(graph, scales={"a": 1, "b": 4})
    assert tensor.count(None, bits)["bytes"] == 30 + 4 + floats + 20 + 2 * 4
    assert groups.count(None, bits)["bytes"] == 30 + 4 + floats + 20 + 4 * 4
    assert groups.count() == cost.formula(graph).count()
    # One per tensor stays one at every width; of groups it is not known.
    assert tensor.count({"a": 5}, bits)["bytes"] == 15 + 4 + 4 * 5 + 10 + 2 * 4
    assert groups.widths == {}
    with pytest.raises(ValueError, match="group of widths must be one of"):
        groups.count({"a": 5})
    # One for each of a's ten channels goes with them.
    channels = cost.formula(graph, scales={"a": 10, "b": 2})
    assert channels.count({"a": 5}, bits) == cost.formula(graph).count({"a": 5}, bits)
    with pytest.raises(ValueError, match="site of scales must be one of a, b, got 'c'"):
        cost.formula(graph, scales={"c": 1})


def test_a_shared_kernel_is_stored_once():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    graph = core.trace(fn, {"w": jnp.ones((4, 4))}, jnp.ones((1, 4)))
    formula = cost.formula(graph)
    bits = {"w": 3, "w#2": 3}
    assert formula.count(None, bits)["bytes"] == cost.count(graph, None, bits).bytes == 6 + 16
    # Of several sites it has the largest bits.
    assert formula.count(None, {"w": 3}) == formula.count()


def test_sites_of_derivative_rules_do_not_count():
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    @product.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return x @ w, dx @ w + x @ dw

    params = {"w": jnp.ones((4, 5))}
    graph = core.trace(lambda params, x: product(x, params["w"]), params, jnp.ones((1, 4)))
    assert cost.formula(graph).count()["macs"] == cost.count(graph).macs == 20


def test_kernels_of_a_loop():
    def fn(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    graph = core.trace(fn, {"w": jnp.ones((3, 8, 8))}, jnp.ones((1, 8)))
    formula = cost.formula(graph)
    # Three kernels of 64 weights, and as many scales as output channels.
    assert formula.count(None, {"w": 4}, {"w": 4}) == {
        "macs": 3 * 64,
        "bops": 3 * 64 * 4 * 4,
        "bytes": 3 * 32 + 3 * 8 * 4,
    }


def test_products_of_two_activations_are_counted_and_fix_the_widths():
    def fn(params, x):
        y = x @ params["w"]
        return (y @ y.T) @ params["v"]

    graph = core.trace(fn, {"w": jnp.ones((3, 6)), "v": jnp.ones((2, 2))}, jnp.ones((2, 3)))
    formula = cost.formula(graph)
    assert formula.widths == {}
    # For one of two examples: 3·6, half of 2·6·2 and of 2·2·2; the second of two activations.
    found = formula.count(None, {"w": 8, "v": 8}, {"w": 8, "v": 8})
    assert (found["macs"], found["bops"]) == (18 + 12 + 4, (18 + 4) * 64 + 12 * 32 * 32)


def test_channels_that_an_array_holds_in_part():
    def fn(params, x):
        y = jax.nn.relu(x @ params["a"])
        return y @ params["b"] + y[:, :3] @ params["c"]

    params = {"a": jnp.ones((2, 6)), "b": jnp.ones((6, 2)), "c": jnp.ones((3, 2))}
    # Channels with and without c are two groups of three, and whole in every array.
    assert cost.formula(core.trace(fn, params, jnp.ones((1, 2)))).widths == {"a": 3, "a#2": 3}

    def half(params, x):
        y = jax.nn.relu(x @ params["a"])
        return y @ params["b"] + (y[:, :3] ** 2).sum()

    # Of one group, but three of its channels are in the slice: no parameter has it in part.
    graph = core.trace(half, {k: params[k] for k in "ab"}, jnp.ones((1, 2)))
    formula = cost.formula(graph)
    assert (formula.widths, formula.count({"a": 4})["macs"]) == ({"a": 6}, 2 * 4 + 4 * 2)
    formula = cost.formula(graph, groups=())
    assert (formula.widths, formula.count()["macs"]) == ({}, 2 * 6 + 6 * 2)


def test_bad_input():
    formula = cost.formula(core.trace(mlp, MLP, jnp.ones((1, 3))))
    with pytest.raises(ValueError, match=r"widths of 'a' must be an integer in \[1, 10\], got 0"):
        formula.count({"a": 0})
    with pytest.raises(ValueError, match="group of widths must be one of a, got 'b'"):
        formula.count({"b": 2})
    with pytest.raises(ValueError, match="site of weight_bits must be one of a, b, got 'c'"):
        formula.count(None, {"c": 2})
    with pytest.raises(ValueError, match=r"activation_bits of 'a' must be an integer in \[1, 32\]"):
        formula.count(None, None, {"a": 0})

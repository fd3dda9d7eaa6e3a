"""What a program costs as it is stored: at every width what its own narrowed program costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core, cost, models
from hybrid_jax import program as p
from hybrid_jax.program import memory

NETWORKS = {
    "padded": ("resnet8", {"blocks": (1, 1), "widths": (4, 6)}),
    "depthwise": ("mobilenet_v2", {"stages": ((1, 4, 1, 1), (3, 6, 2, 2)), "stem": "cifar"}),
    "concatenating": ("densenet40", {"blocks": (2,), "growth": 3}),
    "flattened": ("vgg16_bn", {"widths": ((4, 6), (6,))}),
}
E = p.Encoding(1.0)


@pytest.mark.parametrize("network", NETWORKS)
def test_equals_the_program_of_the_narrowed_network(network):
    name, overrides = NETWORKS[network]
    model = models.create(name, 5, **overrides)
    x = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = core.map_with_path(lambda _, leaf: jnp.ones(leaf.shape), variables)
    net = p.lower(model.apply, variables, x, check=False)
    made = cost.of_program(net)
    assert set(made.formula.kernels) == {op.output for op in net.weighted}
    assert made.formula.widths
    rng = np.random.default_rng(0)
    widths = {name: int(rng.integers(1, n + 1)) for name, n in made.formula.widths.items()}
    keep = {group.name: np.arange(group.size) < widths[group.name] for group in made.groups}
    masks = core.expand(keep, made.groups, net.params)
    small, params, _ = core.shrink(functools.partial(p.apply, net), net.params, masks, x)
    small = p.lower(small, params, x, check=False)
    expected = cost.of_program(small)
    assert made.formula.count(widths) == expected.formula.count()
    assert made.memory(widths) == memory.plan(small).size


def residual(params, x):
    y = jax.nn.relu(x @ params["a"])
    return (jax.nn.relu(y @ params["b"]) + y) @ params["c"]


@pytest.fixture(scope="module")
def program():
    params = {"a": jnp.ones((3, 10)), "b": jnp.ones((10, 10)), "c": jnp.ones((10, 2))}
    return p.lower(residual, params, jnp.ones((1, 3)))


def test_by_hand(program):
    edges = [op.output for op in program.operations]
    made = cost.of_program(program, dict.fromkeys(edges[:-1], E))
    assert made.formula.widths == {"a/kernel": 10}
    bits = {"a": 4, "b": 8, "c": 3}
    found = made.formula.count({"a/kernel": 5}, bits, dict.fromkeys(bits, 8))
    # 3·5 weights in 4 bits, 25 in 8, 10 in 3, and for 12 outputs a scale and a bias; y and b.
    assert found["bytes"] == 8 + 25 + 4 + 12 * (4 + 4)
    assert found["macs"] == 15 + 25 + 10
    assert found["bops"] == 8 * (15 * 4 + 25 * 8 + 10 * 3)
    assert found["memory"] == made.memory({"a/kernel": 5}) == 5 + 5
    assert made.memory() == 10 + 10
    # In floats four bytes each; the result is the caller's.
    assert cost.of_program(program).formula.count()["memory"] == 80


def test_files_by_hand(program):
    few = cost.File(
        (4, 8), layer=7, channel=3, overhead=100, scratch=lambda op, shape: (1, shape[0], 5)
    )
    edges = [op.output for op in program.operations]
    made = cost.of_program(program, dict.fromkeys([*program.inputs, *edges], E), [few])
    bits = {"a": 2, "b": 5, "c": 4}
    # 30 weights of 2 bits in 4, 100 of 5 in 8, 20 in 4.
    numbers = 15 + 100 + 10 + 22 * 8
    assert made.formula.count(None, bits)["bytes"] == numbers + 3 * 7 + 22 * 3 + 100
    # The larger of two files; the other holds all as it is: 7.5, 62.5 and 10 bytes.
    both = cost.of_program(
        program, None, [few._replace(layer=0, channel=0, overhead=0), cost.File(layer=99)]
    )
    assert both.formula.count(None, bits)["bytes"] == max(numbers, 8 + 63 + 10 + 22 * 8 + 3 * 99)
    # What b takes to run: 10 bytes for each of its 10 inputs, and 5, beside its input and output.
    assert made.formula.count(None, bits)["memory"] == 10 + 100 + 5 + 10
    # They are placed in a block of whole words.
    assert made.memory({"a/kernel": 5}) == 5 + 50 + 5 + 5 + 3
    assert made.memory() == 10 + 100 + 5 + 10 + 3


def test_a_group_of_which_an_edge_has_a_part_has_no_width():
    def half(params, x):
        y = jax.nn.relu(x @ params["a"])
        return y @ params["b"] + (y[:, :3] ** 2).sum(1, keepdims=True)

    params = {"a": jnp.ones((2, 6)), "b": jnp.ones((6, 2))}
    made = cost.of_program(p.lower(half, params, jnp.ones((1, 2))))
    assert made.formula.widths == {}
    assert made.formula.count()["macs"] == 24

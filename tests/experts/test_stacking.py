import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import experts


def trees(count):
    return [{"a": {"w": jnp.full((2, 3), e)}, "b": jnp.full((4,), -e)} for e in range(count)]


@pytest.mark.parametrize("count", [1, 3])
def test_unstack_inverts_stack(count):
    stacked = experts.stack(trees(count))
    assert jax.tree.map(jnp.shape, stacked) == {"a": {"w": (count, 2, 3)}, "b": (count, 4)}
    assert experts.count(stacked) == count
    for original, back in zip(trees(count), experts.unstack(stacked), strict=True):
        chex.assert_trees_all_equal(original, back)


def test_leaves_of_many_shapes_are_one_program(compiled):
    one = {str(n): jax.device_put(np.ones((n, 911), np.float32)) for n in range(1, 6)}
    compiled()
    stacked = experts.stack([one, one])
    assert compiled() == 1
    experts.unstack(stacked)
    assert compiled() == 1
    experts.unstack(experts.stack([one, one]))
    assert compiled() == 0


def test_stack_keeps_what_is_not_pruned():
    mask = {"w": jnp.array([True, False]), "b": optax.MaskedNode()}
    stacked = experts.stack([mask, mask])
    assert stacked["b"] == optax.MaskedNode()
    assert experts.unstack(stacked)[1]["b"] == optax.MaskedNode()
    assert experts.count({"a": optax.MaskedNode(), "w": jnp.zeros((2, 1))}) == 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"a": {"w": jnp.zeros((2, 4))}, "b": jnp.zeros(4)},
            r"experts\[1\].*\[2,3\] at 'a/w'.*2,4",
        ),
        ({"a": {"w": jnp.zeros((2, 3))}}, r"experts\[1\] must have .* at 'b', got no leaf"),
        (
            {"a": {"w": jnp.zeros((2, 3), jnp.int8)}, "b": jnp.zeros(4)},
            r"experts\[1\].*'a/w', got int8",
        ),
    ],
)
def test_stack_names_the_first_path_that_differs(other, message):
    first = {"a": {"w": jnp.zeros((2, 3))}, "b": jnp.zeros(4)}
    with pytest.raises(ValueError, match=message):
        experts.stack([first, other])


def test_nothing_to_stack():
    with pytest.raises(ValueError, match="at least 1 pytree, got 0"):
        experts.stack([])


@pytest.mark.parametrize("stacked", [{}, {"w": jnp.zeros(())}, {"w": optax.MaskedNode()}])
def test_no_expert_axis(stacked):
    with pytest.raises(ValueError, match="stacked must have leaves with a leading axis"):
        experts.count(stacked)

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core


def member(path, axis, index, shape):
    return core.Member(path, axis, np.array(index), shape)


ROWS = member("w", 0, [[0, 2], [3, 5]], (6, 3))
# Two groups meet in "w"; of its rows 1 and 4 nothing leaves, and unit 0 of "in" owns two.
GROUPS = (
    core.Group("in", 2, (ROWS, member("b", 0, [[1], [0]], (2,)))),
    core.Group("w", 3, (member("w", 1, [[2], [1], [0]], (6, 3)),)),
)
PARAMS = {"w": jnp.ones((6, 3)), "b": jnp.ones(2), "other": jnp.ones(4)}
KEEP = {"in": np.array([False, True]), "w": np.array([True, True, False])}


def test_masks_of_two_groups_meet():
    masks = core.expand(KEEP, GROUPS, PARAMS)
    rows, columns = [False, True, False, True, True, True], [False, True, True]
    np.testing.assert_array_equal(masks["w"], np.outer(rows, columns))
    assert masks["b"].tolist() == [True, False]
    assert masks["other"] == optax.MaskedNode()
    alone = core.expand({"w": KEEP["w"]}, GROUPS, PARAMS)
    np.testing.assert_array_equal(alone["w"], np.outer(np.ones(6, bool), columns))
    assert alone["b"] == optax.MaskedNode()


def test_what_is_kept_may_be_traced():
    compiled = jax.jit(lambda keep: core.expand(keep, GROUPS, PARAMS))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        keep = {name: rng.random(len(kept)) < 0.5 for name, kept in KEEP.items()}
        expected = core.expand(keep, GROUPS, PARAMS)
        chex.assert_trees_all_equal(compiled(keep), expected)
    assert compiled._cache_size() == 1
    stacked = jax.vmap(lambda kept: core.expand({"w": kept}, GROUPS, PARAMS))(jnp.eye(3) == 1)
    assert stacked["w"][:, 0].tolist() == np.eye(3, dtype=bool)[:, ::-1].tolist()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="keep must be one of in, w, got 'v'"):
        core.expand({"v": KEEP["w"]}, GROUPS, PARAMS)
    with pytest.raises(ValueError, match=r"keep\['w'\] must be bool\[3\], got bool\[2\]"):
        core.expand({"w": KEEP["in"]}, GROUPS, PARAMS)
    with pytest.raises(ValueError, match=r"keep\['w'\] must be bool\[3\], got float32\[3\]"):
        jax.jit(lambda kept: core.expand({"w": kept}, GROUPS, PARAMS))(jnp.ones(3))
    with pytest.raises(ValueError, match=r"params must have shape \(6, 3\) at 'w', got \(3, 6\)"):
        core.expand(KEEP, GROUPS, {**PARAMS, "w": jnp.ones((3, 6))})
    with pytest.raises(ValueError, match=r"params must have shape \(2,\) at 'b', got no leaf"):
        core.expand(KEEP, GROUPS, {"w": PARAMS["w"]})

"""Checkpoints: any pytree comes back bit-equal, and a wrong one is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import training


def make_tree():
    return {
        "masks": {"kernel": np.array([True, False]), "bias": optax.MaskedNode()},
        "scales": jnp.array([1 / 3, 1e-30], jnp.float32),
        "bits": np.int32(4),
        "half": jnp.array([1.5, -0.0], jnp.bfloat16),
        "nothing": np.zeros((0, 3), np.float32),
        "keys": jax.random.split(jax.random.key(7), 3),
        "opt": optax.adam(0.1).init({"a.b": jnp.ones(2)}),
        "empty": (),
    }


def test_every_kind_of_leaf_comes_back(tiny, tmp_path):
    tree = make_tree()
    training.Checkpoints(tmp_path).save(3, tree)
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_tree()))
    restored = training.Checkpoints(tmp_path).restore(3, like)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    tiny.assert_equal(restored, jax.tree.map(jnp.asarray, tree))
    assert np.signbit(np.float32(restored["half"][1]))
    draws = [jax.vmap(jax.random.uniform)(t["keys"]).tolist() for t in (tree, restored)]
    assert draws[0] == draws[1]


def test_keeps_the_newest(tmp_path):
    checkpoints = training.Checkpoints(tmp_path / "new", keep=2)
    assert checkpoints.latest() is None
    assert not (tmp_path / "new").exists()
    for step in (1, 5, 7):
        checkpoints.save(step, {"w": np.full(2, step)})
    assert checkpoints.latest() == 7
    assert checkpoints.restore(5, {"w": np.zeros(2, int)})["w"].tolist() == [5, 5]
    with pytest.raises(FileNotFoundError, match=r"step must be one of \[5, 7\] in .*, got 1"):
        checkpoints.restore(1, {"w": np.zeros(2, int)})
    with pytest.raises(ValueError, match="step must be later than the latest checkpoint 7, got 7"):
        checkpoints.save(7, {"w": np.zeros(2, int)})


def test_what_differs_is_named(tmp_path):
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(0, {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.int32)})
    for like, match in [
        ({"a": np.zeros(3, np.float32), "b": np.zeros(1, np.int32)}, r"float32\[3\] at 'a'"),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}, r"float32\[1\] at 'b'"),
        ({"a": np.zeros(2, np.float32)}, "no leaf at 'b'"),
        ({"c": np.zeros(2, np.float32)}, r"float32\[2\] at 'c', got no leaf"),
    ]:
        with pytest.raises(ValueError, match=match):
            checkpoints.restore(0, like)


def test_shardings_are_those_of_like(tmp_path):
    mesh = training.data_mesh()
    checkpoints = training.Checkpoints(tmp_path)
    tree = {"w": np.arange(3.0, dtype=np.float32)}
    checkpoints.save(0, training.replicate(tree, mesh))
    like = training.replicate({"w": np.zeros(3, np.float32)}, mesh)
    assert checkpoints.restore(0, like)["w"].sharding == like["w"].sharding
    assert not checkpoints.restore(0, {"w": jnp.zeros(3)})["w"].committed

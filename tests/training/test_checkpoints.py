"""Checkpoints: any pytree comes back bit-equal, and a wrong one is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, training


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


def damaged(folder, how, at=0.5):
    """Changes each file of a checkpoint that holds arrays: a bit, its end, all of it."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size):
        content = bytearray(path.read_bytes())
        content[int(at * len(content))] ^= 1
        path.write_bytes({"bit": content, "cut": content[: len(content) // 2], "empty": b""}[how])


@pytest.mark.parametrize("how", ["bit", "cut", "empty"])
def test_the_one_before_a_damaged_one_is_taken(tmp_path, capsys, how):
    like = {"w": np.zeros(100, np.float32)}
    checkpoints = training.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"w": np.full(100, step, np.float32)}, note=[step])
    damaged(tmp_path / "2", how)
    again = training.Checkpoints(tmp_path)
    tree, note = again.newest(like)
    assert (tree["w"].tolist(), note) == ([1] * 100, [1])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"checkpoint {tmp_path / '2'} is damaged: ")
    assert told.endswith("; it is now 2.damaged, and training goes on from step 1")
    again.save(2, like)  # it is free again
    damaged(tmp_path / "1", how)
    damaged(tmp_path / "2", how)
    assert training.Checkpoints(tmp_path).newest(like) is None
    assert capsys.readouterr().err.endswith("it is now 1.damaged, and training begins anew\n")


def test_a_flipped_bit_never_goes_by(tmp_path):
    """Anywhere in any file: the arrays come back as they were, or not at all."""
    value = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32)
    training.Checkpoints(tmp_path).save(1, {"w": value})
    refused = 0
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        for at in (np.linspace(0.1, 0.9, 5) * len(whole)).astype(int) if whole else ():
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            try:
                found = training.Checkpoints(tmp_path).restore(1, {"w": value})
                np.testing.assert_array_equal(found["w"], value)
            except core.Damaged:
                refused += len(whole) > value.nbytes
        path.write_bytes(whole)
    assert refused == 5  # of the one file that holds the values


def test_those_of_another_run_are_not_taken(tmp_path, capsys):
    training.Checkpoints(tmp_path, whose="a").save(1, {"w": np.zeros(2)})
    assert training.Checkpoints(tmp_path, whose="b").newest({"w": np.zeros(2)}) is None
    assert "1 is of another run, or of another stage" in capsys.readouterr().err


def test_what_lies_among_them_is_no_checkpoint(tmp_path):
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(3, {"w": np.zeros(2)})
    for name in ("notes", "7.damaged", "8.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    again = training.Checkpoints(tmp_path)
    assert again.latest() == 3
    (tmp_path / "9").mkdir()
    (tmp_path / "10").write_text("")
    assert training.Checkpoints(tmp_path).newest({"w": np.ones(2)})[0]["w"].tolist() == [0, 0]

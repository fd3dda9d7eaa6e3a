"""The same step on four devices and on one."""

import jax
import numpy as np
import pytest

from hybrid_jax import experts, training


def test_sharded_step_equals_one_device(tiny, batches):
    """Four steps of the loop; dropout, augmentation and BatchNorm see the whole batch."""
    mesh = training.data_mesh()
    assert mesh.size == 4
    step = training.make_step(tiny.loss_fn, tiny.augment)
    one = training.fit(step, tiny.make_state(), batches, steps=4, name="one")

    def sharded(first):
        return (training.shard_batch(batch, mesh) for batch in batches(first))

    state = training.replicate(tiny.make_state(), mesh)
    four = training.fit(step, state, sharded, steps=4, name="four")
    assert len(jax.tree.leaves(four.params)[0].sharding.device_set) == 4
    tiny.assert_close(four, one)


def test_sharded_stack_equals_one_device(tiny, arrays):
    mesh = training.data_mesh()
    step = training.make_stacked_step(tiny.loss_fn, per_expert=["weight"], method="vmap")
    weight = np.random.default_rng(0).uniform(size=(2, 8)).astype(np.float32)
    weight[0, 1:5] = 0  # on one device none counts
    batch = {"image": arrays.images[:8], "label": arrays.labels[:8], "weight": weight}
    states = training.stack_states([tiny.make_state(0), tiny.make_state(1)])
    four, _ = step(
        training.replicate(states, mesh), training.shard_batch(batch, mesh, per_expert=["weight"])
    )
    one, _ = step(states, batch)
    tiny.assert_close(four, one)


@pytest.mark.parametrize("method", ["vmap", "unroll"])
def test_stack_divided_by_expert_equals_one_device(tiny, arrays, method):
    """Two experts on each of two devices, half of the batch on each of the other two."""
    mesh = experts.expert_mesh(2)
    step = training.make_stacked_step(
        tiny.loss_fn, tiny.augment, per_expert=["weight"], method=method
    )
    weight = np.random.default_rng(0).uniform(size=(4, 8)).astype(np.float32)
    weight[0, 1:5] = 0  # on one device none counts
    batch = {"image": arrays.images[:8], "label": arrays.labels[:8], "weight": weight}
    states = training.stack_states([tiny.make_state(e) for e in range(4)])
    four = experts.shard_stack(states, mesh)
    placed = training.shard_batch(batch, mesh, per_expert=["weight"])
    assert {s.data.shape for s in placed["weight"].addressable_shards} == {(2, 4)}
    for _ in range(2):
        four, metrics = step(four, placed)
        states, alone = step(states, batch)
    tiny.assert_close(four, states)
    tiny.assert_close(metrics, alone)
    for leaf in jax.tree.leaves(four):
        assert {s.data.shape[0] for s in leaf.addressable_shards} == {2}


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(
        ValueError, match=r"batch\['image'\] must divide evenly among 4 devices, got 6 examples"
    ):
        training.shard_batch({"image": np.ones((6, 2))}, training.data_mesh())

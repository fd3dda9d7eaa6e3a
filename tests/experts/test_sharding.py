"""Four devices: two along the experts, two along the batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts, training

METHODS = ["vmap", "unroll", "auto"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


NET, GATE = Net(), experts.gate_cnn(4, features=())


@pytest.fixture(scope="module")
def mesh():
    return experts.expert_mesh(2)


@pytest.fixture(scope="module")
def setting():
    images = jax.random.normal(jax.random.key(0), (8, 6, 6, 2))
    init = jax.jit(NET.init)
    stack = experts.stack([init(jax.random.key(e), images) for e in range(4)])
    return stack, GATE.init(jax.random.key(9), images), images


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_mesh(mesh):
    assert dict(mesh.shape) == {"expert": 2, "batch": 2}
    assert dict(experts.expert_mesh(4).shape) == {"expert": 4, "batch": 1}


@pytest.mark.parametrize("method", METHODS)
def test_mixture_equals_one_device(mesh, setting, method):
    stack, gate_params, images = setting
    moe = jax.jit(experts.mixture(NET.apply, GATE.apply, experts.soft(), method))
    placed = experts.shard_stack(stack, mesh)
    batch = training.shard_batch({"image": images}, mesh)
    kernel = placed["params"]["Conv_0"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 3, 3, 2, 4)}
    logits, aux = moe(placed, training.replicate(gate_params, mesh), batch["image"])
    assert_close((logits, aux), moe(stack, gate_params, images))
    assert {s.data.shape for s in aux.expert_logits.addressable_shards} == {(2, 4, 3)}


def test_experts_stay_on_their_devices(mesh, setting):
    """Each device runs its two experts on its half of the batch, and nothing is exchanged."""
    stack, _, images = setting
    mapped = experts.map_experts(NET.apply, "unroll", in_axes=(0, None))
    batch = training.shard_batch({"image": images}, mesh)
    lowered = jax.jit(mapped).lower(experts.shard_stack(stack, mesh), batch["image"])
    program = lowered.compile().as_text()
    assert "f32[4,6,6,4]" in program  # the half batch after a convolution
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all"))


def test_gradient_equals_one_device(mesh, setting):
    """Of the experts, and of an input that they share: the sum over all of them."""
    stack, _, images = setting
    mapped = experts.map_experts(NET.apply, "vmap", in_axes=(0, None))
    gradient = jax.jit(jax.grad(lambda stack, x: jnp.sin(mapped(stack, x)).sum(), (0, 1)))
    placed = experts.shard_stack(stack, mesh), training.shard_batch({"x": images}, mesh)["x"]
    assert_close(gradient(*placed), gradient(stack, images))


def test_without_jit(mesh, setting):
    stack, _, images = setting
    mapped = experts.map_experts(NET.apply, "vmap", in_axes=(0, None))
    placed = experts.shard_stack(stack, mesh), training.shard_batch({"x": images}, mesh)["x"]
    assert_close(mapped(*placed), mapped(stack, images))


def test_nested_in_an_expert(mesh):
    """Inside a device's own experts no mesh is left to divide by."""
    inner = experts.map_experts(lambda w, x: w * x, "vmap", in_axes=(0, None))
    outer = experts.map_experts(inner, "vmap", in_axes=(0, None))
    stack = jnp.arange(12.0).reshape(4, 3)
    got = jax.jit(outer)(experts.shard_stack(stack, mesh), jnp.float32(2))
    np.testing.assert_array_equal(got, 2 * stack)


def test_the_copy_is_its_own_to_donate(mesh):
    stack = experts.stack([{"w": jnp.ones(3)}] * 2)
    placed = experts.shard_stack(stack, experts.expert_mesh(1, jax.devices()[:1]))
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(placed)
    assert placed["w"].is_deleted()
    np.testing.assert_array_equal(stack["w"], 1)


def test_bad_arguments(mesh):
    three = {"w": jnp.ones((3, 2))}
    message = r"stack must hold a multiple of 2 experts \(the mesh's axis 'expert'\), got 3"
    with pytest.raises(ValueError, match=message):
        experts.shard_stack(three, mesh)
    with pytest.raises(ValueError, match=message):
        experts.map_experts(lambda p: p, "vmap")(training.replicate(three, mesh))
    with pytest.raises(ValueError, match="experts must divide the 4 devices, got 3"):
        experts.expert_mesh(3)
    with pytest.raises(ValueError, match="experts must be an integer of at least 1, got 0"):
        experts.expert_mesh(0)
    with pytest.raises(ValueError, match=r"mesh must have an axis 'expert', got \('batch',\)"):
        experts.shard_stack(three, training.data_mesh())


def test_without_any_jit(mesh, setting):
    stack, gate_params, images = setting
    moe = experts.mixture(NET.apply, GATE.apply, experts.soft(), "auto")
    placed = experts.shard_stack(stack, mesh), training.replicate(gate_params, mesh)
    batch = training.shard_batch({"image": images}, mesh)
    with jax.disable_jit():
        logits, _ = moe(*placed, batch["image"])
    assert_close(logits, moe(stack, gate_params, images)[0])

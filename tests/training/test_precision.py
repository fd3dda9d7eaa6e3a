import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import models, pruning, training

IMAGES = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
BATCH = {"image": IMAGES, "label": jnp.arange(8, dtype=jnp.int32) % 4}


@pytest.fixture(scope="module")
def network():
    module = models.ResNet(4, blocks=(1,), widths=(4,))
    variables = jax.jit(module.init)(jax.random.key(1, impl="rbg"), IMAGES)

    def forward(params, state, images, key):
        return module.apply({"params": params, **state}, images, True, mutable=["batch_stats"])

    return forward, variables["params"], {"batch_stats": variables["batch_stats"]}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_in_half_and_all_else_in_float32(network, dtype):
    forward, params, state = network
    half = training.compute_in(forward, dtype)
    text = str(jax.make_jaxpr(half)(params, state, IMAGES, None))
    name = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    products = [line for line in text.splitlines() if "conv_general" in line or "dot_gen" in line]
    assert products
    assert all(name in line.split("=")[0] for line in products)
    logits, new = jax.jit(half)(params, state, IMAGES, None)
    want, want_state = jax.jit(forward)(params, state, IMAGES, None)
    np.testing.assert_allclose(logits, want, atol=0.03 * float(jnp.abs(want).max()))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype == jnp.float32, new, want_state)
    assert logits.dtype == jnp.float32
    assert all(jax.tree.leaves(same))


def test_it_learns_by_updates_below_the_resolution_of_half(network):
    """A thousandth of a weight's last place in bfloat16, many times; and all stays finite."""
    forward, params, state = network
    loss = training.loss_of(training.compute_in(forward), training.classification())
    state = training.create_state(params, state, optax.sgd(1e-4), jax.random.key(0))
    step, before = training.make_step(loss), training.copy(state.params)
    losses = []
    for _ in range(20):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, before)
    assert all(0 < leaf < 0.01 for leaf in jax.tree.leaves(moved))


def test_integers_are_not_touched_and_other_dtypes_refused(network):
    def forward(params, state, images, key):
        return jnp.where(params["which"] == 257, images, 0 * images), state

    params = {"which": jnp.int32(257)}  # no bfloat16
    logits, _ = training.compute_in(forward)(params, {}, jnp.ones((1, 2)))
    assert logits.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match=r"dtype must be a floating one, got .*int8"):
        training.compute_in(forward, jnp.int8)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """`optax.MultiSteps` around held masks: two halves of a batch move the weights as all of it."""
    module = nn.Dense(3)
    images = jax.random.normal(jax.random.key(0), (8, 5))
    params = module.init(jax.random.key(1), images)
    masks = pruning.masks(params, 0.5)
    params = pruning.apply_masks(params, masks)
    labels = jnp.arange(8, dtype=jnp.int32) % 3
    loss = training.loss_of(lambda p, s, x, key: (module.apply(p, x), s), training.classification())
    tx = pruning.hold_masks(optax.adam(0.1), masks)

    def trained(tx, batches):
        state = training.create_state(params, {}, tx, jax.random.key(0))
        step = training.make_step(loss)
        for part in batches:
            state, _ = step(state, {"image": images[part], "label": labels[part]})
        return state.params

    want = trained(tx, [slice(0, 8)] * 3)
    halves = [slice(0, 4), slice(4, 8)] * 3
    got = trained(optax.MultiSteps(tx, every_k_schedule=2), halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    kept = got["params"]["kernel"] != 0
    np.testing.assert_array_equal(kept, masks["params"]["kernel"])

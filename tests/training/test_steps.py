"""Steps: donation, law 5 (the stack equals the loop) and law 6 (no recompilation)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import data, pruning, training


@pytest.fixture
def batch(arrays):
    return {"image": arrays.images[:8], "label": arrays.labels[:8]}


def test_step_is_the_formula_of_sgd_with_momentum(batch):
    """Loss w²/2 has gradient w. With momentum 1/2 and rate 1, from w = 4:

    trace = 4, w = 4 - 4 = 0, loss 8; then gradient 0, trace = 4/2 = 2, w = 0 - 2 = -2, loss 0.
    """

    def loss_fn(params, state, batch, key):
        return params["w"] ** 2 / 2, ({"seen": state["seen"] + 1}, {"w": params["w"]})

    tx = optax.sgd(1.0, momentum=0.5)
    state = training.create_state({"w": 4.0}, {"seen": 0}, tx, jax.random.key(0))
    step = training.make_step(loss_fn)
    state, metrics = step(state, batch)
    assert (float(metrics["loss"]), float(metrics["w"]), float(state.params["w"])) == (8, 4, 0)
    state, metrics = step(state, batch)
    assert (float(metrics["loss"]), float(state.params["w"])) == (0, -2)
    assert (int(state.step), int(state.state["seen"])) == (2, 2)


def test_nothing_moves_between_host_and_device_in_a_step(batch):
    """Batch and state are on the device; whatever else a step needs is part of its program."""

    def loss_fn(params, state, batch, key):
        x = batch["image"].reshape(8, -1) @ params["w"]
        return jnp.mean(x * x) + jax.random.uniform(key), (state, {})

    width = batch["image"][0].size
    states = [
        training.create_state({"w": jnp.ones((width, 2))}, {}, optax.adam(0.1), jax.random.key(e))
        for e in range(2)
    ]
    batch = jax.device_put(batch)
    with jax.transfer_guard("disallow"):
        training.make_step(loss_fn)(training.copy(states[0]), batch)
        training.make_stacked_step(loss_fn)(training.stack_states(states), batch)


def test_donation_takes_nothing_from_the_caller(batch):
    params = {"w": jnp.ones(3)}
    tx = optax.chain(
        optax.ema(0.9), optax.lookahead(optax.sgd(0.1), 5, 0.5).init and optax.sgd(0.1)
    )
    key = jax.random.key(0)

    def loss_fn(params, state, batch, key):
        return jnp.sum(params["w"] ** 2), (state, {})

    step = training.make_step(loss_fn)
    # `also` is the same buffer as a parameter: donating it twice would be an error.
    first = training.create_state(params, {"also": params["w"]}, tx, key)
    step(first, batch)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(first.params["w"])
    assert params["w"].tolist() == [1, 1, 1]
    assert jax.random.key_data(key).tolist() == [0, 0]


def test_randomness_differs_between_steps_and_repeats_from_a_state(tiny, batch):
    def loss_fn(params, state, batch, key):
        draw = jax.random.uniform(key)
        return params["w"] ** 2, (state, {"draw": draw, "image": jnp.mean(batch["image"])})

    step = training.make_step(loss_fn, tiny.augment)
    start = training.create_state({"w": 1.0}, {}, optax.sgd(0.1), jax.random.key(0))
    state, first = step(training.copy(start), batch)
    _, again = step(training.copy(start), batch)
    _, second = step(state, batch)
    tiny.assert_equal(first, again)
    assert first["draw"] != second["draw"]
    assert first["image"] != second["image"]


def test_labels_of_pixels_move_with_the_images(tiny):
    """One model and a stack alike: where a pixel is black, from outside, its label is void."""

    def loss_fn(params, state, batch, key):
        seen = {"image": batch["image"][..., 0], "label": batch["label"]}
        return jnp.sum(params["w"] ** 2), (state, seen)

    augment = data.augmentation(padding=1, flip=True, label_kind="pixels")
    labels = jnp.broadcast_to(jnp.arange(12).reshape(1, 3, 4), (8, 3, 4))
    batch = {"image": (labels[..., None] + 1).astype(jnp.uint8), "label": labels}
    state = training.create_state({"w": 1.0}, {}, optax.sgd(0.1), jax.random.key(0))
    stack = training.stack_states([state, state])
    for step, start in ((training.make_step, state), (training.make_stacked_step, stack)):
        _, seen = step(loss_fn, augment)(training.copy(start), batch)
        assert np.array_equal(seen["label"], np.asarray(seen["image"]).astype(int) - 1)
        assert (np.asarray(seen["label"]) == -1).any()


def test_teacher_sees_the_augmented_images(tiny, batch):
    def loss_fn(params, state, batch, key):
        gap = jnp.max(jnp.abs(batch["teacher"] - batch["image"].mean((1, 2))))
        return params["w"] ** 2, (state, {"gap": gap})

    step = training.make_step(loss_fn, tiny.augment, teacher=lambda images: images.mean((1, 2)))
    state = training.create_state({"w": 1.0}, {}, optax.sgd(0.1), jax.random.key(0))
    assert step(state, batch)[1]["gap"] == 0


@pytest.mark.parametrize("method", ["vmap", "map", "unroll", "auto"])
def test_stack_equals_separate_steps(tiny, batch, method):
    """Three experts with their own parameters, keys and sample weights, for two steps."""
    weights = np.random.default_rng(1).uniform(size=(3, 8)).astype(np.float32)
    loss_fn = training.loss_of(tiny.forward, training.classification(smoothing=0.1), 0.5)
    teacher = lambda images: 3 * images[:, 0, 0, :1] * jnp.eye(1, 3, dtype=images.dtype)  # noqa: E731
    separate = []
    step = training.make_step(loss_fn, teacher=teacher)
    for seed in range(3):
        state = tiny.make_state(seed)
        for _ in range(2):
            state, metrics = step(state, batch | {"weight": weights[seed]})
        separate.append((state, metrics))

    stacked_step = training.make_stacked_step(
        loss_fn, teacher=teacher, per_expert=["weight"], method=method
    )
    states = training.stack_states([tiny.make_state(seed) for seed in range(3)])
    for _ in range(2):
        states, metrics = stacked_step(states, batch | {"weight": weights})
    for index, (state, expected) in enumerate(separate):
        tiny.assert_close(jax.tree.map(lambda x, i=index: x[i], states), state)
        tiny.assert_close(jax.tree.map(lambda x, i=index: x[i], metrics), expected)


def test_stack_shares_one_augmentation(tiny, batch):
    """With one key for all, the stack is E separate augmented steps; images are drawn once."""

    def loss_fn(params, state, batch, key):
        return params["w"] ** 2, (state, {"image": batch["image"]})

    make = lambda seed: training.create_state(  # noqa: E731
        {"w": 1.0}, {}, optax.sgd(0.1), jax.random.key(seed)
    )
    _, stacked = training.make_stacked_step(loss_fn, tiny.augment, method="vmap")(
        training.stack_states([make(0), make(1)]), batch
    )
    _, alone = training.make_step(loss_fn, tiny.augment)(make(0), batch)
    # Each program rounds as it is compiled.
    np.testing.assert_allclose(stacked["image"][0], alone["image"], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(stacked["image"][0], stacked["image"][1])


def test_each_expert_of_a_stack_lands_on_its_own_mask(batch):
    """Gradient (1, 1), rate 1/4, from (1, 1): 3/4 where kept, 0 where removed."""

    def loss_fn(params, state, batch, key):
        return jnp.sum(params["w"]), (state, {})

    def make(mask):
        tx = pruning.hold_masks(optax.sgd(0.25), {"w": jnp.array(mask)})
        return training.create_state({"w": jnp.ones(2)}, {}, tx, jax.random.key(0))

    states = training.stack_states([make([True, False]), make([False, True])])
    states, _ = training.make_stacked_step(loss_fn, method="vmap")(states, batch)
    assert states.params["w"].tolist() == [[0.75, 0], [0, 0.75]]


@pytest.mark.parametrize("stacked", [False, True])
def test_compiles_once(tiny, batch, stacked):
    traces = []

    def forward(*args):
        traces.append(1)
        return tiny.forward(*args)

    loss_fn = training.loss_of(forward, training.classification())
    if stacked:
        step = training.make_stacked_step(loss_fn, method="vmap")
        state = training.stack_states([tiny.make_state(0), tiny.make_state(1)])
    else:
        step, state = training.make_step(loss_fn), tiny.make_state()
    for _ in range(3):
        state, _ = step(state, batch)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_a_state_that_one_program_makes_is_the_same(tiny):
    state, tx = tiny.make_state(), optax.adam(0.1)
    make = lambda *parts: training.create_state(*parts, tx, state.key)  # noqa: E731
    tiny.assert_equal(jax.jit(make)(state.params, state.state), make(state.params, state.state))


def test_errors_name_the_argument(tiny, batch):
    key = jax.random.key(0)
    with pytest.raises(TypeError, match=r"params must be float arrays, got int32 at 'bits'"):
        training.create_state({"bits": jnp.int32(4)}, {}, optax.sgd(0.1), key)
    with pytest.raises(TypeError, match="key must be a typed key"):
        training.create_state({}, {}, optax.sgd(0.1), jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match="states must hold at least one"):
        training.stack_states([])
    with pytest.raises(ValueError, match="batch must hold 'teacher'"):
        training.make_step(training.loss_of(tiny.forward, training.classification(), 0.5))(
            tiny.make_state(), batch
        )
    step = training.make_stacked_step(tiny.loss_fn, per_expert=["weight"])
    states = training.stack_states([tiny.make_state(0), tiny.make_state(1)])
    with pytest.raises(ValueError, match="per_expert must name entries of the batch"):
        step(states, batch)
    with pytest.raises(ValueError, match=r"'weight'\] must have a leading axis of 2 experts"):
        step(states, batch | {"weight": np.ones((3, 8), np.float32)})

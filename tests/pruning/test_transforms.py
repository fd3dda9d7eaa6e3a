import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import pruning

RNG = np.random.default_rng(0)
PARAMS = {
    "Conv_0": {
        "kernel": jnp.asarray(RNG.normal(size=(3, 3, 4, 8)), jnp.float32),
        "bias": jnp.asarray(RNG.normal(size=8), jnp.float32),
    },
    "Dense_0": {"kernel": jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)},
}
SIZES = {"Conv_0": 288, "Dense_0": 48}


def loss(params, target):
    return sum(jnp.sum(jnp.square(leaf - target)) for leaf in jax.tree.leaves(params))


def leaf_counts(masks):
    return {name: int(masks[name]["kernel"].sum()) for name in SIZES}


# Each takes the link under test, `prune`, to a whole optimizer.
OPTIMIZERS = {
    "sgd": lambda prune: optax.chain(optax.sgd(0.1), prune),
    "momentum": lambda prune: optax.chain(optax.sgd(0.1, momentum=0.9, nesterov=True), prune),
    "adam": lambda prune: optax.chain(optax.adam(0.1), prune),
    "adamw": lambda prune: optax.chain(optax.adamw(0.1, weight_decay=0.3), prune),
    "lion": lambda prune: optax.chain(optax.lion(0.1), prune),
    "ema": lambda prune: optax.chain(optax.ema(0.9), optax.sgd(0.1), prune),
    "clipped": lambda prune: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1), prune),
    "multi_steps": lambda prune: optax.MultiSteps(optax.chain(optax.adam(0.1), prune), 3),
    "inject_inside": lambda prune: optax.chain(
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1), prune
    ),
    "inject_outside": lambda prune: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.sgd(learning_rate), prune)
    )(learning_rate=0.1),
    "if_finite": lambda prune: optax.apply_if_finite(optax.chain(optax.adam(0.1), prune), 3),
}


def train(tx, params, steps):
    """Plain training; returns the last parameters and, per step, every kernel."""

    def step(carry, target):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, target), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jax.tree.map(lambda p: p, params)

    targets = jnp.sin(jnp.arange(steps, dtype=jnp.float32))
    # Optax's own Adam needs promotion; `test_contract` runs our links without.
    with jax.numpy_dtype_promotion("standard"):
        return jax.lax.scan(step, (params, tx.init(params)), targets)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_held_masks_stay_exactly_zero(optimizer):
    masks = pruning.masks(pruning.magnitude(PARAMS), 0.7)
    tx = optimizer(pruning.hold_masks(masks))
    params = pruning.apply_masks(PARAMS, masks)
    _, seen = jax.jit(functools.partial(train, tx, steps=100))(params)
    for name in SIZES:
        removed = ~masks[name]["kernel"]
        kernels = np.asarray(seen[name]["kernel"])
        assert (kernels[:, np.asarray(removed)] == 0.0).all()
        assert (kernels[-1][~np.asarray(removed)] != kernels[0][~np.asarray(removed)]).any()


@pytest.mark.parametrize("name", ["momentum", "adam", "lion", "multi_steps"])
def test_other_leaves_train_as_without_masks(name):
    optimizer = OPTIMIZERS[name]
    masks = pruning.masks(pruning.magnitude(PARAMS), 0.7, exempt=["Dense_0/.*"])
    held = train(optimizer(pruning.hold_masks(masks)), PARAMS, 6)[0][0]
    plain = train(optimizer(optax.identity()), PARAMS, 6)[0][0]
    np.testing.assert_array_equal(held["Conv_0"]["bias"], plain["Conv_0"]["bias"])
    np.testing.assert_array_equal(held["Dense_0"]["kernel"], plain["Dense_0"]["kernel"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scheduled_pruning_reaches_its_count_and_holds(optimizer):
    prune = pruning.prune_by_schedule(pruning.magnitude, pruning.cubic(0.8, 2, 20), every=3)
    _, seen = jax.jit(functools.partial(train, optimizer(prune), steps=100))(PARAMS)
    for name, size in SIZES.items():
        zero = np.asarray(seen[name]["kernel"]).reshape(100, -1) == 0.0
        # What is pruned stays pruned: the set of zeros only grows.
        assert (zero[1:] >= zero[:-1]).all()
        # floor(0.8 · 288 + ½) = 230 and floor(0.8 · 48 + ½) = 38.
        assert zero[-1].sum() == {288: 230, 48: 38}[size]


CRITERIA = {
    "l1": (pruning.magnitude, ()),
    "l2": (functools.partial(pruning.magnitude, p=2), ()),
    "random": (functools.partial(pruning.random, key=jax.random.key(3, impl="unsafe_rbg")), ()),
    "taylor": (pruning.taylor, ("gradients",)),
    "fisher": (pruning.fisher, ("squared_gradients",)),
    "lamp": (pruning.lamp, ()),
    "geometric_median": (pruning.geometric_median, ()),
}
SCHEDULES = {"one_shot": pruning.one_shot(0.5, 1), "cubic": pruning.cubic(0.5, 0, 4)}


@functools.partial(jax.jit, static_argnums=(2, 3))
def compiled_masks(scores, sparsity, granularity, allocation):
    return pruning.masks(scores, sparsity, granularity, allocation())


COMBINATIONS = [
    (pruning.unstructured(), pruning.uniform),
    (pruning.unstructured(), pruning.erk),
    (pruning.unstructured(), pruning.global_),
    (pruning.n_m(2, 4), pruning.uniform),
]


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize(
    ("granularity", "allocation"),
    COMBINATIONS,
    ids=lambda x: getattr(x, "name", None) or x.__name__,
)
def test_contract(criterion, granularity, allocation):
    score, needs = criterion

    def link(schedule):
        return optax.chain(
            optax.sgd(0.1, momentum=0.9),
            pruning.prune_by_schedule(score, schedule, granularity, allocation(), needs=needs),
        )

    @jax.jit
    def step(params, state, target, which):
        gradients = jax.grad(loss)(params, target)
        squared = jax.tree.map(jnp.square, gradients)
        tx = link(lambda now: jax.lax.switch(which, list(SCHEDULES.values()), now))
        updates, state = tx.update(
            gradients,
            state,
            params,
            gradients=gradients,
            squared_gradients=squared,
            value=jnp.zeros(()),
        )
        return optax.apply_updates(params, updates), state

    for which, schedule in enumerate(SCHEDULES.values()):
        check_contract(
            link(schedule), functools.partial(step, which=which), schedule, granularity, allocation
        )
    assert step._cache_size() == 1


def check_contract(tx, step, schedule, granularity, allocation):
    shape = jax.eval_shape(tx.init, PARAMS)
    params, state = PARAMS, tx.init(PARAMS)
    before = state[1].masks
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shape
    )
    for i in range(7):
        params, state = step(params, state, jnp.float32(i))
        masks = state[1].masks
        assert state[1].sparsity == schedule(i)
        for name in SIZES:
            mask, kernel = np.asarray(masks[name]["kernel"]), np.asarray(params[name]["kernel"])
            assert (kernel[~mask] == 0.0).all()
            assert (mask <= np.asarray(before[name]["kernel"])).all()
        before = masks

    counts = leaf_counts(masks)
    if allocation is pruning.uniform:
        assert counts == {"Conv_0": 144, "Dense_0": 24}
    else:
        assert sum(counts.values()) == 168
    if allocation is pruning.erk:
        # 168 shared as (3+3+4+8) : (8+6) would give 94.5 and 73.5 > 48: the second is dense.
        assert counts == {"Conv_0": 120, "Dense_0": 48}
    if granularity.name != "unstructured":
        blocks = np.asarray(masks["Conv_0"]["kernel"])
        assert (blocks.sum(axis=2) == 2).all()


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize(
    ("granularity", "allocation"),
    COMBINATIONS,
    ids=lambda x: getattr(x, "name", None) or x.__name__,
)
def test_masks_compiled_and_eager_are_the_same(criterion, granularity, allocation):
    score, needs = criterion
    scores = score(PARAMS, *[PARAMS for _ in needs])
    eager = pruning.masks(scores, 0.37, granularity, allocation())
    compiled = compiled_masks(scores, 0.37, granularity, allocation)
    jax.tree.map(np.testing.assert_array_equal, eager, compiled)


def test_updates_of_another_precision_land_on_zero():
    params = {"w": jnp.array([[0.1, 1 / 3]], jnp.bfloat16)}
    tx = pruning.hold_masks({"w": jnp.array([[False, True]])})
    updates, _ = tx.update({"w": jnp.ones((1, 2), jnp.float32)}, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    assert optax.apply_updates(params, updates)["w"][0, 0] == 0.0


def test_masks_change_only_when_due():
    prune = pruning.prune_by_schedule(pruning.magnitude, pruning.cubic(0.5, 0, 4), every=3)
    state, reached = prune.init(PARAMS), []
    update = jax.jit(prune.update)
    for _ in range(8):
        _, state = update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
        reached.append(float(state.sparsity))
    # New masks at steps 0, 3, 6: 0.5 (1 − (1 − 3/4)³) = 0.4921875 at step 3.
    assert reached == [0.0, 0.0, 0.0, 0.4921875, 0.4921875, 0.4921875, 0.5, 0.5]


def test_a_sweep_of_schedules_is_one_vmap():
    def final(sparsity):
        prune = pruning.prune_by_schedule(pruning.magnitude, pruning.cubic(sparsity, 0, 3))
        (_, state), _ = train(optax.chain(optax.sgd(0.1), prune), PARAMS, 5)
        return state[1].masks["Dense_0"]["kernel"].sum()

    assert jax.jit(jax.vmap(final))(jnp.array([0.0, 0.25, 0.5, 1.0])).tolist() == [48, 36, 24, 0]


def test_exempt_leaves_are_never_masked():
    prune = pruning.prune_by_schedule(
        pruning.magnitude, pruning.one_shot(0.5), exempt=["Conv_0/kernel"]
    )
    state = prune.init(PARAMS)
    assert state.masks["Conv_0"]["kernel"] == optax.MaskedNode()


def test_state_may_be_donated():
    masks = pruning.masks(pruning.magnitude(PARAMS), 0.5)
    tx = pruning.hold_masks(masks)
    jax.jit(lambda s: jax.tree.map(jnp.logical_not, s), donate_argnums=0)(tx.init(PARAMS))
    assert leaf_counts(masks) == {"Conv_0": 144, "Dense_0": 24}


def test_bad_input_is_named():
    masks = pruning.masks(pruning.magnitude(PARAMS), 0.5)
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        pruning.hold_masks(masks).init({"Conv_0": PARAMS["Conv_0"]})
    tx = pruning.hold_masks(masks)
    with pytest.raises(ValueError, match="update must be called with params, got None"):
        tx.update(PARAMS, tx.init(PARAMS))
    tx = pruning.prune_by_schedule(pruning.taylor, pruning.one_shot(0.5), needs=("gradients",))
    with pytest.raises(ValueError, match=r"update must be called with gradients=..., got none"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        pruning.prune_by_schedule(pruning.magnitude, pruning.one_shot(0.5), every=0)
    with pytest.raises(
        ValueError, match=r"schedule for n_m\(2, 4\) must be in \[0, 0.5\], got 0.8"
    ):
        pruning.prune_by_schedule(pruning.magnitude, pruning.one_shot(0.8), pruning.n_m(2, 4))
    with pytest.raises(ValueError, match="to prune, got only: b"):
        pruning.prune_by_schedule(pruning.magnitude, pruning.one_shot(0.5)).init({"b": jnp.ones(2)})

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from hybrid_jax import core, pruning, training

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
    """Of each weight its distance from a target of its own."""

    def distance(leaf):
        own = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)
        return jnp.sum(jnp.square(leaf - target * own))

    return sum(map(distance, jax.tree.leaves(params)))


def leaf_counts(masks):
    return {name: int(masks[name]["kernel"].sum()) for name in SIZES}


# One kernel, as most of a test's time is compiling; every method meets every optimizer.
LAYER = PARAMS["Conv_0"]
IS_KERNEL = {"kernel": True, "bias": False}
LABELS = {"kernel": "kernel", "bias": "rest"}

# Each takes what makes an optimizer sparse, `sparse(inner) -> tx`, to a whole optimizer.
OPTIMIZERS = {
    "sgd": lambda sparse: sparse(optax.sgd(0.1)),
    "momentum": lambda sparse: sparse(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adam": lambda sparse: sparse(optax.adam(0.1)),
    "adamw": lambda sparse: sparse(optax.adamw(0.1, weight_decay=0.3)),
    "lion": lambda sparse: sparse(optax.lion(0.1)),
    "adafactor": lambda sparse: sparse(optax.adafactor(0.1, min_dim_size_to_factor=4)),
    "ema": lambda sparse: sparse(optax.chain(optax.ema(0.9), optax.sgd(0.1))),
    "clipped": lambda sparse: sparse(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))),
    "multi_steps_inside": lambda sparse: sparse(optax.MultiSteps(optax.adam(0.1), 3)),
    "multi_steps_outside": lambda sparse: optax.MultiSteps(sparse(optax.adam(0.1)), 3),
    "inject_inside": lambda sparse: sparse(optax.inject_hyperparams(optax.adam)(learning_rate=0.1)),
    "inject_outside": lambda sparse: optax.inject_hyperparams(
        lambda learning_rate: sparse(optax.sgd(learning_rate, momentum=0.9))
    )(learning_rate=0.1),
    "if_finite_inside": lambda sparse: sparse(optax.apply_if_finite(optax.adam(0.1), 3)),
    "if_finite_outside": lambda sparse: optax.apply_if_finite(sparse(optax.adam(0.1)), 3),
    "masked_inside": lambda sparse: sparse(optax.masked(optax.sgd(0.1, momentum=0.9), IS_KERNEL)),
    "partition_inside": lambda sparse: sparse(
        optax.partition({"kernel": optax.adam(0.1), "rest": optax.sgd(0.1)}, LABELS)
    ),
    "partition_outside": lambda sparse: optax.partition(
        {"kernel": sparse(optax.adam(0.1)), "rest": optax.sgd(0.1)}, LABELS
    ),
}


KERNELS = {
    path: core.Kernel(path, n, n, (*range(len(n)),), (1, math.prod(n[:-2]), *n[-2:]), n[:-2])
    for path, n in {
        "Conv_0/kernel": (3, 3, 4, 8),
        "Dense_0/kernel": (8, 6),
    }.items()
}
LAYER_KERNELS = {"kernel": dataclasses.replace(KERNELS["Conv_0/kernel"], path="kernel")}
magnitude = functools.partial(pruning.magnitude, KERNELS)
layer_magnitude = functools.partial(pruning.magnitude, LAYER_KERNELS)

# Each takes an inner optimizer, a sparsity and a key, maybe traced, to a sparse optimizer.
METHODS = {
    "hold_masks": lambda inner, sparsity, key: pruning.hold_masks(
        inner, pruning.masks(layer_magnitude(LAYER), sparsity)
    ),
    "prune_by_schedule": lambda inner, sparsity, key: pruning.prune_by_schedule(
        inner, layer_magnitude, pruning.cubic(sparsity, 2, 20), every=3
    ),
    "movement": lambda inner, sparsity, key: pruning.prune_by_schedule(
        inner,
        functools.partial(pruning.movement, LAYER_KERNELS),
        pruning.exponential(sparsity, 0, 15),
        allocation=pruning.global_(),
        needs=("accumulated",),
        accumulate=pruning.accumulate_movement,
    ),
    "ac_dc": lambda inner, sparsity, key: pruning.prune_by_schedule(
        inner, layer_magnitude, pruning.cyclic(pruning.one_shot(sparsity, 3), 9, 3)
    ),
    "straight_through": lambda inner, sparsity, key: pruning.straight_through(
        inner, layer_magnitude, pruning.one_shot(sparsity), every=2, decay=0.01
    ),
    "rigl": lambda inner, sparsity, key: pruning.rigl(
        inner,
        LAYER_KERNELS,
        sparsity,
        key,
        end=25,
        allocation=pruning.erk(LAYER_KERNELS),
        every=4,
    ),
    "set": lambda inner, sparsity, key: pruning.set_(
        inner, LAYER_KERNELS, sparsity, key, end=25, every=4
    ),
}
KEY = jax.random.key(0)


def sparse_state(state):
    """The state of the method, wherever in the state of an optimizer it is."""
    found = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "masks"))
    [one] = [x for x in found if hasattr(x, "masks")]
    return one


def mask_of(state):
    return sparse_state(state).masks["kernel"]


def left_over(state):
    """How much the inner optimizer still holds of removed weights."""
    inner = jax.tree.leaves(getattr(sparse_state(state), "inner", ()))
    mask = mask_of(state)
    like = [x for x in inner if x.shape == mask.shape]
    return sum((jnp.abs(jnp.where(mask, 0.0, x)).sum() for x in like), jnp.float32(0.0))


def train(tx, params, steps):
    """Plain training from the first mask; per step the kernel, its mask and what is left over."""

    def step(carry, target):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, target), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["kernel"], mask_of(state), left_over(state))

    targets = jnp.sin(jnp.arange(steps, dtype=jnp.float32))
    # Optax's own Adam needs promotion; `test_contract` runs our own code without.
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        params = params | {"kernel": jnp.where(mask_of(state), params["kernel"], 0.0)}
        return jax.lax.scan(step, (params, state), targets)[1]


def pairs():
    """Every method under every optimizer; of the methods that share their code, few at first."""
    for method, optimizer in itertools.product(METHODS, OPTIMIZERS):
        first = optimizer in ("adam", "multi_steps_outside", "inject_outside")
        again = method in ("hold_masks", "movement", "ac_dc", "set") and not first
        yield pytest.param(method, optimizer, marks=[pytest.mark.slow] if again else [])


@pytest.mark.parametrize(("method", "optimizer"), list(pairs()))
def test_parameters_lie_on_the_mask_after_every_step(method, optimizer):
    tx = OPTIMIZERS[optimizer](lambda inner: METHODS[method](inner, 0.8, KEY))
    kernels, masks, left = jax.jit(functools.partial(train, tx, steps=100))(LAYER)
    kernels, masks = (np.asarray(x).reshape(100, -1) for x in (kernels, masks))
    assert (kernels[~masks] == 0.0).all()
    assert (kernels[-1][masks[-1]] != kernels[0][masks[-1]]).any()
    moved = (masks[1:] != masks[:-1]).any(axis=1).sum()
    back = (masks[1:] > masks[:-1]).any(axis=1).sum()
    kept = masks.sum(axis=1)
    if method != "straight_through":
        # No moments of what is removed, so that none come back with a weight.
        assert (left == 0.0).all()
    # 288 − floor(0.8 · 288 + ½) = 58.
    assert kept[-1] == 58
    if method == "hold_masks":
        assert moved == 0
    elif method in ("rigl", "set"):
        assert (kept == 58).all()
        assert back > 0
    elif method == "ac_dc":
        # Dense for three updates of nine, three times; then 58 are kept.
        assert set(kept) == {58, 288}
        assert back == 2
    elif method == "straight_through":
        assert set(kept[3:]) == {58}
        assert back > 0
    else:
        assert moved > 1
        assert back == 0


@pytest.mark.parametrize("name", ["momentum", "adam", "lion", "multi_steps_outside"])
def test_other_leaves_train_as_without_masks(name):
    def end(sparse):
        with jax.numpy_dtype_promotion("standard"):
            tx = OPTIMIZERS[name](sparse)
            params, state = PARAMS, tx.init(PARAMS)
            for target in jnp.arange(6.0):
                updates, state = tx.update(jax.grad(loss)(params, target), state, params)
                params = optax.apply_updates(params, updates)
        return params

    masks = pruning.masks(magnitude(PARAMS), 0.7, exempt=["Dense_0/.*"])
    held = end(lambda inner: pruning.hold_masks(inner, masks))
    plain = end(lambda inner: inner)
    np.testing.assert_array_equal(held["Conv_0"]["bias"], plain["Conv_0"]["bias"])
    np.testing.assert_array_equal(held["Dense_0"]["kernel"], plain["Dense_0"]["kernel"])


CRITERIA = {
    "l1": (functools.partial(pruning.magnitude, KERNELS), ()),
    "l2": (functools.partial(pruning.magnitude, KERNELS, p=2), ()),
    "random": (
        functools.partial(pruning.random, KERNELS, key=jax.random.key(3, impl="unsafe_rbg")),
        (),
    ),
    "taylor": (functools.partial(pruning.taylor, KERNELS), ("gradients",)),
    "fisher": (functools.partial(pruning.fisher, KERNELS), ("squared_gradients",)),
    "lamp": (functools.partial(pruning.lamp, KERNELS), ()),
    "geometric_median": (functools.partial(pruning.geometric_median, KERNELS), ()),
}
SCHEDULES = {"one_shot": pruning.one_shot(0.5, 1), "cubic": pruning.cubic(0.5, 0, 4)}


COMBINATIONS = [
    (pruning.unstructured(), pruning.uniform),
    (pruning.unstructured(), functools.partial(pruning.erk, KERNELS)),
    (pruning.unstructured(), pruning.global_),
    (pruning.n_m(KERNELS, 2, 4), pruning.uniform),
]


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize(
    ("granularity", "allocation"),
    COMBINATIONS,
    ids=lambda x: getattr(x, "name", None) or x().name,
)
def test_contract(criterion, granularity, allocation):
    score, needs = criterion

    def link(schedule):
        inner = optax.sgd(0.1, momentum=0.9)
        return pruning.prune_by_schedule(
            inner, score, schedule, granularity, allocation(), needs=needs
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
    before = state.masks
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shape
    )
    for i in range(7):
        params, state = step(params, state, jnp.float32(i))
        masks = state.masks
        assert state.sparsity == schedule(i)
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
    if allocation().name == "erk":
        # 168 shared as (3+3+4+8) : (8+6) would give 94.5 and 73.5 > 48: the second is dense.
        assert counts == {"Conv_0": 120, "Dense_0": 48}
    if granularity.name != "unstructured":
        blocks = np.asarray(masks["Conv_0"]["kernel"])
        assert (blocks.sum(axis=2) == 2).all()


def test_updates_of_another_precision_land_on_zero():
    params = {"w": jnp.array([[0.1, 1 / 3]], jnp.bfloat16)}
    tx = pruning.hold_masks(optax.identity(), {"w": jnp.array([[False, True]])})
    updates, _ = tx.update({"w": jnp.ones((1, 2), jnp.float32)}, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    assert optax.apply_updates(params, updates)["w"][0, 0] == 0.0


def test_masks_change_only_when_due():
    prune = pruning.prune_by_schedule(
        optax.identity(), magnitude, pruning.cubic(0.5, 0, 4), every=3
    )
    state, reached = prune.init(PARAMS), []
    update = jax.jit(prune.update)
    for _ in range(8):
        _, state = update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
        reached.append(float(state.sparsity))
    # New masks at steps 0, 3, 6: 0.5 (1 − (1 − 3/4)³) = 0.4921875 at step 3.
    assert reached == [0.0, 0.0, 0.0, 0.4921875, 0.4921875, 0.4921875, 0.5, 0.5]


def test_a_sweep_of_schedules_is_one_vmap():
    own = {"kernel": dataclasses.replace(KERNELS["Dense_0/kernel"], path="kernel")}
    score = functools.partial(pruning.magnitude, own)

    def kept(sparsity):
        tx = pruning.prune_by_schedule(optax.sgd(0.1), score, pruning.cubic(sparsity, 0, 3))
        return train(tx, {"kernel": PARAMS["Dense_0"]["kernel"]}, 5)[1][-1].sum()

    assert jax.jit(jax.vmap(kept))(jnp.array([0.0, 0.25, 0.5, 1.0])).tolist() == [48, 36, 24, 0]


def test_exempt_leaves_are_never_masked():
    prune = pruning.prune_by_schedule(
        optax.identity(), magnitude, pruning.one_shot(0.5), exempt=["Conv_0/kernel"]
    )
    state = prune.init(PARAMS)
    assert state.masks["Conv_0"]["kernel"] == optax.MaskedNode()


def test_state_may_be_donated():
    masks = pruning.masks(magnitude(PARAMS), 0.5)
    tx = pruning.hold_masks(optax.identity(), masks)
    jax.jit(lambda s: jax.tree.map(jnp.logical_not, s), donate_argnums=0)(tx.init(PARAMS))
    assert leaf_counts(masks) == {"Conv_0": 144, "Dense_0": 24}


def test_bad_input_is_named():
    masks = pruning.masks(magnitude(PARAMS), 0.5)
    with pytest.raises(ValueError, match="masks must have the structure of params"):
        pruning.hold_masks(optax.identity(), masks).init({"Conv_0": PARAMS["Conv_0"]})
    tx = pruning.hold_masks(optax.identity(), masks)
    with pytest.raises(ValueError, match="update must be called with params, got None"):
        tx.update(PARAMS, tx.init(PARAMS))
    by_schedule = functools.partial(pruning.prune_by_schedule, optax.sgd(0.1))
    fisher = functools.partial(pruning.fisher, KERNELS)
    movement = functools.partial(pruning.movement, KERNELS)
    tx = by_schedule(fisher, pruning.one_shot(0.5), needs=("squared_gradients",))
    with pytest.raises(ValueError, match=r"must be called with squared_gradients=..., got none"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        by_schedule(magnitude, pruning.one_shot(0.5), every=0)
    with pytest.raises(
        ValueError, match=r"schedule for n_m\(2, 4\) must be in \[0, 0.5\], got 0.8"
    ):
        by_schedule(magnitude, pruning.one_shot(0.8), pruning.n_m(KERNELS, 2, 4))
    with pytest.raises(ValueError, match="hold kernel 'Conv_0/kernel' to prune, got only: b"):
        by_schedule(magnitude, pruning.one_shot(0.5)).init({"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="inner must be an optax transformation, got <function"):
        pruning.prune_by_schedule(pruning.magnitude, magnitude, pruning.one_shot(0.5))
    with pytest.raises(ValueError, match="if and only if accumulate is given, got needs=\\(\\)"):
        by_schedule(movement, pruning.one_shot(0.5), accumulate=pruning.accumulate_movement)
    with pytest.raises(ValueError, match=r"if and only if accumulate is given.*accumulate=None"):
        by_schedule(movement, pruning.one_shot(0.5), needs=("accumulated",))


def recording(optimizer):
    """An inner optimizer that asks for an extra argument, and keeps it."""

    def init(params):
        return jnp.float32(0.0), optimizer.init(params)

    def update(updates, state, params=None, *, value, **extra_args):
        updates, inner = optimizer.update(updates, state[1], params)
        return updates, (value, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("method", METHODS)
def test_method_contract(method, tmp_path):
    def tx(sparsity, key):
        return METHODS[method](recording(optax.trace(0.9)), sparsity, key)

    @jax.jit
    def step(carry, target, sparsity, key):
        params, state = carry
        gradients = jax.tree.map(lambda g: -0.05 * g, jax.grad(loss)(params, target))
        updates, state = tx(sparsity, key).update(gradients, state, params, value=target)
        return optax.apply_updates(params, updates), state

    targets = jnp.sin(jnp.arange(13, dtype=jnp.float32))
    seeds = jnp.array([0.8, 0.5]), jax.random.split(KEY)

    def start(sparsity, key):
        return LAYER, tx(sparsity, key).init(LAYER)

    def run(sparsity, key):
        carry = start(sparsity, key)
        for target in targets:
            carry = step(carry, target, sparsity, key)
        return carry

    alone = [run(*jax.tree.map(lambda x, i=i: x[i], seeds)) for i in (0, 1)]
    # One compilation for every step and every sparsity.
    assert step._cache_size() == 1
    # The state has the shapes that were known beforehand, and the extra argument went through.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), alone[0])
    assert jax.eval_shape(start, *jax.tree.map(lambda x: x[0], seeds)) == shapes
    scalars = [x for x in jax.tree.leaves(alone[0][1]) if x.shape == ()]
    assert float(targets[-1]) in map(float, scalars)

    # A stack of two sparsities and keys is two runs.
    stacked = jax.vmap(step, in_axes=(0, None, 0, 0))
    carry = jax.vmap(start)(*seeds)
    for target in targets:
        carry = stacked(carry, target, *seeds)
    for i in (0, 1):
        close(jax.tree.map(lambda x, i=i: x[i], carry), alone[i])

    # Without compiling it is the same, masks exactly.
    sparsity, key = jax.tree.map(lambda x: x[0], seeds)
    carry = start(sparsity, key)
    with jax.disable_jit():
        for target in targets[:5]:
            carry = step(carry, target, sparsity, key)
    halfway = start(sparsity, key)
    for target in targets[:5]:
        halfway = step(halfway, target, sparsity, key)
    close(carry, halfway)
    same(mask_of(carry[1]), mask_of(halfway[1]))

    # Saved, restored and resumed it is as if it had never stopped.
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(5, halfway)
    carry = checkpoints.restore(5, start(sparsity, key))
    same(carry, halfway)
    for target in targets[5:]:
        carry = step(carry, target, sparsity, key)
    same(carry, alone[0])


def primitives(jaxpr):
    """Names of the primitives of a jaxpr that run at every step: none inside a `cond`."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "cond":
            for sub in jax.extend.core.jaxprs_in_params(equation.params):
                yield from primitives(getattr(sub, "jaxpr", sub))


@pytest.mark.parametrize("method", METHODS)
def test_between_renewals_nothing_is_ranked(method):
    tx = METHODS[method](optax.sgd(0.1, momentum=0.9), 0.8, KEY)
    names = list(primitives(jax.make_jaxpr(tx.update)(LAYER, tx.init(LAYER), LAYER).jaxpr))
    assert names.count("cond") == (method != "hold_masks")
    assert not {"while", "scan", "sort", "threefry2x32", "random_bits"} & set(names)
    # Selecting, adding and comparing alone: at most a few for each of the two leaves.
    assert len(names) < 70, names


@pytest.mark.parametrize("method", METHODS)
def test_update_asks_for_the_parameters(method):
    tx = METHODS[method](optax.sgd(0.1), 0.8, KEY)
    with pytest.raises(ValueError, match="update must be called with params, got None"):
        tx.update(LAYER, tx.init(LAYER))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "hold_masks"])
def test_nothing_to_prune_is_an_error(method):
    with pytest.raises(ValueError, match=r"to prune, got (only: b|none)"):
        METHODS[method](optax.sgd(0.1), 0.8, KEY).init({"b": jnp.ones(2)})


@pytest.mark.parametrize("method", [name for name in METHODS if name != "hold_masks"])
def test_vectors_scalars_and_integers_are_left_alone(method):
    rest = {"bias": jnp.ones(3), "scale": jnp.float32(2.0), "count": jnp.arange(3)}
    tx = METHODS[method](optax.scale(-1), 0.8, KEY)
    state = tx.init(LAYER | rest)
    assert all(sparse_state(state).masks[name] == optax.MaskedNode() for name in rest)
    gradients = {"kernel": LAYER["kernel"]} | rest
    updates, _ = jax.jit(tx.update)(gradients, state, LAYER | rest)
    for name, leaf in rest.items():
        np.testing.assert_array_equal(updates[name], -leaf)


FREE = optax.contrib.schedule_free_sgd(0.1)
HELD = {"kernel": jnp.arange(8).reshape(2, 4) > 3}
DENSE = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
OWN = core.trace(lambda p, x: x @ p["kernel"], DENSE, jnp.ones((1, 2))).kernels
HALF = functools.partial(pruning.magnitude, OWN), pruning.one_shot(0.5)
FREELY = {
    "hold_masks": lambda inner: pruning.hold_masks(inner, HELD),
    "prune_by_schedule": lambda inner: pruning.prune_by_schedule(inner, *HALF),
    "straight_through": lambda inner: pruning.straight_through(inner, *HALF),
    "rigl": lambda inner: pruning.rigl(inner, OWN, 0.5, KEY, end=9, every=2),
    "set": lambda inner: pruning.set_(inner, OWN, 0.5, KEY, end=9, every=2),
}


def is_free(state):
    return isinstance(state, optax.contrib.ScheduleFreeState)


def evaluated(tx, steps):
    """The mask, and what a schedule-free optimizer inside is evaluated at, after each step."""
    params, state = DENSE, tx.init(DENSE)
    for step in range(steps):
        gradients = {"kernel": 1.0 + jnp.cos(step + DENSE["kernel"])}
        updates, state = jax.jit(tx.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
        (inner,) = [s for s in jax.tree.leaves(state, is_leaf=is_free) if is_free(s)]
        yield (
            np.asarray(state.masks["kernel"]),
            np.asarray(optax.contrib.schedule_free_eval_params(inner, params)["kernel"]),
        )


# Noise moves what has no gradient, and what is removed all the same.
NOISY = optax.contrib.schedule_free(
    optax.chain(optax.add_noise(0.1, 0.0, jax.random.key(0)), optax.sgd(0.1)), 0.1
)


@pytest.mark.parametrize("inner", [FREE, NOISY], ids=["plain", "noisy"])
@pytest.mark.parametrize("method", FREELY)
def test_averages_that_are_evaluated_lie_on_the_mask(method, inner):
    with jax.numpy_dtype_promotion("standard"):
        for mask, average in evaluated(FREELY[method](inner), 6):
            assert mask.sum() == 4
            assert (average[~mask] == 0.0).all()
            assert (average[mask] != 0.0).any()


def test_the_average_behind_a_mask_is_that_of_the_dense_weights():
    with jax.numpy_dtype_promotion("standard"):
        [(mask, shown)] = evaluated(FREELY["straight_through"](FREE), 1)
        # One step of size 0.1 from w on 1 + cos w: the average of one point is that point.
        dense = np.asarray(DENSE["kernel"] - 0.1 * (1 + jnp.cos(DENSE["kernel"])))
    np.testing.assert_allclose(shown, np.where(mask, dense, 0.0), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_of_every_method_is_sliced_with_the_parameters(method):
    tx = METHODS[method](optax.adam(0.1), 0.5, KEY)
    state = tx.init(LAYER)
    kept = {"kernel": (*map(np.arange, (3, 3, 4)), np.array([1, 5])), "bias": (np.array([1, 5]),)}
    small = core.slice_state(tx, state, LAYER, kept)
    masks, dense = sparse_state(small).masks["kernel"], sparse_state(state).masks["kernel"]
    np.testing.assert_array_equal(masks, dense[..., np.array([1, 5])])
    assert masks.shape == (3, 3, 4, 2)
    [adam] = [s for s in jax.tree.leaves(small, is_leaf=is_adam) if is_adam(s)]
    assert adam.mu["kernel"].shape == (3, 3, 4, 2)
    assert adam.mu["bias"].shape == (2,)
    assert adam.count.shape == ()


def is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)

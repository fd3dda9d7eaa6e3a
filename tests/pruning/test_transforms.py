import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_optimizers import (
    HELD,
    INNERS,
    KERNELS,
    LAYER,
    LAYER_KERNELS,
    OPTIMIZERS,
    OWN,
    PARAMS,
    SIZES,
    check_averages_lie_on_the_mask,
    check_contract,
    check_nothing_is_ranked_between_renewals,
    check_nothing_to_prune_is_an_error,
    check_state_is_sliced_with_the_parameters,
    check_update_asks_for_the_parameters,
    check_vectors_scalars_and_integers_are_left_alone,
    lie_on_the_mask,
    loss,
    train,
)

from hybrid_jax import contrib, pruning

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
}
HALF = functools.partial(pruning.magnitude, OWN), pruning.one_shot(0.5)
FREELY = {
    "hold_masks": lambda inner: pruning.hold_masks(inner, HELD),
    "prune_by_schedule": lambda inner: pruning.prune_by_schedule(inner, *HALF),
}


def leaf_counts(masks):
    return {name: int(masks[name]["kernel"].sum()) for name in SIZES}


def pairs():
    """Every method under every optimizer; of the methods that share their code, few at first."""
    for method, optimizer in itertools.product(METHODS, OPTIMIZERS):
        first = optimizer in ("adam", "multi_steps_outside", "inject_outside")
        again = method != "prune_by_schedule" and not first
        yield pytest.param(method, optimizer, marks=[pytest.mark.slow] if again else [])


@pytest.mark.parametrize(("method", "optimizer"), list(pairs()))
def test_parameters_lie_on_the_mask_after_every_step(method, optimizer):
    kept, moved, back, left = lie_on_the_mask(METHODS[method], optimizer)
    # No moments of what is removed, so that none come back with a weight.
    assert (left == 0.0).all()
    if method == "hold_masks":
        assert moved == 0
    elif method == "ac_dc":
        # Dense for three updates of nine, three times; then 58 are kept.
        assert set(kept) == {58, 288}
        assert back == 2
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
    (contrib.n_m(KERNELS, 2, 4), pruning.uniform),
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
        check_along_the_schedule(
            link(schedule), functools.partial(step, which=which), schedule, granularity, allocation
        )
    assert step._cache_size() == 1


def check_along_the_schedule(tx, step, schedule, granularity, allocation):
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
        by_schedule(magnitude, pruning.one_shot(0.8), contrib.n_m(KERNELS, 2, 4))
    with pytest.raises(ValueError, match="hold kernel 'Conv_0/kernel' to prune, got only: b"):
        by_schedule(magnitude, pruning.one_shot(0.5)).init({"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="inner must be an optax transformation, got <function"):
        pruning.prune_by_schedule(pruning.magnitude, magnitude, pruning.one_shot(0.5))
    with pytest.raises(ValueError, match="if and only if accumulate is given, got needs=\\(\\)"):
        by_schedule(movement, pruning.one_shot(0.5), accumulate=pruning.accumulate_movement)
    with pytest.raises(ValueError, match=r"if and only if accumulate is given.*accumulate=None"):
        by_schedule(movement, pruning.one_shot(0.5), needs=("accumulated",))


@pytest.mark.parametrize("method", METHODS)
def test_method_contract(method, tmp_path):
    check_contract(METHODS[method], tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_between_renewals_nothing_is_ranked(method):
    check_nothing_is_ranked_between_renewals(METHODS[method], method != "hold_masks")


@pytest.mark.parametrize("method", METHODS)
def test_update_asks_for_the_parameters(method):
    check_update_asks_for_the_parameters(METHODS[method])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "hold_masks"])
def test_nothing_to_prune_is_an_error(method):
    check_nothing_to_prune_is_an_error(METHODS[method])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "hold_masks"])
def test_vectors_scalars_and_integers_are_left_alone(method):
    check_vectors_scalars_and_integers_are_left_alone(METHODS[method])


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("method", FREELY)
def test_averages_that_are_evaluated_lie_on_the_mask(method, inner):
    check_averages_lie_on_the_mask(FREELY[method](INNERS[inner]))


@pytest.mark.parametrize("method", METHODS)
def test_the_state_of_every_method_is_sliced_with_the_parameters(method):
    check_state_is_sliced_with_the_parameters(METHODS[method])

"""What every optimizer that masks has to do, whatever it wraps: shared by pruning and contrib."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from layouts import flax_kernels

from hybrid_jax import core, training

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


KERNELS = flax_kernels(PARAMS)
LAYER_KERNELS = {"kernel": dataclasses.replace(KERNELS["Conv_0/kernel"], path="kernel")}
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


def lie_on_the_mask(method, optimizer):
    """Parameters, masks and counts kept in 100 steps; parameters are on the mask after each."""
    tx = OPTIMIZERS[optimizer](lambda inner: method(inner, 0.8, KEY))
    kernels, masks, left = jax.jit(functools.partial(train, tx, steps=100))(LAYER)
    kernels, masks = (np.asarray(x).reshape(100, -1) for x in (kernels, masks))
    assert (kernels[~masks] == 0.0).all()
    assert (kernels[-1][masks[-1]] != kernels[0][masks[-1]]).any()
    moved = (masks[1:] != masks[:-1]).any(axis=1).sum()
    back = (masks[1:] > masks[:-1]).any(axis=1).sum()
    kept = masks.sum(axis=1)
    # 288 − floor(0.8 · 288 + ½) = 58.
    assert kept[-1] == 58
    return kept, moved, back, left


def recording(optimizer):
    """An inner optimizer that asks for an extra argument, and keeps it."""

    def init(params):
        return jnp.float32(0.0), optimizer.init(params)

    def update(updates, state, params=None, *, value, **extra_args):
        updates, inner = optimizer.update(updates, state[1], params)
        return updates, (value, inner)

    return optax.GradientTransformationExtraArgs(init, update)


same = chex.assert_trees_all_equal
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def check_contract(method, tmp_path):
    """Compiled once, stacked, eager, and restored it is the same training."""

    def tx(sparsity, key):
        return method(recording(optax.trace(0.9)), sparsity, key)

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


def check_nothing_is_ranked_between_renewals(method, conditions=1):
    tx = method(optax.sgd(0.1, momentum=0.9), 0.8, KEY)
    names = list(primitives(jax.make_jaxpr(tx.update)(LAYER, tx.init(LAYER), LAYER).jaxpr))
    assert names.count("cond") == conditions
    assert not {"while", "scan", "sort", "threefry2x32", "random_bits"} & set(names)
    # Selecting, adding and comparing alone: at most a few for each of the two leaves.
    assert len(names) < 70, names


def check_update_asks_for_the_parameters(method):
    tx = method(optax.sgd(0.1), 0.8, KEY)
    with pytest.raises(ValueError, match="update must be called with params, got None"):
        tx.update(LAYER, tx.init(LAYER))


def check_nothing_to_prune_is_an_error(method):
    with pytest.raises(ValueError, match=r"to prune, got (only: b|none)"):
        method(optax.sgd(0.1), 0.8, KEY).init({"b": jnp.ones(2)})


def check_vectors_scalars_and_integers_are_left_alone(method):
    rest = {"bias": jnp.ones(3), "scale": jnp.float32(2.0), "count": jnp.arange(3)}
    tx = method(optax.scale(-1), 0.8, KEY)
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


INNERS = {"plain": FREE, "noisy": NOISY}


def check_averages_lie_on_the_mask(tx):
    with jax.numpy_dtype_promotion("standard"):
        for mask, average in evaluated(tx, 6):
            assert mask.sum() == 4
            assert (average[~mask] == 0.0).all()
            assert (average[mask] != 0.0).any()


def check_state_is_sliced_with_the_parameters(method):
    tx = method(optax.adam(0.1), 0.5, KEY)
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

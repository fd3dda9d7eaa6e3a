"""Law 1: masked equals shrunk, for every criterion and every model we ship.

What a criterion is given besides the parameters is drawn at random: the law holds whatever it is.
Every criterion meets every model in inference; reductions, and in training criteria, take turns.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import contrib, core, models, pruning

# criterion(kernels, params, statistics of either sign, statistics that are not negative)
CRITERIA = {
    "magnitude": lambda k, p, signed, positive: pruning.magnitude(k, p),
    "random": lambda k, p, signed, positive: pruning.random(k, p, jax.random.key(3)),
    "lamp": lambda k, p, signed, positive: pruning.lamp(k, p),
    "geometric_median": lambda k, p, signed, positive: pruning.geometric_median(k, p),
    "taylor": lambda k, p, signed, positive: pruning.taylor(k, p, signed),
    "snip": lambda k, p, signed, positive: pruning.snip(k, p, signed),
    "grasp": lambda k, p, signed, positive: pruning.grasp(k, p, signed),
    "fisher": lambda k, p, signed, positive: pruning.fisher(k, p, positive),
    "movement": lambda k, p, signed, positive: pruning.movement(k, p, signed),
    "synflow": lambda k, p, signed, positive: contrib.synflow(k, p, positive),
    "wanda": lambda k, p, signed, positive: pruning.wanda(k, p, positive),
    "chip": lambda k, p, signed, positive: pruning.chip(k, p, positive),
    "batchnorm_scale": lambda k, p, signed, positive: pruning.batchnorm_scale(p),
}
REDUCTION = dict(zip(models.names(), itertools.cycle(("sum", "mean", "max", "l2"))))
CRITERION = dict(zip(models.names(), itertools.cycle(CRITERIA)))


def first(names):
    """Of the ordinary run are these; the other models are of the long one."""
    slow = pytest.mark.slow
    return [n if n in names else pytest.param(n, marks=slow) for n in models.names()]


@functools.cache
def kept_by_criterion(small_model, name):
    """The graph, and {criterion: {group: bool[n]}} with half of each group kept."""
    fn, _, params, images = small_model(name)
    graph = core.trace(fn, params, images)
    rng = np.random.default_rng(1)
    signed = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f"), params)
    positive = jax.tree.map(np.abs, signed)
    # Not compiled as a whole: the models share shapes, and with them what is compiled for each.
    *of_kernels, of_scales = [
        score(graph.kernels, params, signed, positive) for score in CRITERIA.values()
    ]

    @jax.jit
    def reduced(of_kernels, of_scales):
        over = functools.partial(pruning.group_scores, groups=graph.groups, reduce=REDUCTION[name])
        # Stacked and mapped over, so that reducing is one program and not one for each criterion.
        rows = jax.vmap(over)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_kernels))
        return jax.tree.map(lambda a, b: jnp.vstack([a, b]), rows, over(of_scales))

    rows = jax.device_get(reduced(of_kernels, of_scales))
    return graph, {
        criterion: pruning.keep_channels({group: s[i] for group, s in rows.items()}, 0.5)
        for i, criterion in enumerate(CRITERIA)
    }


def close(a, b):
    """Within 1e-5 of the largest value: batch statistics of few images add roundings up."""

    def agree(x, y):
        most = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * most)

    jax.tree.map(agree, a, b)


@pytest.mark.parametrize("name", first(["resnet8", "mobilenet_v2", "densenet40"]))
def test_masked_equals_shrunk_by_every_criterion(name, small_model):
    fn, _, params, images = small_model(name)
    graph, kept_by = kept_by_criterion(small_model, name)
    masks = core.expand(kept_by[CRITERION[name]], graph.groups, params)
    small_fn, _, certificate = core.shrink(fn, params, masks, images)
    assert certificate.macs[1] < 0.5 * certificate.macs[0]
    assert certificate.difference < 1e-5
    # Widths are uniform, so that one small program serves all criteria; but a shortcut that pads
    # knows its channels by their places.
    pads = name in ("resnet8", "resnet20", "resnet56")
    run, programs, different = jax.jit(fn), {"": jax.jit(small_fn)}, set()
    for keep in kept_by.values():
        masks = core.expand(keep, graph.groups, params)
        kept, program = core.kept_indices(graph, masks), ""
        small = core.slice_tree(params, kept)
        if pads:
            small_fn = core.narrow(fn, params, kept)
            program = str(jax.make_jaxpr(small_fn)(small, images))
        small_run = programs.setdefault(program, jax.jit(small_fn))
        close(small_run(small, images), run(pruning.apply_masks(params, masks), images))
        different.add(b"".join(np.asarray(mask).tobytes() for mask in keep.values()))
    # taylor, snip and those of the same statistics may agree; the others do not.
    assert len(different) > len(CRITERIA) / 2


@pytest.mark.parametrize("name", models.names())
def test_masked_equals_shrunk_in_training_mode(name, small_model):
    _, train, params, images = small_model(name)
    graph, kept_by = kept_by_criterion(small_model, name)
    masks = core.expand(kept_by[CRITERION[name]], graph.groups, params)
    kept = core.kept_indices(graph, masks)
    logits, statistics = jax.jit(train)(pruning.apply_masks(params, masks), images)
    small_train = jax.jit(core.narrow(train, params, kept))
    small_logits, small_statistics = small_train(core.slice_tree(params, kept), images)
    close(small_logits, logits)
    close(small_statistics, core.slice_tree(statistics, kept))


@pytest.fixture
def in_double_precision(small_model, request):
    """Twenty steps of a deep network make much of how sums are rounded, which is not the law's."""
    kept_by_criterion(small_model, request.getfixturevalue("name"))  # Worked out in single.
    # Linen's normalization promotes with float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


# A residual, a depthwise and a concatenating network.
@pytest.mark.parametrize("name", first(["resnet8", "mobilenet_v2", "densenet40"]))
def test_masked_equals_shrunk_after_twenty_more_steps(name, small_model, in_double_precision):
    _, train, params, images = small_model(name)
    graph, kept_by = kept_by_criterion(small_model, name)
    masks = core.expand(kept_by[CRITERION[name]], graph.groups, params)
    kept = core.kept_indices(graph, masks)
    params, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, images))
    tx = pruning.hold_masks(optax.sgd(0.001, momentum=0.9), {"params": masks["params"]})

    def stepper(train):
        @jax.jit
        def step(params, state, images):
            def loss(weights):
                logits, statistics = train(params | weights, images)
                return jnp.mean(jnp.square(logits - 1)), statistics

            weights = {"params": params["params"]}
            gradients, statistics = jax.grad(loss, has_aux=True)(weights)
            updates, state = tx.update(gradients, state, weights)
            return optax.apply_updates(weights, updates) | statistics, state

        return step

    step, small_step = stepper(train), stepper(core.narrow(train, params, kept))
    batches = [jnp.roll(images, shift, axis=2) for shift in range(3)]
    # One step before the removal, so that there is momentum to be sliced with the rest.
    state = tx.init({"params": params["params"]})
    masked, state = step(pruning.apply_masks(params, masks), state, batches[0])
    small = core.slice_tree(masked, kept)
    small_state = core.slice_state(tx, state, {"params": params["params"]}, kept)
    for i in range(20):
        masked, state = step(masked, state, batches[i % 3])
        small, small_state = small_step(small, small_state, batches[i % 3])
    for path, before in core.flatten_paths(core.slice_tree(params, kept)).items():
        if path.endswith("kernel"):
            assert np.abs(core.flatten_paths(small)[path] - before).max() > 1e-4, path
    assert all(leaf.size == 0 or leaf.all() for leaf in jax.tree.leaves(small_state.masks))
    close(core.slice_tree(masked, kept), small)
    close(masked, pruning.apply_masks(masked, masks))

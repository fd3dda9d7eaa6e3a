"""The laws, over every criterion × granularity × allocation × schedule that we ship.

Whoever adds one adds it to its registry here.
"""

import functools
import inspect
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from hybrid_jax import core, pruning


def network(params, x):
    for layer in ("first", "second"):
        p = params[layer]
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x * p["scale"].reshape(1, 1, 1, -1) + p["bias"].reshape(1, 1, 1, -1))
    return x.mean((1, 2)) @ params["head"]["kernel"]


def leaf(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "first": {"kernel": leaf(0, 3, 3, 4, 8), "scale": leaf(1, 8), "bias": leaf(2, 8)},
    "second": {"kernel": leaf(3, 1, 1, 8, 12), "scale": leaf(4, 12), "bias": leaf(5, 12)},
    "head": {"kernel": leaf(6, 12, 6)},
    "temperature": jnp.ones(()),
    "steps": jnp.zeros((), jnp.int32),
}
IMAGES = leaf(7, 2, 4, 4, 4)
GRAPH = core.trace(network, PARAMS, IMAGES)
GROUPS, KERNELS = GRAPH.groups, GRAPH.kernels
GRAMS = core.input_grams(network, PARAMS, [(IMAGES,)])

# {name in `pruning`: its scores of some parameters}.
CRITERIA = {
    "batchnorm_scale": pruning.batchnorm_scale,
    "chip": lambda p: pruning.chip(KERNELS, p, p),
    "fisher": lambda p: pruning.fisher(KERNELS, p, p),
    "geometric_median": functools.partial(pruning.geometric_median, KERNELS),
    "grasp": lambda p: pruning.grasp(KERNELS, p, p),
    "lamp": functools.partial(pruning.lamp, KERNELS),
    "magnitude": functools.partial(pruning.magnitude, KERNELS),
    "movement": lambda p: pruning.movement(KERNELS, p, p),
    "obs": lambda p: pruning.obs(p, GRAMS),
    "random": lambda p: pruning.random(KERNELS, p, jax.random.key(0)),
    "snip": lambda p: pruning.snip(KERNELS, p, p),
    "synflow": lambda p: pruning.synflow(KERNELS, p, p),
    "taylor": lambda p: pruning.taylor(KERNELS, p, p),
    "wanda": lambda p: pruning.wanda(KERNELS, p, p),
}
# {name: (granularity, f(indices of a leaf's axes, its shape) -> (row, unit) of each weight)}.
GRANULARITIES = {
    "unstructured": (pruning.unstructured(), lambda i, n: (0 * i[0], ravel(i, n))),
    "n_m": (
        pruning.n_m(KERNELS, 2, 4),
        lambda i, n: (ravel((*i[:-2], i[-2] // 4, i[-1]), (*n[:-2], n[-2] // 4, n[-1])), i[-2] % 4),
    ),
    "blocks": (
        pruning.blocks(KERNELS, 2, 2),
        lambda i, n: (
            0 * i[0],
            ravel((*i[:-2], i[-2] // 2, i[-1] // 2), (*n[:-2], n[-2] // 2, n[-1] // 2)),
        ),
    ),
    "kernels": (pruning.kernels(KERNELS), lambda i, n: (0 * i[0], ravel(i[-2:], n[-2:]))),
    "channels": (pruning.channels(GROUPS), None),
}
ALLOCATIONS = {
    "uniform": pruning.uniform(),
    "global_": pruning.global_(),
    "erk": pruning.erk(KERNELS),
}
SCHEDULES = {
    "cubic": pruning.cubic(0.5, begin=1, end=5, initial=0.1),
    "cyclic": pruning.cyclic(pruning.one_shot(0.4, step=1), period=3, cycles=2),
    "exponential": pruning.exponential(0.5, begin=0, end=4),
    "iterative": pruning.iterative(0.2, every=2, rounds=3),
    "one_shot": pruning.one_shot(0.45, step=2),
}
# Functions that stand next to these and are none; modules that hold none.
HELPERS = {"compensate", "group_scores", "keep_channels", "mean_squared_gradients"}
HELPERS |= {"accumulate_movement", "activation_norms", "channel_independence"}
HELPERS |= {"hessian_gradient", "synaptic_flow", "synflow_masks"}
WITHOUT = {"core", "masking", "packing", "transforms"}
WITHOUT |= {"lottery", "renewal", "rewiring", "scoring", "straight_through"}
WITHOUT |= {"penalties", "rounds", "sensitivity", "targets", "widths"}

COMBINATIONS = [
    pytest.param(granularity, allocation, id=f"{granularity}-{allocation}")
    for granularity in GRANULARITIES
    for allocation in ALLOCATIONS
    if granularity != "n_m" or allocation == "uniform"
]


def ravel(indices, shape):
    return np.ravel_multi_index(tuple(indices), shape)


def test_every_public_function_is_registered():
    registered = HELPERS.union(CRITERIA, GRANULARITIES, ALLOCATIONS, SCHEDULES)
    for name in pruning.__all__:
        public = getattr(pruning, name)
        module = getattr(public, "__module__", "").split(".")
        if inspect.isfunction(public) and module[0] == "hybrid_jax":
            assert name in registered or {module[1], module[2]} & WITHOUT, (
                f"{name} of {'.'.join(module)} must be in a registry of this test"
            )
    assert registered <= set(pruning.__all__)


@pytest.fixture(scope="module")
def scores_by_structure():
    """Scores by every criterion, of other and of equal parameters; lists of those alike.

    They are in steps of 1/64: their sums are exact, and many are equal.
    """
    alike = {}
    for criterion in CRITERIA.values():
        score = jax.jit(
            lambda params, f=criterion: jax.tree.map(
                lambda s: jnp.clip(jnp.round(s * 64), -999, 999) / 64, f(params)
            )
        )
        for params in (PARAMS, jax.tree.map(jnp.ones_like, PARAMS)):
            scores = score(params)
            alike.setdefault(jax.tree.structure(scores), []).append(scores)
    return list(alike.values())


def exact(sparsity, n):
    """floor(sparsity · n + ½), with sparsity to six decimals."""
    return int(Fraction(f"{float(sparsity):.6f}") * n + Fraction(1, 2))


def unit_rows(granularity, scores):
    """{name: (rows, n) scores of units}, worked out anew."""
    if granularity == "channels":
        found = pruning.group_scores(scores, GROUPS)
        return {name: np.asarray(found[name])[None] for name in sorted(found)}
    rows = {}
    for path, values in core.flatten_paths(scores).items():
        if not core.is_masked_node(values):
            row, unit = place(granularity, values.shape)
            rows[path] = np.zeros((row.max() + 1, unit.max() + 1))
            np.add.at(rows[path], (row, unit), np.asarray(values, np.float64))
    return rows


def kept_rows(granularity, masks):
    """{name: (rows, n)} which units are kept; every weight of a unit agrees."""
    flat = masked_leaves(masks)
    if granularity == "channels":
        keep = {}
        for group in sorted(GROUPS, key=lambda group: group.name):
            vector = next(m for m in group.members if len(m.shape) == 1)
            keep[group.name] = flat[vector.path][vector.index[:, 0]]
        expected = masked_leaves(core.expand(keep, GROUPS, PARAMS))
        assert set(expected) == set(flat)
        for path, mask in flat.items():
            np.testing.assert_array_equal(mask, expected[path])
        return {name: kept[None] for name, kept in keep.items()}
    rows = {}
    for path, mask in flat.items():
        row, unit = place(granularity, mask.shape)
        rows[path] = np.zeros((row.max() + 1, unit.max() + 1), bool)
        rows[path][row, unit] = mask
        np.testing.assert_array_equal(rows[path][row, unit], mask)
    return rows


def masked_leaves(masks):
    flat = core.flatten_paths(masks)
    return {p: np.asarray(mask) for p, mask in flat.items() if not core.is_masked_node(mask)}


def place(granularity, shape):
    return GRANULARITIES[granularity][1](np.indices(shape), shape)


def best(scores, count):
    """Marks the `count` highest of a vector, of equal ones the first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.isin(np.arange(len(scores)), order)


def check_exact(granularity, allocation, units, sparsity, masks):
    """Law 2: the counts are those of `sparsity`, and the units kept are the best, then first."""
    kept = kept_rows(granularity, masks)
    assert list(units) == list(kept)
    least = GRANULARITIES[granularity][0].at_least
    total = sum(rows.size for rows in units.values())
    wanted = max(total - exact(sparsity, total), least * len(units))
    for name, rows in units.items():
        n = rows.shape[1]
        counts = kept[name].sum(axis=1)
        if allocation == "uniform":
            assert (counts == max(n - exact(sparsity, n), least)).all()
        for values, count, mask in zip(rows, counts, kept[name], strict=True):
            np.testing.assert_array_equal(mask, best(values, count))
    if allocation != "uniform":
        assert sum(rows.sum() for rows in kept.values()) == wanted
    if allocation == "global_" and not least:
        all_kept = np.concatenate([rows.ravel() for rows in kept.values()])
        scores = np.concatenate([rows.ravel() for rows in units.values()])
        np.testing.assert_array_equal(all_kept, best(scores, wanted))


def fits(granularity, allocation, scores):
    """Whether what is scored has the axes that granularity and allocation speak of."""
    scored = {path for path, s in core.flatten_paths(scores).items() if not core.is_masked_node(s)}
    free = granularity == "channels" or (granularity == "unstructured" and allocation != "erk")
    return free or scored <= set(KERNELS)


@pytest.mark.parametrize(("granularity", "allocation"), COMBINATIONS)
def test_masks_are_exact_compiled_once_and_equal_eager(
    granularity, allocation, scores_by_structure
):
    kind, spread = GRANULARITIES[granularity][0], ALLOCATIONS[allocation]

    def masks(scores, sparsity):
        return pruning.masks(scores, sparsity, kind, spread)

    compiled, compilations = jax.jit(masks), 0
    sparsities = {float(s(step)) for s in SCHEDULES.values() for step in range(7)} | {0.37}
    for alike in scores_by_structure:
        if not fits(granularity, allocation, alike[0]):
            with pytest.raises(ValueError, match=r"must be of kernels with .* 'first/scale'"):
                masks(alike[0], 0.5)
            continue
        bulk = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)
        eager = jax.vmap(lambda scores: masks(scores, 0.37))(bulk)
        for i, scores in enumerate(alike):
            units = unit_rows(granularity, scores)
            for sparsity in sparsities:
                got = compiled(scores, jnp.float32(sparsity))
                check_exact(granularity, allocation, units, sparsity, got)
                if sparsity == 0.37:
                    own = jax.tree.map(lambda stacked, i=i: stacked[i], eager)
                    jax.tree.map(np.testing.assert_array_equal, got, own)
        compilations += 1
        shapes = jax.eval_shape(masks, alike[0], jnp.float32(0.37))
        core.check_same_structure("masks", shapes, got)
    # Law 6: neither other scores nor another sparsity compile anew.
    assert compiled._cache_size() == compilations > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_schedule_prunes_what_stays_pruned(granularity):
    kind = GRANULARITIES[granularity][0]
    allocation = "uniform" if granularity == "n_m" else "global_"
    tx = pruning.prune_by_schedule(
        optax.sgd(0.1, momentum=0.9),
        CRITERIA["magnitude"],
        SCHEDULES["cubic"],
        kind,
        ALLOCATIONS[allocation],
    )
    params = {name: PARAMS[name] for name in ("first", "second", "head")}

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(7):
        before = kept_rows(granularity, state.masks)
        params, state = step(params, state)
        kept = kept_rows(granularity, state.masks)
        for name, rows in kept.items():
            assert (rows <= before[name]).all()
        for path, mask in masked_leaves(state.masks).items():
            assert (np.asarray(core.flatten_paths(params)[path])[~mask] == 0.0).all()
    assert step._cache_size() == 1
    sizes = [rows.size for rows in kept.values()]
    lost = sum(sizes) - sum(rows.sum() for rows in kept.values())
    assert lost == exact(0.5, sum(sizes))

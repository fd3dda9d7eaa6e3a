"""Law 2 and what else masks promise, of any granularity, allocation and scores."""

from fractions import Fraction

import chex
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


def loss(params, x):
    return jnp.square(network(params, x) - 1).mean()


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
# Half of all weights, or less, on any schedule: what N:M of half the weights allows.
SPARSITIES = sorted(
    {
        round(float(make(0.5, 6)(step)), 6)
        for make in pruning.SCHEDULES.values()
        for step in range(7)
    }
    | {0.37}
)


def given(params):
    key = jax.random.key(0)
    return pruning.Given(GRAPH.kernels, params, network, loss, [(IMAGES,)], key)


def scores_by_structure(criteria):
    """Lists of scores alike, by each of the criteria, of other and of equal parameters.

    They are in steps of 1/64: their sums are exact, and many are equal.
    """
    alike = {}
    for criterion in criteria:
        for params in (PARAMS, jax.tree.map(jnp.ones_like, PARAMS)):
            scores = jax.tree.map(
                lambda s: jnp.asarray(np.clip(np.round(np.asarray(s) * 64), -999, 999) / 64),
                criterion(given(params)),
            )
            alike.setdefault(jax.tree.structure(scores), []).append(scores)
    return list(alike.values())


def exact(sparsity, n):
    """floor(sparsity · n + ½), with sparsity to six decimals."""
    return int(Fraction(f"{float(sparsity):.6f}") * n + Fraction(1, 2))


def kept_rows(kind, masks):
    """{name: (rows, n)} which units are kept; every weight of a unit agrees."""
    flat = core.flatten_paths(masks)
    leaves = {
        p: m if core.is_masked_node(m) else np.asarray(m, np.float32) for p, m in flat.items()
    }
    kept = {n: rows > 0 for n, rows in kind.split(leaves, kind.paths(leaves)).items()}
    merged = kind.merge(kept, leaves)
    for path, mask in flat.items():
        if not core.is_masked_node(mask):
            np.testing.assert_array_equal(mask, merged[path])
    return kept


def best(scores, count):
    """Marks the `count` highest of a vector, of equal ones the first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.isin(np.arange(len(scores)), order)


def check_exact(kind, allocation, units, sparsity, masks):
    """Law 2: the counts are those of `sparsity`, and the units kept are the best, then first."""
    kept = kept_rows(kind, masks)
    assert list(units) == list(kept)
    least = kind.at_least
    total = sum(rows.size for rows in units.values())
    wanted = max(total - exact(sparsity, total), least * len(units))
    for name, rows in units.items():
        n = rows.shape[1]
        counts = kept[name].sum(axis=1)
        if allocation.by_row:
            assert (counts == max(n - exact(sparsity, n), least)).all()
        for values, count, mask in zip(rows, counts, kept[name], strict=True):
            np.testing.assert_array_equal(mask, best(values, count))
    if not allocation.by_row:
        assert sum(rows.sum() for rows in kept.values()) == wanted
    if allocation.name == "global_" and not least:
        all_kept = np.concatenate([rows.ravel() for rows in kept.values()])
        scores = np.concatenate([rows.ravel() for rows in units.values()])
        np.testing.assert_array_equal(all_kept, best(scores, wanted))


def refusal(masks, scores):
    try:
        masks(scores, 0.5)
    except ValueError as error:
        return str(error)


def check_masks(kind, allocation, bulk_of_scores):
    """Exact, compiled once for all sparsities, and equal eagerly, mapped and compiled."""

    def masks(scores, sparsity):
        return pruning.masks(scores, sparsity, kind, allocation)

    if kind.max_sparsity < 1 and not allocation.by_row:
        with pytest.raises(ValueError, match=r"allocation must be uniform\(\) with"):
            masks(bulk_of_scores[0][0], 0.5)
        return
    compiled, compilations = jax.jit(masks), 0
    for alike in bulk_of_scores:
        flat = core.flatten_paths(alike[0])
        scored = {path for path, leaf in flat.items() if not core.is_masked_node(leaf)}
        if error := refusal(masks, alike[0]):
            # Of what is scored not all has the axes that granularity and allocation speak of.
            assert "must be of kernels with" in error
            assert not scored <= set(GRAPH.kernels)
            continue
        bulk = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)
        mapped = jax.vmap(lambda scores: masks(scores, 0.37))(bulk)
        for i, scores in enumerate(alike):
            leaves = {
                path: leaf if core.is_masked_node(leaf) else np.asarray(leaf)
                for path, leaf in core.flatten_paths(scores).items()
            }
            units = kind.split(leaves, kind.paths(leaves))
            for sparsity in SPARSITIES:
                got = compiled(scores, jnp.float32(sparsity))
                check_exact(kind, allocation, units, sparsity, got)
            for other in (jax.tree.map(lambda x, i=i: x[i], mapped), masks(scores, 0.37)):
                got = compiled(scores, jnp.float32(0.37))
                chex.assert_trees_all_equal(got, other)
        compilations += 1
        shapes = jax.eval_shape(masks, alike[0], jnp.float32(0.37))
        core.check_same_structure("masks", shapes, got)
    # Law 6: neither other scores nor another sparsity compile anew.
    assert compiled._cache_size() == compilations > 0


def check_what_is_pruned_stays_pruned(kind):
    """Along a schedule, in an optimizer."""
    allocation = pruning.uniform() if kind.max_sparsity < 1 else pruning.global_()
    tx = pruning.prune_by_schedule(
        optax.sgd(0.1, momentum=0.9),
        lambda params: pruning.magnitude(GRAPH.kernels, params),
        pruning.SCHEDULES["cubic"](0.5, 5),
        kind,
        allocation,
    )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    params = {name: PARAMS[name] for name in ("first", "second", "head")}
    state = tx.init(params)
    for _ in range(7):
        before = kept_rows(kind, state.masks)
        params, state = step(params, state)
        kept = kept_rows(kind, state.masks)
        for name, rows in kept.items():
            assert (rows <= before[name]).all()
        flat = core.flatten_paths(params)
        for path, mask in core.flatten_paths(state.masks).items():
            if not core.is_masked_node(mask):
                assert (np.asarray(flat[path])[~np.asarray(mask)] == 0.0).all()
    assert step._cache_size() == 1
    sizes = [rows.size for rows in kept.values()]
    lost = sum(sizes) - sum(rows.sum() for rows in kept.values())
    assert lost == exact(0.5, sum(sizes))

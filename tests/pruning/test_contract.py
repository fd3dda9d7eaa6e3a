"""The laws, over every criterion × granularity × allocation × schedule of the registries."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masks_contract import (
    GRAPH,
    PARAMS,
    check_masks,
    check_what_is_pruned_stays_pruned,
    given,
    scores_by_structure,
)

from hybrid_jax import core, pruning


def movement(given):
    """Of training steps, and so not among the criteria of a network as it is."""
    return pruning.movement(given.kernels, given.params, given.params)


@pytest.fixture(scope="module")
def scores():
    return scores_by_structure([*pruning.CRITERIA.values(), movement])


@pytest.mark.parametrize("allocation", pruning.ALLOCATIONS)
@pytest.mark.parametrize("granularity", pruning.GRANULARITIES)
def test_masks_are_exact_compiled_once_and_equal_eager(granularity, allocation, scores):
    kind, spread = pruning.GRANULARITIES[granularity](GRAPH), pruning.ALLOCATIONS[allocation](GRAPH)
    check_masks(kind, spread, scores)


@pytest.mark.parametrize("granularity", pruning.GRANULARITIES)
def test_a_schedule_prunes_what_stays_pruned(granularity):
    check_what_is_pruned_stays_pruned(pruning.GRANULARITIES[granularity](GRAPH))


@pytest.mark.parametrize("name", pruning.CRITERIA)
def test_a_criterion_by_name_scores_floats_like_the_parameters(name):
    scores = core.flatten_paths(pruning.CRITERIA[name](given(PARAMS)))
    assert list(scores) == list(core.flatten_paths(PARAMS))
    scored = {path: s for path, s in scores.items() if not core.is_masked_node(s)}
    assert scored.keys() <= set(GRAPH.kernels) or set(scored) == {"first/scale", "second/scale"}
    for path, own in scored.items():
        assert own.dtype == jnp.float32
        assert own.shape == GRAPH.parameters[path].shape
        assert np.isfinite(own).all()
        assert len(np.unique(own)) > 1
    again = core.flatten_paths(pruning.CRITERIA[name](given(PARAMS)))
    for path, own in scored.items():
        np.testing.assert_array_equal(own, again[path])


@pytest.mark.parametrize("name", sorted(pruning.CRITERIA))
def test_a_criterion_names_what_it_was_not_given(name):
    bare = pruning.Given(GRAPH.kernels, PARAMS)
    needs = {"random": "key", "wanda": "fn", "chip": "fn", "obs": "fn"}
    needs |= dict.fromkeys(("taylor", "snip", "grasp", "fisher"), "(loss|batches)")
    if name in needs:
        with pytest.raises(ValueError, match=f"given must have {needs[name]} for this criterion"):
            pruning.CRITERIA[name](bare)
    else:
        pruning.CRITERIA[name](bare)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("name", pruning.SCHEDULES)
def test_a_schedule_by_name_reaches_its_sparsity(name, steps):
    schedule = pruning.SCHEDULES[name](0.8, steps)
    compiled = jax.jit(lambda s, t: pruning.SCHEDULES[name](s, steps)(t))
    seen = [float(schedule(step)) for step in range(steps + 3)]
    assert all(0 <= s <= 0.8 + 1e-6 for s in seen)
    assert seen[0] == 0.0
    np.testing.assert_allclose(seen[steps:], 0.8, rtol=1e-6)
    np.testing.assert_allclose(
        [compiled(jnp.float32(0.8), step) for step in range(steps + 3)], seen, atol=1e-6
    )
    assert compiled._cache_size() == 1


def test_every_public_function_is_registered():
    """What makes a granularity, allocation or schedule, or scores kernels, has a name."""
    kinds = {
        pruning.Granularity: pruning.GRANULARITIES,
        pruning.Allocation: pruning.ALLOCATIONS,
        pruning.Schedule: pruning.SCHEDULES,
    }
    for name, public in vars(pruning).items():
        if not inspect.isfunction(public):
            continue
        signature = inspect.signature(public)
        if signature.return_annotation in kinds:
            assert name.rstrip("_") in kinds[signature.return_annotation], name
        if [*signature.parameters][:2] == ["kernels", "params"]:
            assert name in {*pruning.CRITERIA, "movement"}, name

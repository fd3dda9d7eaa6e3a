"""The laws of masks, over what contrib adds to the registries of pruning."""

import pytest
from masks_contract import (
    GRAPH,
    check_masks,
    check_what_is_pruned_stays_pruned,
    scores_by_structure,
)

from hybrid_jax import contrib, pruning


def synflow(given):
    flow = contrib.synaptic_flow(given.fn, given.params, *given.batches[0])
    return contrib.synflow(given.kernels, given.params, flow)


@pytest.fixture(scope="module")
def scores():
    return scores_by_structure([synflow, *map(pruning.CRITERIA.get, ("batchnorm_scale", "taylor"))])


GRANULARITIES = pruning.GRANULARITIES | contrib.GRANULARITIES


@pytest.mark.parametrize("allocation", pruning.ALLOCATIONS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_masks_are_exact_compiled_once_and_equal_eager(granularity, allocation, scores):
    check_masks(GRANULARITIES[granularity](GRAPH), pruning.ALLOCATIONS[allocation](GRAPH), scores)


@pytest.mark.parametrize("granularity", contrib.GRANULARITIES)
def test_a_schedule_prunes_what_stays_pruned(granularity):
    check_what_is_pruned_stays_pruned(GRANULARITIES[granularity](GRAPH))

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_optimizers import (
    DENSE,
    INNERS,
    KEY,
    LAYER_KERNELS,
    OPTIMIZERS,
    OWN,
    check_averages_lie_on_the_mask,
    check_contract,
    check_nothing_is_ranked_between_renewals,
    check_nothing_to_prune_is_an_error,
    check_state_is_sliced_with_the_parameters,
    check_update_asks_for_the_parameters,
    check_vectors_scalars_and_integers_are_left_alone,
    evaluated,
    lie_on_the_mask,
)

from hybrid_jax import contrib, pruning

layer_magnitude = functools.partial(pruning.magnitude, LAYER_KERNELS)
METHODS = {
    "straight_through": lambda inner, sparsity, key: contrib.straight_through(
        inner, layer_magnitude, pruning.one_shot(sparsity), every=2, decay=0.01
    ),
    "rigl": lambda inner, sparsity, key: contrib.rigl(
        inner,
        LAYER_KERNELS,
        sparsity,
        key,
        end=25,
        allocation=pruning.erk(LAYER_KERNELS),
        every=4,
    ),
    "set": lambda inner, sparsity, key: contrib.set_(
        inner, LAYER_KERNELS, sparsity, key, end=25, every=4
    ),
}
HALF = functools.partial(pruning.magnitude, OWN), pruning.one_shot(0.5)
FREELY = {
    "straight_through": lambda inner: contrib.straight_through(inner, *HALF),
    "rigl": lambda inner: contrib.rigl(inner, OWN, 0.5, KEY, end=9, every=2),
    "set": lambda inner: contrib.set_(inner, OWN, 0.5, KEY, end=9, every=2),
}


def pairs():
    """Every method under every optimizer; of two that share their code, one with few at first."""
    for method, optimizer in itertools.product(METHODS, OPTIMIZERS):
        first = optimizer in ("adam", "multi_steps_outside", "inject_outside")
        again = method == "set" and not first
        yield pytest.param(method, optimizer, marks=[pytest.mark.slow] if again else [])


@pytest.mark.parametrize(("method", "optimizer"), list(pairs()))
def test_parameters_lie_on_the_mask_after_every_step(method, optimizer):
    kept, _, back, left = lie_on_the_mask(METHODS[method], optimizer)
    assert back > 0
    assert set(kept[3:]) == {58}
    # No moments of what is removed, so that none come back with a weight.
    assert method == "straight_through" or ((left == 0.0).all() and set(kept) == {58})


@pytest.mark.parametrize("method", METHODS)
def test_method_contract(method, tmp_path):
    check_contract(METHODS[method], tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_between_renewals_nothing_is_ranked(method):
    check_nothing_is_ranked_between_renewals(METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_update_asks_for_the_parameters(method):
    check_update_asks_for_the_parameters(METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_prune_is_an_error(method):
    check_nothing_to_prune_is_an_error(METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_vectors_scalars_and_integers_are_left_alone(method):
    check_vectors_scalars_and_integers_are_left_alone(METHODS[method])


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("method", FREELY)
def test_averages_that_are_evaluated_lie_on_the_mask(method, inner):
    check_averages_lie_on_the_mask(FREELY[method](INNERS[inner]))


@pytest.mark.parametrize("method", METHODS)
def test_the_state_of_every_method_is_sliced_with_the_parameters(method):
    check_state_is_sliced_with_the_parameters(METHODS[method])


def test_the_average_behind_a_mask_is_that_of_the_dense_weights():
    with jax.numpy_dtype_promotion("standard"):
        [(mask, shown)] = evaluated(FREELY["straight_through"](INNERS["plain"]), 1)
        # One step of size 0.1 from w on 1 + cos w: the average of one point is that point.
        dense = np.asarray(DENSE["kernel"] - 0.1 * (1 + jnp.cos(DENSE["kernel"])))
    np.testing.assert_allclose(shown, np.where(mask, dense, 0.0), rtol=1e-5)

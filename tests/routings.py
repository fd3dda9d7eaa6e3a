"""Routings of four experts, and what every routing has to do."""

import functools
from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts

COSTS = [1.0, 2.0, 3.0, 4.0]


class Case(NamedTuple):
    """A routing of four experts.

    `most`: how many experts an input has at most; `alone`: the like routing of one expert; `make`:
    the factory, of k, if it has one; `sums`: whether the weights of an input sum to 'one', 'at most
    one' or 'one or zero'; `chooser`: whether each 'input' chooses its experts, each 'expert' its
    inputs, or 'chance'.
    """

    routing: Any
    most: int
    alone: Any
    make: Any = None
    sums: str = "one"
    chooser: str = "input"


def _top_of_all(k):
    return experts.top_k(k, normalize=False)


def _cost_aware(k, costs=COSTS):
    return experts.cost_aware(experts.top_k(k), costs, 0.5)


soft, switch, random = experts.soft(), experts.switch(), experts.random()
top_k, noisy = experts.top_k, experts.noisy_top_k
straight = experts.straight_through(top_k(1))
ROUTINGS = {
    "soft": Case(soft, 4, soft),
    "top_1": Case(top_k(1), 1, top_k(1), top_k),
    "top_2": Case(top_k(2), 2, top_k(1), top_k),
    "top_2_of_all": Case(_top_of_all(2), 2, _top_of_all(1), _top_of_all, "at most one"),
    "switch": Case(switch, 1, switch, None, "at most one"),
    "noisy": Case(noisy(2), 2, noisy(1), noisy),
    "straight": Case(straight, 1, straight),
    "random": Case(random, 1, random, chooser="chance"),
    "cost_aware": Case(_cost_aware(1), 1, _cost_aware(1, COSTS[:1]), _cost_aware),
}

compiled = functools.cache(jax.jit)


def weights(routing, logits, key=None):
    return compiled(routing)(logits, key).weights


def check_weights_are_a_choice(case, key):
    @hypothesis.settings(max_examples=20)
    @hypothesis.given(
        logits=hypothesis.extra.numpy.arrays(
            np.float32, (5, 4), elements=st.floats(-50, 50, width=32, allow_subnormal=False)
        )
    )
    def holds(logits):
        routed = compiled(case.routing)(jnp.asarray(logits), key)
        got = np.asarray(routed.weights)
        assert got.shape == routed.scores.shape == logits.shape
        assert got.dtype == routed.scores.dtype == logits.dtype
        assert (got >= 0).all()
        assert ((got > 0).sum(1) <= case.most).all()
        one = np.isclose(got.sum(1), 1, rtol=1e-5)
        if case.sums == "one":
            assert one.all()
        elif case.sums == "one or zero":
            assert (one | (got.sum(1) == 0)).all()
        else:
            assert (got.sum(1) <= 1 + 1e-5).all()
            assert (
                case.most == 4 or (got.sum(1) >= 0.25 - 1e-6).all()
            )  # the largest of 4 probabilities

    holds()


def check_compiled_mapped_and_differentiated(case, key):
    logits, keys = jax.random.normal(key, (2, 5, 4)), jax.random.split(key)
    want = [case.routing(z, k).weights for z, k in zip(logits, keys, strict=True)]
    got = [weights(case.routing, z, k) for z, k in zip(logits, keys, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    mapped = jax.jit(jax.vmap(case.routing))(logits, keys).weights
    np.testing.assert_allclose(mapped, want, atol=1e-6)

    def loss(logits):
        return jnp.square(case.routing(logits, key).weights[:, 1]).sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(logits[0])).all()


def check_no_second_compilation(case, key):
    route = jax.jit(case.routing)
    route(jnp.zeros((5, 4)), key)
    route(jnp.eye(5, 4), jax.random.key(1))
    assert route._cache_size() == 1


def check_nan_is_never_routed_in_silence(case, key):
    logits = jax.random.normal(key, (5, 4))
    got = np.asarray(weights(case.routing, logits.at[1, 2].set(jnp.nan), key))
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2, 3, 4]]).all()


def check_what_the_gate_rules_out_has_no_weight(case, key):
    logits = jax.random.normal(key, (5, 4)).at[:, 3].set(-jnp.inf)
    got = weights(case.routing, logits, key)
    assert np.isfinite(got).all()
    assert (got[:, 3] == 0).all() or case.chooser == "chance"


def check_ties_go_to_the_lowest_index(case, key):
    noiseless = key if case.chooser == "chance" else None
    chosen = np.asarray(weights(case.routing, jnp.zeros((5, 4)), noiseless)) > 0
    if case.chooser == "input":  # the first experts, for every input
        np.testing.assert_array_equal(chosen, np.tile(np.arange(4) < case.most, (5, 1)))
    elif case.chooser == "expert":  # the first inputs, for every expert
        np.testing.assert_array_equal(chosen, np.sort(chosen[:, :1].repeat(4, 1), 0)[::-1])


def check_one_expert_gets_everything(case, key):
    np.testing.assert_array_equal(weights(case.alone, jnp.zeros((2, 1)), key), 1)


def check_more_than_all_experts(case, key):
    if case.make:
        with pytest.raises(ValueError, match=r"k must be an integer in \[1, 4\], got 5"):
            weights(case.make(5), jnp.zeros((2, 4)), key)


def check_padding_is_not_routed_and_takes_no_place(case, key):
    """Among padding that the gate would prefer, and with NaN, the inputs go where they went."""
    key = key if case.chooser == "chance" else None
    logits, real = jax.random.normal(jax.random.key(3), (5, 4)), jnp.array([1, 2, 4, 5, 7])
    padded = jnp.full((8, 4), 100.0).at[0].set(jnp.nan).at[real].set(logits)
    weight = jnp.zeros(8).at[real].set(2.0)
    got = compiled(case.routing)(padded, key, weight).weights
    np.testing.assert_array_equal(got[jnp.array([0, 3, 6])], 0)
    if case.chooser != "chance":
        np.testing.assert_allclose(got[real], weights(case.routing, logits), rtol=1e-6)

    def loss(logits):
        return jnp.square(case.routing(logits, key, weight).weights[:, 1]).sum()

    gradient = jax.grad(loss)(padded)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[jnp.array([0, 3, 6])], 0)


CHECKS = (
    check_weights_are_a_choice,
    check_compiled_mapped_and_differentiated,
    check_no_second_compilation,
    check_nan_is_never_routed_in_silence,
    check_what_the_gate_rules_out_has_no_weight,
    check_ties_go_to_the_lowest_index,
    check_one_expert_gets_everything,
    check_more_than_all_experts,
    check_padding_is_not_routed_and_takes_no_place,
)

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax import core, cost
from hybrid_jax import quantization as q

CHOICES = (2, 3, 8)
SITES = ("a", "b", "c")


def fn(params, x):
    x = jax.nn.relu(x @ params["a"])
    return jax.nn.relu(x @ params["b"]) @ params["c"]


PARAMS = {"a": jnp.ones((3, 7)), "b": jnp.ones((7, 5)), "c": jnp.ones((5, 2))}
GRAPH = core.trace(fn, PARAMS, jnp.ones((1, 3)))
FORMULA = cost.formula(GRAPH)
SPEC = q.spec(GRAPH, weight_bits=8, activation_bits=8)


def weights_only(*damages):
    """Damages of 2, 3 and 8 bits for each site."""
    return {
        site: {"weight": dict(zip(CHOICES, each, strict=True))}
        for site, each in zip(SITES, damages, strict=True)
    }


def counted(bits, scales=None):
    weight, activation = (
        {site: bits[site][role] for site in SITES} for role in ("weight", "activation")
    )
    return cost.count(GRAPH, None, weight, activation, scales)


@settings(max_examples=40)
@given(
    damages=st.lists(st.lists(st.integers(0, 30), min_size=6, max_size=6), min_size=3, max_size=3),
    part=st.floats(0, 1),
    budget=st.sampled_from(["bytes", "bops"]),
)
def test_is_the_best_of_all_that_fit(damages, part, budget):
    sensitivity = {
        site: {
            "weight": dict(zip(CHOICES, each[:3], strict=True)),
            "activation": dict(zip(CHOICES, each[3:], strict=True)),
        }
        for site, each in zip(SITES, damages, strict=True)
    }
    every = []
    for chosen in itertools.product(CHOICES, repeat=6):
        bits = {
            site: {"weight": w, "activation": a}
            for site, w, a in zip(SITES, chosen[:3], chosen[3:], strict=True)
        }
        weight, activation = (
            {site: bits[site][role] for site in SITES} for role in ("weight", "activation")
        )
        total = sum(sensitivity[s][r][b] for s, roles in bits.items() for r, b in roles.items())
        every.append((FORMULA.count(None, weight, activation)[budget], total))
    low, high = min(every)[0], max(every)[0]
    most = low + int(part * (high - low))
    found = q.allocate_bits(sensitivity, FORMULA, SPEC, {budget: most})
    assert found.damage == min(total for value, total in every if value <= most)
    assert found.costs[budget] == getattr(counted(found.bits), budget) <= most


def test_by_hand():
    # Bytes of kernels at 2, 3, 8 bits: a 6, 8, 21; b 9, 14, 35; c 3, 4, 10. Scales 14 · 4 = 56.
    sensitivity = weights_only((9.0, 2.0, 0.0), (5.0, 4.0, 0.0), (1.0, 0.5, 0.0))
    # 100 − 56 = 44 bytes. With a at 8: 21 + 9 + 10 = 40 for 5, 21 + 14 + 4 = 39 for 4.5. With b
    # at 8 there are 9 left: 6 + 3 for 10. With a at 3: 8 + 14 + 10 for 6.
    found = q.allocate_bits(sensitivity, FORMULA, SPEC, {"bytes": 100})
    assert [found.bits[site]["weight"] for site in SITES] == [8, 3, 3]
    assert found.damage == 4.5
    assert found.costs["bytes"] == counted(found.bits).bytes == 95
    assert all(roles["activation"] == 8 for roles in found.bits.values())
    # What is asked of the operations too: a·b: 21·w·8 + 35·w·8 + 10·w·8 BOPs.
    both = q.allocate_bits(sensitivity, FORMULA, SPEC, {"bytes": 100, "bops": 21 * 64 + 45 * 16})
    assert [both.bits[site]["weight"] for site in SITES] == [8, 2, 2]
    assert both.costs["bops"] == counted(both.bits).bops == 21 * 64 + 45 * 16


def test_bytes_are_those_of_the_quantizers_scales():
    # As by hand above, but one scale for each kernel: 3 · 4 bytes in place of 14 · 4.
    sensitivity = weights_only((9.0, 2.0, 0.0), (5.0, 4.0, 0.0), (1.0, 0.5, 0.0))
    spec = q.spec(GRAPH, [(".*", {"weight": q.Quantizer(8)})])
    scales = q.scale_counts(GRAPH, spec)
    assert scales == dict.fromkeys(SITES, 1)
    formula = cost.formula(GRAPH, scales=scales)
    found = q.allocate_bits(sensitivity, formula, spec, {"bytes": 44 + 12})
    assert [found.bits[site]["weight"] for site in SITES] == [8, 3, 3]
    assert found.costs["bytes"] == 21 + 14 + 4 + 12
    assert counted(found.bits, scales).bytes == found.costs["bytes"]


def test_budget_below_the_least_says_the_least():
    sensitivity = weights_only((1, 1, 0), (1, 1, 0), (1, 1, 0))
    with pytest.raises(ValueError, match="budget of bytes must be at least 74, got 73"):
        q.allocate_bits(sensitivity, FORMULA, SPEC, {"bytes": 73})
    assert q.allocate_bits(sensitivity, FORMULA, SPEC, {"bytes": 74}).costs["bytes"] == 74


def test_rules_take_the_place_of_choices():
    sensitivity = weights_only((1, 1, 0), (1, 1, 0), (1, 1, 0))
    ends = [("a|c", {"weight": 8, "activation": 4}), ("b", {"weight": [3, 8]})]
    least = 21 + 14 + 10 + 56
    found = q.allocate_bits(sensitivity, FORMULA, SPEC, {"bytes": least}, rules=ends)
    assert found.bits == {
        "a": {"weight": 8, "activation": 4},
        "b": {"weight": 3, "activation": 8},
        "c": {"weight": 8, "activation": 4},
    }
    with pytest.raises(ValueError, match=f"must be at least {least}"):
        q.allocate_bits(sensitivity, FORMULA, SPEC, {"bytes": least - 1}, rules=ends)
    with pytest.raises(ValueError, match="rule 'stem' must match at least one path"):
        q.allocate_bits(
            sensitivity, FORMULA, SPEC, {"bytes": least}, rules=[("stem", {"weight": 8})]
        )


def test_masks_count():
    masks = {"b": jnp.arange(35).reshape(7, 5) % 7 == 0}
    formula = cost.formula(GRAPH, masks)
    sensitivity = weights_only((3, 2, 0), (3, 2, 0), (3, 2, 0))
    # Of 35 MACs of b 5 stay: at 8 bits each, 21 + 5 + 10 products of 64 BOPs.
    budget = {"bops": 36 * 64}
    found = q.allocate_bits(sensitivity, formula, SPEC, budget)
    weight, activation = (
        {site: roles[role] for site, roles in found.bits.items()}
        for role in ("weight", "activation")
    )
    assert weight == dict.fromkeys(SITES, 8)
    assert cost.count(GRAPH, masks, weight, activation).bops == found.costs["bops"] == 36 * 64
    # The zeros of b leave room that the dense network has not.
    dense = q.allocate_bits(sensitivity, FORMULA, SPEC, budget)
    assert found.damage < dense.damage


def test_sites_of_a_kernel_get_the_same_bits():
    def twice(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    graph = core.trace(twice, {"w": jnp.ones((4, 4))}, jnp.ones((1, 4)))
    formula, spec = cost.formula(graph), q.spec(graph)
    # Alone the first would take 2 bits: 16·2/8 + 4·4 = 20 bytes; together 8 bits are worth it.
    sensitivity = {
        "w": {"weight": {2: 0.0, 8: 1.0}},
        "w#2": {"weight": {2: 5.0, 8: 0.0}},
    }
    found = q.allocate_bits(sensitivity, formula, spec, {"bytes": 40})
    assert [roles["weight"] for roles in found.bits.values()] == [8, 8]
    assert found.damage == 1.0
    assert found.costs["bytes"] == 16 + 16
    with pytest.raises(ValueError, match=r"those of the other sites of kernel 'w', \(2, 8\), got"):
        q.allocate_bits({"w": sensitivity["w"]}, formula, spec, {"bytes": 40})


def test_bits_are_data_and_a_spec():
    sensitivity = weights_only((9.0, 2.0, 0.0), (5.0, 4.0, 0.0), (1.0, 0.5, 0.0))
    found = q.allocate_bits(sensitivity, FORMULA, SPEC, {"bytes": 100})
    params = {name: jax.random.normal(jax.random.key(i), leaf.shape)
              for i, (name, leaf) in enumerate(PARAMS.items())}  # fmt: skip
    x = jax.random.normal(jax.random.key(9), (4, 3))
    ranges = q.calibrate(fn, params, [(x,)], SPEC)
    stated = q.with_bits(SPEC, found.bits)
    assert stated.weight_bits == {"a": 8, "b": 3, "c": 3}
    as_data = jax.jit(q.fake_quantized(fn, SPEC))(params, ranges, x, bits=found.bits)
    as_spec = jax.jit(q.fake_quantized(fn, stated))(params, ranges, x)
    np.testing.assert_allclose(as_data, as_spec, rtol=1e-6)
    rules = q.spec(GRAPH, list(found.bits.items()))
    assert rules == stated


def test_with_bits_names_what_is_wrong():
    with pytest.raises(ValueError, match="site of bits must be one of a, b, c, got 'd'"):
        q.with_bits(SPEC, {"d": {"weight": 2}})
    with pytest.raises(ValueError, match="did you mean weight"):
        q.with_bits(SPEC, {"a": {"weights": 2}})
    with pytest.raises(ValueError, match=r"bits of 'a' must be an integer, got 4\.5"):
        q.with_bits(SPEC, {"a": {"weight": 4.5}})
    with pytest.raises(ValueError, match="bits must be 2 to 8, or 32 for off, got 9"):
        q.with_bits(SPEC, {"a": {"weight": 9}})


GOOD = weights_only((1, 1, 0), (1, 1, 0), (1, 1, 0))


@pytest.mark.parametrize(
    ("change", "budgets", "message"),
    [
        ({}, {}, "budgets must hold one of macs, bops, bytes, got none"),
        ({}, {"byte": 9}, "budgets must be one of .* did you mean bytes"),
        ({}, {"bytes": 9.5}, "budget of bytes must be an integer, got 9.5"),
        ({"d": {"weight": {2: 0.0}}}, {"bytes": 999}, "site of sensitivity must be one of a, b, c"),
        ({"a": {"kernel": {2: 0.0}}}, {"bytes": 999}, "must be one of weight, activation"),
        ({"a": {"weight": {}}}, {"bytes": 999}, "weight bits for 'a' must be at least one"),
        ({"a": {"weight": {1: 0.0}}}, {"bytes": 999}, "must be 2 to 8, or 32 for off, got 1"),
        (
            {"a": {"weight": {2: float("nan"), 8: 0.0}}},
            {"bytes": 999},
            r"sensitivity\['a'\]\['weight'\] must be finite, got 1 NaN",
        ),
    ],
)
def test_bad_input(change, budgets, message):
    with pytest.raises(ValueError, match=message):
        q.allocate_bits(GOOD | change, FORMULA, SPEC, budgets)


def test_bad_rules_and_widths():
    with pytest.raises(ValueError, match="must have a damage for 4, got"):
        q.allocate_bits(GOOD, FORMULA, SPEC, {"bytes": 999}, rules=[("a", {"weight": (2, 4)})])
    with pytest.raises(ValueError, match="weight bits for 'a' must be at least one, got none"):
        q.allocate_bits(GOOD, FORMULA, SPEC, {"bytes": 999}, rules=[("a", {"weight": ()})])
    with pytest.raises(ValueError, match="group of widths must be one of a, b, got 'c'"):
        q.allocate_bits(GOOD, FORMULA, SPEC, {"bytes": 999}, widths={"c": {2: 0.0}})
    with pytest.raises(ValueError, match=r"width of 'a' must be an integer in \[1, 7\], got 8"):
        q.allocate_bits(GOOD, FORMULA, SPEC, {"bytes": 999}, widths={"a": {8: 0.0}})
    with pytest.raises(ValueError, match=r"widths\['a'\] must be at least one, got none"):
        q.allocate_bits(GOOD, FORMULA, SPEC, {"bytes": 999}, widths={"a": {}})
    with pytest.raises(ValueError, match=r"widths\['a'\] must be finite"):
        q.allocate_bits(
            GOOD, FORMULA, SPEC, {"bytes": 999}, widths={"a": {3: float("inf"), 7: 0.0}}
        )

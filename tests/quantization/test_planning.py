"""What a plan stores, how, and which edges alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax import quantization as q
from hybrid_jax.quantization import stored

EYE, X = jnp.eye(2), jnp.array([[1.2, 2.0]])


def planned(fn, params, x=X, rules=None, **bits):
    return q.plan(p.lower(fn, params, x), q.spec(core.trace(fn, params, x), rules, **bits))


def held(plan):
    """{edge: name, bits and site of its slot}, without what is in floats."""
    slots = ((name, slot) for name, slot in plan.slots.items() if slot)
    return {name: (slot.name, slot.quantizer.bits, slot.site) for name, slot in slots}


def residual(params, x):
    return nn.relu(x @ params["w"] + x) @ params["v"]


PAIR = dict.fromkeys("wv", EYE)


def test_an_edge_of_a_site_has_its_range_and_others_their_own():
    found = held(planned(residual, PAIR))
    # x is read by the site and by the sum: all of it, so that the site's range is that of both.
    assert found == {"x/8 bits": ("x", 8, "w"), "w": ("w", 8, None), "add": ("add", 8, "v")}
    # What is returned is a sum in floats.
    assert planned(residual, PAIR).slots["v"] is None


def test_fewer_bits_are_taken_through_a_conversion_with_a_range_of_its_own():
    plan = planned(residual, PAIR, rules=[("w", {"activation": 4})])
    found = held(plan)
    assert found["x/8 bits"] == ("x", 8, None)
    assert found["x/4 bits"] == ("x/4 bits", 4, "w")
    converts = [op for op in plan.program.operations if isinstance(op, p.Convert)]
    assert [op.inputs for op in converts] == [("x",), ("x",)]


@pytest.mark.parametrize("four", ["ac", "bc", "abc"])
def test_what_several_take_is_stored_once(four):
    def fn(params, x):
        y = nn.relu(x @ params["w"])
        return y @ params["a"] + y @ params["b"] + y @ params["c"]

    plan = planned(fn, dict.fromkeys("wabc", EYE), rules=[(f"[{four}]", {"activation": 4})])
    takes = {op.name: op.inputs[0] for op in plan.program.weighted}
    assert len({takes[name] for name in four}) == 1
    slots = {slot.name for slot in plan.stored.values()}
    assert slots == ({"x", "w"} if len(four) == 3 else {"x", "w", "w/4 bits"})


def test_parts_of_a_concatenation_are_made_in_the_encoding_of_the_whole():
    def fn(params, x):
        y = jnp.concatenate([x @ params["a"], x @ params["b"]], -1)
        return y.reshape(len(x), 2, 2).transpose(0, 2, 1).reshape(len(x), 4) @ params["c"]

    plan = planned(fn, {"a": EYE, "b": EYE, "c": jnp.ones((4, 2))})
    inner = [name for name in plan.slots if name not in ("x", "x/8 bits", "c")]
    assert len({plan.slots[name].name for name in inner}) == 1
    assert plan.slots["a"].site == "c"
    assert [plan.as_stored(op) for op in plan.program.operations if op.output in inner[2:]] == [
        True
    ] * len(inner[2:])

    def read_apart(params, x):
        y = x @ params["a"]
        return jnp.concatenate([y, x @ params["b"]], -1) @ params["c"] + y

    apart = held(planned(read_apart, {"a": EYE, "b": EYE, "c": jnp.ones((4, 2))}))
    # What is read elsewhere, too, keeps its own.
    assert apart["a"][0] == "a" != apart["concatenate"][0] == apart["b"][0]


def test_encodings_that_depend_on_no_range():
    def fn(params, x):
        y = x.astype(jnp.float32) @ params["w"]
        return nn.sigmoid(y) @ params["a"] + jnp.tanh(y) @ params["b"]

    pixels = jnp.array([[3, 200]], jnp.uint8)
    plan = planned(fn, {"w": EYE, "a": EYE, "b": EYE}, pixels)
    fixed = {name: slot.fixed for name, slot in plan.slots.items() if slot and slot.fixed}
    assert fixed == {
        "x/8 bits": p.Encoding(1.0),
        "logistic": p.Encoding(1 / 256),
        "tanh": p.Encoding(1 / 128, 128),
    }
    assert list(plan.stored) == ["w"]
    # A site that takes it in fewer bits has a range of its own.
    few = planned(fn, {"w": EYE, "a": EYE, "b": EYE}, pixels, [("a", {"activation": 3})])
    assert few.slots["logistic"].fixed is None
    assert few.slots["logistic"].site == "a"


CHAIN = {name: EYE for name in "abc"}


def chain(params, x):
    return nn.relu(nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]


@pytest.mark.parametrize(
    ("rule", "ranged", "encoded"),
    [
        ({"weight": 32}, "ac", ["x/8 bits", "a/8 bits", "b/8 bits"]),
        ({"activation": 32}, "abc", ["x/8 bits", "b/8 bits"]),
        ({"weight": 4}, "abc", ["x/8 bits", "a", "b"]),
    ],
)
def test_a_site_of_32_bits_is_in_floats(rule, ranged, encoded):
    plan = planned(chain, CHAIN, rules=[("b", rule)])
    assert plan.ranged == list(ranged)
    assert list(held(plan)) == encoded


def test_what_has_no_integers_is_in_floats_and_what_is_cheap_around_it():
    def fn(params, x):
        return (jnp.sort(nn.relu(x @ params["a"]), -1) * 3.0 + x) @ params["b"]

    plan = planned(fn, CHAIN)
    kinds = {op.output: type(op) for op in plan.program.operations}
    assert p.Call in kinds.values()
    inside = {kinds[name] for name in held(plan)}
    assert inside == {p.Convert}


def test_a_kernel_that_is_no_site_has_eight_bits():
    plan = planned(lambda params, x: x @ EYE[::-1] @ params["w"], {"w": EYE}, weight_bits=4)
    assert [own.bits for own in plan.kernels.values()] == [8, 8]
    assert len(plan.ranged) == 2


def test_a_kernel_that_took_in_a_scale_takes_no_range_of_its_site():
    def conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)

    def fn(params, x):
        y = nn.relu(conv(x, params["a"]))
        return conv(100.0 * y, params["b"]) + conv(y, params["c"])

    params, x = dict.fromkeys("abc", jnp.ones((1, 1, 1, 1))), jnp.full((1, 1, 1, 1), 2.0)
    for rules in (None, [("b", {"activation": 4})]):
        plan = planned(fn, params, x, rules)
        found = q.edge_ranges(plan, q.calibrate(fn, params, [(x,)], plan.spec), x)
        # The site sees 200, the edge holds 2.
        highs = [float(own["activation"].high) for own in found.values() if "activation" in own]
        np.testing.assert_allclose(highs, 2.0, rtol=0.2)


def looped(params, x):
    return lax.scan(lambda x, w: (nn.relu(x @ w), None), x, params["w"])[0]


def test_turns_of_a_loop_are_quantized_as_the_loop_and_stored_each():
    params, x = {"w": jnp.array([2.0, 3.0]).reshape(2, 1, 1)}, jnp.ones((1, 1))
    plan = planned(looped, params, x, rules=[("w", {"weight": 4})])
    assert [own.bits for own in plan.kernels.values()] == [4, 4]
    found = q.edge_ranges(plan, q.calibrate(looped, params, [(x,)], plan.spec), x)
    # The loop has one range, of inputs 1 and 2 and of weights 2 and 3.
    assert [float(own["weight"].high[0, 0]) for own in found.values() if "weight" in own] == [3, 3]
    apart = q.calibrate_edges(plan, [(x,)])
    assert [float(own["weight"].high[0, 0]) for own in apart.values() if "weight" in own] == [2, 3]
    y = q.as_deployed(plan)(plan.program.params, apart, x)
    np.testing.assert_allclose(y, [[6]], rtol=0.1)


def test_the_bits_of_one_turn_are_no_choice():
    params = {"w": jnp.ones((2, 2, 2)), "v": EYE}
    plan = planned(lambda params, x: looped(params, x) @ params["v"], params)
    assert list(plan.ranged) == ["w", "w#2", "v"]
    assert stored.chosen_operations(plan, {"weight": (4, 8)}) == ["v"]


def test_a_kernel_in_a_loop_and_elsewhere_is_named():
    def fn(params, x):
        return lax.scan(lambda x, _: (x @ params["w"], None), x, None, length=2)[0] @ params["w"]

    with pytest.raises(ValueError, match="kernel 'w' must be used in one loop or outside of loops"):
        planned(fn, {"w": EYE})


SIGNS = q.Quantizer(1, "binary", per_channel=True, learning="fixed")
REFUSED = {
    "weight of 'w' must be symmetric or binary to be integers, got affine": {
        "weight": q.Quantizer(8, "affine")
    },
    "weight of 'w' must be symmetric or binary to be integers, got e4m3": {
        "weight": q.Quantizer(8, "e4m3")
    },
    "activation of 'w' must be affine or symmetric to be integers, got e5m2": {
        "activation": q.Quantizer(8, "e5m2")
    },
    "weight of 'w' must have one scale for each output channel, got groups of 2": {
        "weight": q.Quantizer(4, per_channel=True, group=2)
    },
    "weight of 'w' must have a range that is known, got 'dynamic'": {
        "weight": q.Quantizer(8, learning="dynamic")
    },
    "activation of 'w' must have a range that is known, got 'dynamic'": {
        "activation": q.Quantizer(8, "affine", learning="dynamic")
    },
    "weight of 'w' must have no zero to be binary, got some": {"weight": SIGNS},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_integers_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        planned(residual, PAIR, rules=[("w", REFUSED[message])])


def test_signs_of_a_transposed_convolution_are_refused():
    def fn(params, x):
        return lax.conv_transpose(x, params["k"], (2, 2), "SAME")

    params, x = {"k": jnp.ones((3, 3, 1, 1))}, jnp.ones((1, 4, 4, 1))
    with pytest.raises(ValueError, match="weight of 'k' must have no zero to be binary"):
        planned(fn, params, x, [("k", {"weight": SIGNS})])
    assert planned(fn, params, x).ranged == ["k"]


def test_a_specification_of_another_network_is_refused():
    other = q.spec(core.trace(chain, CHAIN, X))
    with pytest.raises(ValueError, match="spec must cover every site, got none for 'w' among: a, "):
        q.plan(p.lower(residual, PAIR, X), other)


def test_other_weights_are_in_the_same_plan():
    plan = planned(residual, PAIR)
    doubled = plan.replace(jax.tree.map(lambda leaf: 2 * leaf, plan.program.params))
    assert doubled.slots is plan.slots
    np.testing.assert_array_equal(doubled.program.params["w"]["kernel"], 2 * EYE)

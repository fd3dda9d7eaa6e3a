"""What a plan computes: by hand, as its integers do, in training, and with what is given wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import check_agreement
from jax import lax, nn

from hybrid_jax import core, pruning
from hybrid_jax import program as p
from hybrid_jax import quantization as q

STEPS_OF_1 = q.Range(jnp.float32(0), jnp.float32(255))
STEPS_OF_TENTH = q.Range(jnp.float32(0), jnp.float32(25.5))


def planned(fn, params, x, rules=None, **bits):
    return q.plan(p.lower(fn, params, x), q.spec(core.trace(fn, params, x), rules, **bits))


def activations(**spans):
    return {name.replace("_", "/"): {"activation": span} for name, span in spans.items()}


def with_kernels(plan, ranges, x):
    """Those ranges, with those of kernels calibrated."""
    kernels = {
        name: {"weight": own["weight"]}
        for name, own in q.calibrate_edges(plan, [(x,)]).items()
        if "weight" in own
    }
    return {name: kernels.get(name, {}) | ranges.get(name, {}) for name in {**kernels, **ranges}}


def both(plan, ranges, x, *checked):
    """What is trained and what is deployed."""
    y = q.as_deployed(plan)(plan.program.params, ranges, x)
    return y, p.run(q.encode(plan, ranges, *(checked or (x,))))(x)


HALVES = jnp.array([[0.7, 0.0], [0.0, 0.7]])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_residual_sum_by_hand(bits):
    def fn(params, x):
        return (x @ params["w"] + x) @ params["v"]

    params, x = {"w": HALVES, "v": jnp.eye(2)}, jnp.array([[1.2, 20.0]])
    plan = planned(fn, params, x, [("w", {"activation": bits}), ("v", {})])
    whole = activations(x=STEPS_OF_1, w=STEPS_OF_1, add=STEPS_OF_1)
    if bits == 4:
        whole["x/4 bits"] = {"activation": STEPS_OF_1}
    # x → [1, 20]. At 8 bits [0.7, 14] → [1, 14]. At 4 bits, in steps of 17, it takes [0, 17], of
    # which 11.9 → 12. The sum is one of whole numbers, and v is 127 steps of 1/127.
    expected = {8: [[2, 34]], 4: [[1, 32]]}[bits]
    for y in both(plan, with_kernels(plan, whole, x), x):
        np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_a_concatenation_and_a_mean_by_hand():
    def fn(params, x):
        y = jnp.concatenate([x @ params["a"], 3.0 * (x @ params["a"])], -1)
        return y.mean(1) @ params["c"]

    params, x = {"a": jnp.eye(1), "c": jnp.eye(2)}, jnp.array([[[1.2], [2.0], [4.4], [4.0]]])
    plan = planned(fn, params, x)
    assert len(plan.stored) == 3
    _, inside, mean = plan.stored
    ranges = activations(x=STEPS_OF_1) | {
        inside: {"activation": q.Range(jnp.float32(0), jnp.float32(510))},
        mean: {"activation": STEPS_OF_1},
    }
    # x → [1, 2, 4, 4]; in steps of 2, ties to even, [0, 2, 4, 4] and [4, 6, 12, 12]: means of 2.5
    # and 8.5 become 2 and 8.
    for y in both(plan, with_kernels(plan, ranges, x), x):
        np.testing.assert_allclose(y, [[2, 8]], rtol=1e-5)


def affine(params, x):
    return x @ params["w"] * params["scale"] + params["bias"]


# Of 8 bits: steps of 1 (inputs) times 1/2 (kernel) times the scales 4, −1, 0.
AFFINE = {
    "w": 2 * jnp.eye(3) - 1,
    "scale": jnp.array([[4.0, -1.0, 0.0]]),
    "bias": jnp.array([[3.1, 0.7, 0.3]]),
}
NOTHING, ONES = jnp.zeros((1, 3)), jnp.ones((1, 3))
SITES = {"w": {"activation": STEPS_OF_1, "weight": q.Range(*jnp.float32([-63.5, 63.5]))}}
FLOATS = [3.1, 0.7, 0.3]


def of_bits(weight, activation=8):
    quantizer = weight if isinstance(weight, q.Quantizer) else q.Quantizer(weight)
    return planned(
        affine, AFFINE, NOTHING, [("w", {"weight": quantizer, "activation": activation})]
    )


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ((8, 8), [4, 0.5, 0.3]),
        # At 3 bits the kernel's step is 63.5 / 3, in 16ths of which its bias is rounded: 1.3229167.
        ((3, 8), [4 * 1.3229167, 1.3229167, 0.3]),
        ((8, 4), [0, 0, 0.3]),  # steps of 17 · 2 and 17 / 2
        ((32, 8), FLOATS),
        ((8, 32), FLOATS),
    ],
)
def test_biases_are_rounded_to_steps_of_the_sums(bits, expected):
    plan = of_bits(*bits)
    for y in both(plan, q.edge_ranges(plan, SITES, NOTHING), NOTHING):
        np.testing.assert_allclose(y[0], expected, rtol=1e-6)
    if 32 in bits:
        return
    whole = of_bits(8)
    ranges, widths = q.edge_ranges(whole, SITES, NOTHING), map(jnp.int32, bits)
    traced = {"w": {"weight": next(widths)}, "x": {"activation": next(widths)}}
    q_fn = jax.jit(q.as_deployed(whole))
    y = q_fn(whole.program.params, ranges, NOTHING, bits=traced)
    np.testing.assert_allclose(y[0], expected, rtol=1e-6)


def test_biases_of_channels_and_of_signs():
    ends = jnp.array([[63.5, 127.0, 127.0]])  # steps of 1/2 and 1
    signs = q.Quantizer(1, "binary", per_channel=True, learning="fixed")
    # −32 and 32 are stored as they are.
    for quantizer, end in ((q.Quantizer(8, per_channel=True), ends), (signs, 0 * ends + 32)):
        plan = of_bits(quantizer)
        ranges = {"w": {"activation": STEPS_OF_1, "weight": q.Range(-end, end)}}
        for y in both(plan, q.edge_ranges(plan, ranges, NOTHING), NOTHING):
            np.testing.assert_allclose(y[0], [4, 1, 0.3], rtol=1e-6)


def test_binary_kernels_by_hand():
    def fn(params, x):
        return x @ params["w"] * params["scale"]

    params = {"w": jnp.array([[0.5, -1.0], [-1.5, 3.0]]), "scale": jnp.array([[-2.0, 1.0]])}
    x = jnp.array([[1.0, 2.0], [255.0, 0.0]])
    signs = q.Quantizer(1, "binary", per_channel=True, learning="fixed")
    plan = planned(fn, params, x, [("w", {"weight": signs})])
    # The means of sizes are 1 and 2: ±1 · −2 and ±2 · 1 of 1 − 2 and 255.
    for ranges in (
        q.calibrate_edges(plan, [(x,)]),
        q.edge_ranges(plan, q.calibrate(fn, params, [(x,)], plan.spec), x),
    ):
        for y in both(plan, ranges, x):
            np.testing.assert_allclose(y, [[2, 2], [-510, -510]], rtol=1e-6)


def test_images_of_bytes_are_taken_as_they_are():
    def fn(params, x):
        y = (x.astype(jnp.float32) - 51.0) / params["std"]
        return nn.relu(conv(y, params["k"])).mean((1, 2)) @ params["v"]

    params = {"k": jnp.ones((1, 1, 2, 1)), "v": jnp.eye(1), "std": jnp.full((1, 1, 1, 2), 2.0)}
    x = jnp.array([[[[51, 53], [53, 255]]]], jnp.uint8)
    plan = planned(fn, params, x)
    assert next(slot.fixed for slot in plan.slots.values() if slot) == p.Encoding(1.0)
    for y in both(plan, q.calibrate_edges(plan, [(x,)]), x):
        np.testing.assert_allclose(y, [[(1 + 1 + 102) / 2]], rtol=0.005)
    with pytest.raises(ValueError, match="x must be of dtype uint8, got float32"):
        both(plan, q.calibrate_edges(plan, [(x,)]), x.astype(jnp.float32), x)


def conv(x, kernel, padding="SAME", groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def scaled(params, x):
    """What is scaled and shifted for each channel before a kernel."""
    y = (x - jnp.array([[[[1.0, -2.0]]]])) / jnp.array([[[[2.0, 0.5]]]])
    return conv(y, params["a"]) + conv(x, params["b"])


@pytest.mark.parametrize(
    "quantizer",
    [
        q.Quantizer(8),
        q.Quantizer(4, per_channel=True),
        q.Quantizer(4, per_channel=True, power_of_two=True),
        q.Quantizer(1, "binary", per_channel=True, learning="fixed"),
    ],
)
@pytest.mark.parametrize("activation", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_scaled_input_that_two_kernels_share(quantizer, activation):
    random = np.random.default_rng(0)
    params = {n: jnp.asarray(random.normal(size=(3, 3, 2, 3)), jnp.float32) for n in "ab"}
    x = jnp.asarray(10 * random.normal(size=(4, 5, 5, 2)), jnp.float32)
    rules = [("a", {"weight": quantizer, "activation": activation}), ("b", {})]
    plan = planned(scaled, params, x, rules)
    calibrated = q.calibrate_edges(plan, [(x,)])
    from_sites = q.edge_ranges(plan, q.calibrate(scaled, params, [(x,)], plan.spec), x)
    for ranges in (calibrated, from_sites):
        check_agreement(plan, ranges, q.encode(plan, ranges, x), x)
    # What the kernel has taken in is in its range, however it comes.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), calibrated["a"], from_sites["a"]
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_transposed_convolutions_with_what_follows_them(bits):
    def fn(params, x):
        y = lax.conv_transpose(x, params["k"], (2, 2), "SAME") * params["scale"] + 1.0
        return nn.relu(y).mean((1, 2)) @ params["v"]

    random = np.random.default_rng(0)
    params = {"k": jnp.asarray(random.normal(size=(3, 3, 2, 2)), jnp.float32), "v": jnp.eye(2)}
    params["scale"] = jnp.array([[[[2.0, -30.0]]]])
    x = jnp.asarray(random.normal(size=(4, 4, 4, 2)), jnp.float32)
    plan = planned(fn, params, x, weight_bits=bits, first_last_bits=bits)
    ranges = q.edge_ranges(plan, q.calibrate(fn, params, [(x,)], plan.spec), x)
    check_agreement(plan, ranges, q.encode(plan, ranges, x), x)
    # Each of four phases has the range of its channel, by which what follows has multiplied.
    high = ranges["k"]["weight"].high.reshape(4, 2)
    np.testing.assert_array_equal(high, high[:1].repeat(4, 0))
    low, high = jnp.abs(params["k"].min((0, 1, 2))), jnp.abs(params["k"].max((0, 1, 2)))
    expected = jnp.maximum(low, high) * jnp.array([2, 30.0])
    found = jnp.maximum(-ranges["k"]["weight"].low, ranges["k"]["weight"].high)[0, 0, 0, :2]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_dead_channel_of_a_dead_input_keeps_its_bias():
    def fn(params, x):
        return nn.relu(nn.relu(x @ params["a"]) @ params["b"] + params["beta"]) @ params["c"]

    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((2, 2)), "c": jnp.eye(2)}
    params["beta"] = jnp.array([[300.0, 20.0]])
    x = -jnp.ones((4, 2))
    for bits in (8, 2):
        plan = planned(fn, params, x, weight_bits=bits, first_last_bits=bits)
        for y in both(plan, q.calibrate_edges(plan, [(x,)]), x):
            np.testing.assert_allclose(y, [[300.0, 20.0]] * 4, rtol=0.02)


def test_several_inputs_outputs_and_what_is_no_operation():
    def fn(params, a, b):
        y = nn.relu(a @ params["w"] + b @ params["v"])
        return {"y": y, "sorted": jnp.sort(y, -1) @ params["w"], "whole": (4 * a).astype(jnp.int32)}

    random = np.random.default_rng(0)
    params = {n: jnp.asarray(random.normal(size=(3, 3)), jnp.float32) for n in "wv"}
    xs = [jnp.asarray(random.normal(size=(8, 3)), jnp.float32) for _ in range(2)]
    plan = q.plan(p.lower(fn, params, *xs), q.spec(core.trace(fn, params, *xs), weight_bits=4))
    ranges = q.calibrate_edges(plan, [tuple(xs)])
    integers = q.encode(plan, ranges, *xs)
    check_agreement(plan, ranges, integers, *xs)
    outs = q.as_deployed(plan)(plan.program.params, ranges, *xs)
    for y, z, wanted in zip(outs, p.run(integers)(*xs), jax.tree.leaves(fn(params, *xs))):
        assert y.dtype == z.dtype == wanted.dtype
        np.testing.assert_allclose(y, z, atol=1e-4)
        np.testing.assert_allclose(y, wanted, atol=0.3 * float(jnp.abs(wanted).max()))
    with pytest.raises(ValueError, match="inputs must be 2 arrays, got 1"):
        q.as_deployed(plan)(plan.program.params, ranges, xs[0])


# Training.


@pytest.fixture(scope="module")
def trained(digits):
    """The digits' network planned in 4 bits, with ranges that cut off a half."""
    plan = planned(digits.fn, digits.params, digits.images[:2], weight_bits=4, activation_bits=4)
    ranges = q.calibrate_edges(plan, [(digits.images[:128],)])
    return plan, jax.tree.map(lambda end: end / 2, ranges)


def test_gradients_are_finite_and_reach_every_weight_and_range(trained, digits):
    plan, ranges = trained
    q_fn, images = q.as_deployed(plan), digits.images[:64]

    @jax.jit
    @jax.grad
    def slopes(both):
        return jnp.square(q_fn(*both, images)).mean()

    params, spans = slopes((plan.program.params, ranges))
    core.check_finite("gradients", (params, spans))
    for own in params.values():
        assert all(np.any(leaf != 0) for leaf in own.values())
    for name, own in spans.items():
        assert all(np.any(span.high != 0) for span in own.values()), name
    assert set(spans) == {*plan.stored, *plan.ranged}


def test_the_gradient_of_a_rounded_bias_is_that_of_the_bias():
    plan, x = of_bits(8), jnp.array([[1.0, 2.0, 3.0]])
    ranges = q.edge_ranges(plan, SITES, x)
    q_fn = q.as_deployed(plan)
    found = jax.grad(lambda params: (q_fn(params, ranges, x) * AFFINE["bias"]).sum())(
        plan.program.params
    )
    np.testing.assert_array_equal(found["w"]["bias"], AFFINE["bias"][0])


@pytest.mark.parametrize("bits", [8, 2])
def test_what_is_pruned_stays_zero_and_what_is_trained_is_deployed(digits, bits):
    images, labels = digits.images[:64], digits.labels[:64]
    plan = planned(digits.fn, digits.params, images[:2], weight_bits=bits, activation_bits=4)
    keep = {
        name: {
            role: jax.random.bernoulli(jax.random.key(i), 0.5, np.shape(leaf))
            if role == "kernel"
            else optax.MaskedNode()
            for role, leaf in own.items()
        }
        for i, (name, own) in enumerate(plan.program.params.items())
    }
    params = pruning.apply_masks(jax.tree.map(jnp.asarray, plan.program.params), keep)
    plan = plan.replace(params)
    q_fn = q.as_deployed(plan)
    ranges = q.calibrate_edges(plan, [(images,)])
    free = jax.tree.map(lambda _: optax.MaskedNode(), ranges)
    tx = pruning.hold_masks(optax.adam(0.003), (keep, free))

    def loss(both):
        losses = optax.softmax_cross_entropy_with_integer_labels(q_fn(*both, images), labels)
        return losses.mean()

    @jax.jit
    def step(both, state):
        value, slopes = jax.value_and_grad(loss)(both)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(slopes, state, both)
        return optax.apply_updates(both, updates), state, value

    end = (params, ranges)
    state, values = tx.init(end), []
    for _ in range(12):
        end, state, value = step(end, state)
        values.append(float(value))
    assert values[-1] < values[0]
    params, ranges = end
    integers = q.encode(plan.replace(params), ranges, images)
    for op in integers.weighted:
        removed = ~np.asarray(keep[op.output]["kernel"])
        assert not np.any(np.asarray(params[op.output]["kernel"])[removed])
        assert not np.any(op.weights.values[removed])
    check_agreement(plan.replace(params), ranges, integers, images, share=2e-3)
    y, z = q_fn(params, ranges, images), p.run(integers)(images)
    assert np.mean(y.argmax(-1) == z.argmax(-1)) >= 0.95


def test_experts_of_one_structure_are_one_call(trained, digits):
    plan, ranges = trained
    images = digits.images[:8]
    experts = [
        jax.tree.map(lambda leaf, s=s: s * jnp.asarray(leaf), (plan.program.params, ranges))
        for s in (0.5, 1.0)
    ]
    bits = [{name: {"weight": jnp.int32(b)} for name in plan.ranged} for b in (2, 4)]
    q_fn = q.as_deployed(plan)
    one = jax.jit(lambda both, bits: q_fn(*both, images, bits=bits))
    stacks = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (experts, bits)]
    together = jax.jit(jax.vmap(one))(*stacks)
    for i, (expert, widths) in enumerate(zip(experts, bits, strict=True)):
        alone = one(expert, widths)
        # A value next to half a step may fall on either side.
        close = np.isclose(together[i], alone, rtol=1e-3, atol=1e-3).mean()
        assert close > 0.9
    assert one._cache_size() == 1


def test_bits_as_data_equal_bits_of_the_plan(trained, digits):
    plan, ranges = trained
    images = digits.images[:32]
    q_fn = jax.jit(q.as_deployed(plan))
    widths = [
        {name: {"weight": jnp.int32(plan.kernels[name].bits)} for name in plan.ranged},
        {name: {"activation": jnp.int32(own.quantizer.bits)} for name, own in plan.stored.items()},
    ]
    traced = {name: widths[0].get(name, {}) | widths[1].get(name, {}) for name in ranges}
    stated = q_fn(plan.program.params, ranges, images)
    np.testing.assert_allclose(
        q_fn(plan.program.params, ranges, images, bits=traced), stated, rtol=1e-4, atol=1e-4
    )
    name = plan.ranged[1]
    fewer = traced | {name: traced[name] | {"weight": jnp.int32(2)}}
    rules = [(name, {"weight": 2, "activation": 4})]
    spec = q.spec(
        core.trace(digits.fn, digits.params, images), rules, weight_bits=4, activation_bits=4
    )
    other = q.as_deployed(q.plan(p.lower(digits.fn, digits.params, images), spec))
    np.testing.assert_allclose(
        q_fn(plan.program.params, ranges, images, bits=fewer),
        jax.jit(other)(plan.program.params, ranges, images),
        rtol=1e-4,
        atol=1e-4,
    )


# Ranges.


def test_ranges_of_sites_and_those_of_edges_are_the_same_where_they_must_be(digits):
    images = digits.images[:64]
    plan = planned(digits.fn, digits.params, images[:2])
    sites = q.calibrate(digits.fn, digits.params, [(images,)], plan.spec)
    found, calibrated = q.edge_ranges(plan, sites, images), q.calibrate_edges(plan, [(images,)])
    assert {n: set(own) for n, own in found.items()} == {n: set(o) for n, o in calibrated.items()}
    for name, slot in plan.stored.items():
        own, other = (
            np.array([each[name]["activation"].low, each[name]["activation"].high])
            for each in (found, calibrated)
        )
        if slot.site is not None:
            np.testing.assert_array_equal(own, sites[slot.site]["activation"])
        # Others are seen as they are stored, in the one, and in floats, in the other.
        tolerance = 1e-5 if slot.site else 0.1
        np.testing.assert_allclose(own, other, atol=tolerance * np.abs(other).max())
    for name in plan.ranged:
        reach = [
            np.maximum(-each[name]["weight"].low, each[name]["weight"].high)
            for each in (found, calibrated)
        ]
        np.testing.assert_allclose(*reach, rtol=1e-4)


def bad(**changes):
    """What a call of `as_deployed` is given, with changes."""
    x, plan = jnp.array([[1.0, 2.0]]), planned(wide, WIDE, jnp.ones((1, 2)))
    ranges = changes.pop("ranges", lambda ranges: ranges)(q.calibrate_edges(plan, [(x,)]))
    given = {"params": plan.program.params, "ranges": ranges, "x": x} | changes
    return plan, given.pop("params"), given.pop("ranges"), given.pop("x"), given


def wide(params, x):
    return nn.relu(x @ params["a"]) @ params["b"]


WIDE = {"a": jnp.eye(2), "b": jnp.eye(2)}
BAD = {
    r"ranges must have \['x'\]\['activation'\], got nothing": {"ranges": lambda ranges: {}},
    r"ranges must have \['a'\]\['activation'\], got ": {
        "ranges": lambda r: r | {"a": {"weight": r["a"]["weight"]}}
    },
    r"ranges must have \['b'\]\['weight'\], got ": {
        "ranges": lambda r: {n: own for n, own in r.items() if n != "b"}
    },
    r"ranges\['b'\]\['weight'\] must have ends of shape \(\), or of one that divides \(2, 2\)": {
        "ranges": lambda r: r | {"b": {"weight": q.Range(-jnp.ones(7), jnp.ones(7))}}
    },
    r"ranges\['x'\]\['activation'\] must have ends of shape \(\)": {
        "ranges": lambda r: r | {"x": {"activation": q.Range(jnp.zeros(2), jnp.ones(2))}}
    },
    r"x must have shape \(B, 2\), got \(1, 3\)": {"x": jnp.ones((1, 3))},
    "x must be of dtype float32, got uint8": {"x": jnp.ones((1, 2), jnp.uint8)},
    "name of bits must be one of x, a, b, got 'c'": {"bits": {"c": {"weight": jnp.int32(4)}}},
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_given_wrong_is_named(message):
    plan, params, ranges, x, options = bad(**BAD[message])
    with pytest.raises(ValueError, match=message):
        q.as_deployed(plan)(params, ranges, x, **options)
    if not options:
        with pytest.raises(ValueError, match=message.split(" must")[0]):
            q.encode(plan, ranges, x)


def test_what_needs_real_values_is_refused_under_jit():
    plan, _, ranges, x, _ = bad()
    with pytest.raises(ValueError, match="ranges must be arrays, got tracers: encode runs outside"):
        jax.jit(lambda ranges: q.encode(plan, ranges, x).inputs)(ranges)
    with pytest.raises(ValueError, match="inputs must be arrays, got tracers: edge_ranges runs"):
        jax.jit(lambda x: q.edge_ranges(plan, ranges, x))(x)
    for call in (q.encode, q.edge_ranges):
        with pytest.raises(ValueError, match="inputs must be finite, got 1 NaN"):
            call(plan, ranges, x.at[0, 0].set(jnp.nan))

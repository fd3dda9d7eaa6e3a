import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernels import stored_kernels

from hybrid_jax import core, cost
from hybrid_jax import quantization as q

STEM, DEPTHWISE, HEAD = (f"params/{name}/kernel" for name in ("stem", "depthwise", "head"))


@pytest.fixture(scope="module")
def spec(model):
    graph = core.trace(model.fn, model.params, model.x)
    return q.spec(graph, weight_bits=4, activation_bits=4)


@pytest.fixture(scope="module")
def ranges(model, spec):
    return q.calibrate(model.fn, model.params, [(model.x,)], spec, "mse")


def all_bits(spec, bits):
    return jax.tree.map(lambda _: jnp.int32(bits), spec.bits())


def test_off_is_bit_equal(model, spec, ranges):
    expected = jax.jit(model.fn)(model.params, model.x)
    off = q.spec(core.trace(model.fn, model.params, model.x), weight_bits=32, activation_bits=32)
    static = jax.jit(q.fake_quantized(model.fn, off))(model.params, {}, model.x)
    np.testing.assert_array_equal(static, expected)
    traced = jax.jit(q.fake_quantized(model.fn, spec))
    data = traced(model.params, ranges, model.x, bits=all_bits(spec, 32))
    np.testing.assert_array_equal(data, expected)


def test_equals_quantizing_by_hand():
    # Weights at 4 bits: scale 7/7 = 1 and 3.5/7 = 0.5. Activation at 2 bits over [0, 3]: scale 1.
    def fn(params, x):
        return x @ params["w"] + params["b"]

    params = {"w": jnp.array([[7.0, 0.7], [-2.4, 3.5]]), "b": jnp.array([[0.3, 0.3]])}
    x = jnp.array([[1.2, 9.0]])
    spec = q.spec(core.trace(fn, params, x), [("w", {"weight": 4, "activation": 2})])
    ranges = {
        "w": {
            "weight": q.Range(jnp.array([[-7.0, -3.5]]), jnp.array([[7.0, 3.5]])),
            "activation": q.Range(jnp.float32(0.0), jnp.float32(3.0)),
        }
    }
    # x → [1, 3]; w → [[7, 0.5], [−2, 3.5]]; [1·7 − 3·2, 1·0.5 + 3·3.5] + 0.3 = [1.3, 11.3].
    y = q.fake_quantized(fn, spec)(params, ranges, x)
    np.testing.assert_allclose(y, [[1.3, 11.3]], rtol=1e-6)
    values, _ = stored_kernels(fn, spec, params, ranges, x)["w"]
    assert values.tolist() == [[7, 1], [-2, 7]]


def test_bits_as_data_equal_bits_in_the_spec(model, ranges):
    graph = core.trace(model.fn, model.params, model.x)
    base = q.spec(graph)
    traced = jax.jit(q.fake_quantized(model.fn, base))
    for bits in (2, 4, 8):
        rules = [(".*", {"weight": bits, "activation": bits})]
        static = jax.jit(q.fake_quantized(model.fn, q.spec(graph, rules)))
        np.testing.assert_allclose(
            traced(model.params, ranges, model.x, bits=all_bits(base, bits)),
            static(model.params, ranges, model.x),
            rtol=1e-5,
            atol=1e-6,
        )
    assert traced._cache_size() == 1


def test_experts_equal_separate_calls(model, spec):
    """Own bits, ranges and masks; the spec is the same."""
    keys = jax.random.split(jax.random.key(3), 3)
    experts = []
    for key in keys:
        kernel = model.params["params"]["stem"]["kernel"]
        mask = jax.random.bernoulli(key, 0.5, kernel.shape)
        params = jax.tree.map(jnp.copy, model.params)
        params["params"]["stem"]["kernel"] = kernel * mask.astype(kernel.dtype)
        experts.append(params)
    bits = [all_bits(spec, b) for b in (2, 4, 8)]
    ranges = [q.calibrate(model.fn, p, [(model.x,)], spec) for p in experts]
    q_fn = q.fake_quantized(model.fn, spec)

    def loss(params, ranges, bits):
        return (q_fn(params, ranges, model.x, bits=bits) ** 2).sum()

    both = jax.value_and_grad(loss, argnums=(0, 1))
    stacks = [jax.tree.map(lambda *a: jnp.stack(a), *trees) for trees in (experts, ranges, bits)]
    together = jax.jit(jax.vmap(both))(*stacks)
    alone = jax.jit(both)
    for i in range(3):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4),
            together,
            alone(experts[i], ranges[i], bits[i]),
        )
    assert alone._cache_size() == 1


def test_pruned_weights_stay_zero(model, spec, ranges):
    kernel = model.params["params"]["stem"]["kernel"]
    mask = jax.random.bernoulli(jax.random.key(0), 0.3, kernel.shape)
    params = jax.tree.map(jnp.copy, model.params)
    params["params"]["stem"]["kernel"] = jnp.where(mask, kernel, 0.0)
    integers = stored_kernels(model.fn, spec, params, ranges, model.x)
    assert not np.any(np.asarray(integers[STEM][0])[~np.asarray(mask)])


def test_stored_kernels_are_what_the_model_computes_with(model, spec, ranges):
    integers = stored_kernels(model.fn, spec, model.params, ranges, model.x)
    assert list(integers) == [STEM, DEPTHWISE, HEAD]
    assert int(jnp.abs(integers[DEPTHWISE][0]).max()) <= 7
    params = jax.tree.map(jnp.copy, model.params)
    for name in ("stem", "depthwise", "head"):
        params["params"][name]["kernel"] = q.dequantize(*integers[f"params/{name}/kernel"])
    q_fn = jax.jit(q.fake_quantized(model.fn, spec))
    bits = {
        name: {"weight": jnp.int32(32), "activation": b["activation"]}
        for name, b in spec.bits().items()
    }
    np.testing.assert_allclose(
        q_fn(params, ranges, model.x, bits=bits),
        q_fn(model.params, ranges, model.x, bits=spec.bits()),
        rtol=1e-5,
        atol=1e-6,
    )


KINDS = {
    "group": (q.Quantizer(4, per_channel=True, group=2), q.Quantizer(4, "affine")),
    "affine group": (q.Quantizer(3, "affine", True, group=2), q.Quantizer(3, "affine")),
    "ternary": (
        q.Quantizer(2, per_channel=True, learning="dynamic", method="ternary"),
        q.Quantizer(8, "affine", learning="pact"),
    ),
    "binary": (
        q.Quantizer(1, "binary", per_channel=True, learning="dynamic"),
        q.Quantizer(2, "affine", learning="dynamic"),
    ),
    "floats": (q.Quantizer(8, "e4m3", per_channel=True), q.Quantizer(8, "e5m2")),
    "shifts": (
        q.Quantizer(4, per_channel=True, power_of_two=True),
        q.Quantizer(4, "affine", learning="fixed", power_of_two=True),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_quantizer(model, kind):
    """Trains, computes with what its integers stand for, keeps zeros, and draws with a key."""
    weight, activation = KINDS[kind]
    one_weight = dataclasses.replace(weight, group=None)
    graph = core.trace(model.fn, model.params, model.x)
    # A depthwise kernel has 9 weights for each output channel: no two of them make a group.
    spec = q.spec(
        graph,
        [
            (DEPTHWISE, {"weight": one_weight, "activation": activation}),
            (".*", {"weight": weight, "activation": activation}),
        ],
    )
    params = jax.tree.map(jnp.copy, model.params)
    kernel = params["params"]["stem"]["kernel"]
    kept = jax.random.bernoulli(jax.random.key(2), 0.5, kernel.shape) | (weight.bits == 1)
    params["params"]["stem"]["kernel"] = jnp.where(kept, kernel, 0.0)
    ranges = q.calibrate(model.fn, params, [(model.x,)], spec)
    q_fn = q.fake_quantized(model.fn, spec)

    @jax.jit
    def loss(params, ranges, bits, key):
        return jnp.mean(q_fn(params, ranges, model.x, bits=bits, key=key) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    near = loss(params, ranges, spec.bits(), None)
    slopes = gradient(params, ranges, spec.bits(), None)
    core.check_finite("gradients", slopes)
    assert np.any(slopes[0]["params"]["stem"]["kernel"] != 0)
    if weight.learning == "lsq":
        assert np.any(slopes[1][STEM]["weight"].high != 0)
        assert slopes[1][STEM]["weight"].high.shape == q.range_shape(graph.sites[0], weight)
    drawn = [float(loss(params, ranges, spec.bits(), jax.random.key(i))) for i in (0, 1, 1)]
    assert drawn[1] == drawn[2]
    assert len({float(near), *drawn}) == 3
    floats = jax.jit(lambda params: jnp.mean(model.fn(params, model.x) ** 2))(params)
    off = loss(params, ranges, all_bits(spec, 32), jax.random.key(0))
    np.testing.assert_array_equal(off, floats)

    integers = stored_kernels(model.fn, spec, params, ranges, model.x)
    for name in ("stem", "depthwise", "head"):
        params["params"][name]["kernel"] = q.dequantize(*integers[f"params/{name}/kernel"])
    assert not np.any(params["params"]["stem"]["kernel"][~kept])
    bits = {name: b | {"weight": jnp.int32(32)} for name, b in spec.bits().items()}
    np.testing.assert_allclose(loss(params, ranges, bits, None), near, rtol=1e-5)


def test_xnor_net_by_hand():
    # mean |w| of the columns: 2 and 0.5; signs (−, +) and (+, +).
    def fn(params, x):
        return x @ params["w"]

    params, x = {"w": jnp.array([[-3.0, 0.2], [1.0, 0.8]])}, jnp.array([[1.0, 10.0]])
    signs = q.Quantizer(1, "binary", per_channel=True, learning="dynamic")
    spec = q.spec(core.trace(fn, params, x), [("w", {"weight": signs, "activation": 32})])
    # 1·(−2) + 10·2 = 18 and 1·0.5 + 10·0.5 = 5.5; no range is needed.
    np.testing.assert_allclose(q.fake_quantized(fn, spec)(params, {}, x), [[18.0, 5.5]], rtol=1e-6)
    values, _ = stored_kernels(fn, spec, params, {}, x)["w"]
    assert values.tolist() == [[0, 1], [1, 1]]


def test_every_site_draws_its_own_numbers():
    # Half a step of the grid [0, 1, 2, 3]: each tensor becomes 0 or 1 at random.
    def fn(params, x):
        return x @ params["a"], x @ params["b"]

    params = {name: jnp.full((64, 1), 0.5) for name in "ab"}
    x = jnp.full((1, 64), 0.5)
    spec = q.spec(core.trace(fn, params, x), [(".*", {"weight": 4, "activation": 2})])
    span = q.Range(jnp.float32(0.0), jnp.float32(3.0))
    wide = q.Range(jnp.full((1, 1), -7.0), jnp.full((1, 1), 7.0))
    ranges = {name: {"weight": wide, "activation": span} for name in "ab"}
    q_fn = jax.jit(q.fake_quantized(fn, spec))
    a, b = q_fn(params, ranges, x, key=jax.random.key(0))
    assert a != b
    keys = jax.random.split(jax.random.key(1), 200)
    a, b = jax.vmap(lambda key: q_fn(params, ranges, x, key=key))(keys)
    # The mean of the product of two independent draws is 64 · ½ · ½; by itself, rounded, it is 0.
    assert abs(float(a.mean()) - 16) < 1
    np.testing.assert_array_equal(q_fn(params, ranges, x)[0], [[0.0]])


def test_training_mode_keeps_the_outputs(model, spec, ranges):
    q_train = jax.jit(q.fake_quantized(model.train, spec))
    logits, updated = q_train(model.params, ranges, model.x)
    assert logits.shape == (4, 3)
    old = model.params["batch_stats"]
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(old)
    means = [stats["BatchNorm_0"]["mean"] for stats in (updated["batch_stats"], old)]
    assert not np.array_equal(*means)


def test_more_bits_are_closer(model, spec):
    ranges = q.calibrate(model.fn, model.params, [(model.x,)], spec)
    q_fn = jax.jit(q.fake_quantized(model.fn, spec))
    expected = model.fn(model.params, model.x)
    errors = []
    for bits in (2, 4, 6, 8):
        y = q_fn(model.params, ranges, model.x, bits=all_bits(spec, bits))
        errors.append(float(jnp.abs(y - expected).mean()))
    assert errors == sorted(errors, reverse=True)


def test_training_lowers_the_loss(model, spec, ranges):
    """Quantization-aware training of weights and ranges at 2 bits, toward the float model."""
    q_fn = q.fake_quantized(model.fn, spec)
    target, bits = model.fn(model.params, model.x), all_bits(spec, 2)

    def loss(both):
        weights, ranges = both
        params = model.params | {"params": weights}
        return jnp.mean((q_fn(params, ranges, model.x, bits=bits) - target) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss))
    both, losses = (model.params["params"], ranges), []
    for _ in range(150):
        value, slope = gradient(both)
        losses.append(float(value))
        both = jax.tree.map(lambda p, g: p - 0.2 * g, both, slope)
    assert min(losses[-20:]) < 0.5 * losses[0]
    moved = both[1][HEAD]
    assert float(moved["activation"].high) != float(ranges[HEAD]["activation"].high)
    assert float(moved["activation"].low) == 0.0


def test_sites_in_nested_calls_are_quantized():
    def fn(params, x):
        x = jax.checkpoint(lambda x: jnp.tanh(x @ params["remat"]))(x)
        x = jax.jit(lambda x: x @ params["jit"])(x)
        x = lax.cond(x.sum() < 1e3, lambda x: x @ params["cond"], lambda x: x, x)
        return lax.scan(lambda x, w: (jax.nn.silu(x @ w), None), x, params["scan"])[0]

    key = jax.random.key(0)
    params = {
        "remat": jax.random.normal(key, (3, 3)),
        "jit": jax.random.normal(key, (3, 3)),
        "cond": jax.random.normal(key, (3, 3)),
        "scan": jax.random.normal(key, (2, 3, 3)),
    }
    x = jax.random.normal(key, (2, 3))
    spec = q.spec(core.trace(fn, params, x), weight_bits=2, activation_bits=2, first_last_bits=2)
    ranges = q.calibrate(fn, params, [(x,)], spec)
    assert set(ranges) == set(params)
    q_fn = q.fake_quantized(fn, spec)
    gradients = jax.jit(jax.grad(lambda ranges: q_fn(params, ranges, x).sum()))(ranges)
    for name in params:
        assert np.any(gradients[name]["weight"].high != 0)


def test_a_site_in_a_custom_derivative_is_quantized():
    """Its parameters get the gradient that the rule says, of what the rule kept."""

    @jax.custom_vjp
    def tripled(x, w):
        return x @ w

    tripled.defvjp(lambda x, w: (x @ w, (x, w)), lambda s, g: (3 * g @ s[1].T, 3 * s[0].T @ g))

    def fn(params, x):
        return tripled(x, params["w"])

    # Weight steps of 1, activation steps of 2: 1.2 · 5.2 becomes 1 · 6. The rule kept x = 5.2.
    params, x = {"w": jnp.array([[1.2]])}, jnp.array([[5.2]])
    spec = q.spec(core.trace(fn, params, x), [("w", {"weight": 4, "activation": 3})])
    ranges = {
        "w": {
            "weight": q.Range(jnp.full((1, 1), -7.0), jnp.full((1, 1), 7.0)),
            "activation": q.Range(jnp.float32(0.0), jnp.float32(14.0)),
        }
    }
    q_fn = q.fake_quantized(fn, spec)
    value, slope = jax.value_and_grad(lambda p: q_fn(p, ranges, x).sum())(params)
    assert float(value) == 6.0
    np.testing.assert_allclose(slope["w"], [[3 * 5.2]], rtol=1e-6)


def test_ranges_beside_a_custom_derivative_train_where_its_own_are_stopped():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda s, g: (g @ s[1].T, s[0].T @ g))

    def fn(params, x):
        return product(x @ params["v"], params["w"])

    params, x = {"v": jnp.array([[1.2]]), "w": jnp.array([[2.0]])}, jnp.ones((1, 1))
    rule = {"weight": q.Quantizer(4), "activation": 32}
    spec = q.spec(core.trace(fn, params, x), [(".*", rule)])
    # Steps of 1; 1.2 becomes 1. LSQ: the slope of v̂ in the step is 1 − 1.2, scaled by 1/√7, times
    # w = 2. The ends follow the step: they are 7 and −7 of it.
    ranges = {name: {"weight": q.Range(jnp.float32(-7.0), jnp.float32(7.0))} for name in params}
    q_fn = q.fake_quantized(fn, spec)

    @jax.jit
    @jax.grad
    def slope(ranges):
        return q_fn(params, ranges | {"w": jax.lax.stop_gradient(ranges["w"])}, x).sum()

    found = slope(ranges)
    assert np.all(np.array(found["w"]["weight"]) == 0)
    low, high = found["v"]["weight"]
    np.testing.assert_allclose([low, high], np.array([-7, 7]) * -0.2 * 2 / np.sqrt(7), rtol=1e-5)


def test_scales_are_those_of_the_range(model):
    # The depthwise kernel takes 3·3·1 weights to each channel; in groups of 3, three ranges each.
    graph = core.trace(model.fn, model.params, model.x)
    rules = [
        (STEM, {"weight": q.Quantizer(4)}),
        (DEPTHWISE, {"weight": q.Quantizer(4, per_channel=True, group=3)}),
    ]
    widths = {site.name: site.kernel_shape[-1] for site in graph.sites}
    spec = q.spec(graph, rules)
    assert q.scale_counts(graph, spec) == widths | {STEM: 1, DEPTHWISE: 3 * widths[DEPTHWISE]}
    assert q.scale_counts(graph, q.spec(graph)) == widths
    ranges = q.calibrate(model.fn, model.params, [(model.x,)], spec)
    for name, scales in q.scale_counts(graph, spec).items():
        assert ranges[name]["weight"].low.size == scales
    # 4 bytes of each scale are all that the quantizers change.
    bits = {"weight_bits": spec.weight_bits}
    saved = widths[STEM] - 1 - 2 * widths[DEPTHWISE]
    plain, found = (
        cost.count(graph, **bits, scales=scales).bytes
        for scales in (None, q.scale_counts(graph, spec))
    )
    assert plain - found == 4 * saved


def test_scales_of_a_kernel_used_more_than_once():
    def fn(params, x):
        x = lax.scan(lambda x, w: (x @ w, None), x, params["scan"])[0]
        x = x @ params["shared"] @ params["shared"]
        return x @ params["parts"][0] @ params["parts"][1]

    params = {
        "scan": jnp.ones((5, 3, 3)),
        "shared": jnp.ones((3, 3)),
        "parts": jnp.ones((2, 3, 3)),
    }
    graph = core.trace(fn, params, jnp.ones((1, 3)))
    found = q.scale_counts(graph, q.spec(graph))
    # A scan has one range for all of its iterations. Shared: once. Parts: three for each.
    by_path = {site.path: found[site.name] for site in graph.sites}
    assert by_path == {"scan": 3, "shared": 3, "parts": 6}
    # 45, 9 and 18 weights of one byte, and the scales.
    bits = dict.fromkeys(found, 8)
    assert cost.count(graph, None, bits, scales=found).bytes == 72 + (3 + 3 + 6) * 4
    whole = q.spec(graph, [(".*", {"weight": q.Quantizer(8)})])
    found = q.scale_counts(graph, whole)
    assert cost.count(graph, None, bits, scales=found).bytes == 72 + (1 + 1 + 2) * 4


def test_bad_arguments(model, spec, ranges):
    q_fn = q.fake_quantized(model.fn, spec)
    with pytest.raises(ValueError, match=r"ranges must have \['params/head/kernel'\]\['weight'\]"):
        q_fn(model.params, {k: v for k, v in ranges.items() if k != HEAD}, model.x)
    with pytest.raises(ValueError, match="bits of 'params/stem/kernel' must be 2 to 8"):
        q_fn(model.params, ranges, model.x, bits=all_bits(spec, 12))
    bits = jax.tree.map(lambda b: b.astype(jnp.float32), spec.bits())
    with pytest.raises(TypeError, match="must be integers, got an array of float32"):
        q_fn(model.params, ranges, model.x, bits=bits)
    other = q.Spec(spec.sites[:2])
    with pytest.raises(ValueError, match=f"spec must cover every site, got none for '{HEAD}'"):
        q.fake_quantized(model.fn, other)(model.params, ranges, model.x)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernels import stored_kernels

from hybrid_jax import core, pruning
from hybrid_jax import program as p
from hybrid_jax import quantization as q

TINY = 1e-6
SITE = core.trace(lambda params, x: x @ params["w"], {"w": jnp.ones((2, 1))}, jnp.ones((1, 2)))


def dense(params, x):
    return x @ params["w"]


def whole_steps(shape, reach=3.0):
    """A range of which the grid at 3 bits is the integers from −3 to 3."""
    return {"w": {"weight": q.Range(jnp.full(shape, -reach), jnp.full(shape, reach))}}


def only(bits=3, name="w", **kwargs):
    return q.Spec((q.SiteSpec(name, q.Quantizer(bits, **kwargs), q.Quantizer(q.OFF, "affine")),))


def gram_of(matrix):
    return {"w": core.Gram(jnp.float32(matrix)[None], SITE.sites)}


def quantize_at(digits, bits, params=None):
    """Spec and ranges of the network's kernels at `bits`, activations left alone."""
    graph = core.trace(digits.fn, digits.params, digits.images[:1])
    spec = q.spec(graph, rules=[(".*", {"weight": bits, "activation": q.OFF})])
    batch = (digits.images[:64],)
    params = digits.params if params is None else params
    return spec, q.calibrate(digits.fn, params, [batch], spec, "mse")


def rounded(digits, spec, ranges, params):
    integers = stored_kernels(digits.fn, spec, params, ranges, digits.images[:1])
    return core.map_with_path(
        lambda path, leaf: q.dequantize(*integers[path]) if path in integers else leaf, params
    )


def test_by_hand():
    # H = [[5, 2], [2, 1]], H⁻¹ = UᵀU with U = [[1, −2], [0, 1]], w = (0.4, 1.2) on the integers.
    #   natural: 0.4 → 0, e = 0.4; 1.2 + 2 · 0.4 = 2 → 2. The loss is 0.4²,
    #   and rounding's 5 · 0.4² + 4 · 0.4 · 0.2 + 0.2² = 1.16.
    params = {"w": jnp.array([[0.4], [1.2]])}
    args = gram_of([[5, 2], [2, 1]]), only(), whole_steps((1, 1))
    for order in ("natural", "activation"):
        swept = q.gptq(params, *args, damping=TINY, order=order)["w"]
        np.testing.assert_array_equal(swept, [[0.0], [2.0]])
    # With H = [[1, 2], [2, 5]] activations go the other way round: U = [[1, −2], [0, 1]] for
    # (w_1, w_0). 1.2 → 1, e = 0.2; 0.4 + 2 · 0.2 = 0.8 → 1. In the kernel's order, with
    # U_01 / U_00 = H⁻¹_01 / H⁻¹_00 = −2/5: 0.4 → 0, e = 0.4; 1.2 + 0.4 · 2/5 = 1.36 → 1.
    args = gram_of([[1, 2], [2, 5]]), only(), whole_steps((1, 1))
    swept = q.gptq(params, *args, damping=TINY, order="activation")["w"]
    np.testing.assert_array_equal(swept, [[1.0], [1.0]])
    swept = q.gptq(params, *args, damping=TINY, order="natural")["w"]
    np.testing.assert_array_equal(swept, [[0.0], [1.0]])


def test_jointly_by_hand():
    # H = [[5, 2], [2, 1]] again. The mask takes 0.4: e = 0.4; 1.2 + 0.8 = 2 → 2. It takes 1.2:
    # 0.4 → 0, and what 1.2 would have to become is dropped.
    params, args = {"w": jnp.array([[0.4], [1.2]])}, (gram_of([[5, 2], [2, 1]]), only())
    for kept, expected in [([False, True], [0.0, 2.0]), ([True, False], [0.0, 0.0])]:
        masks = {"w": jnp.array(kept)[:, None]}
        swept = q.gptq(params, *args, whole_steps((1, 1)), masks, damping=TINY, order="natural")
        np.testing.assert_array_equal(swept["w"][:, 0], expected)


def test_groups_of_inputs_have_ranges_of_their_own():
    # Four uncorrelated inputs in groups of two: steps of 1 and of 2.
    site = core.trace(dense, {"w": jnp.ones((4, 1))}, jnp.ones((1, 4))).sites
    grams = {"w": core.Gram(jnp.eye(4)[None], site)}
    reach = jnp.array([[3.0], [6.0]])
    ranges = {"w": {"weight": q.Range(-reach, reach)}}
    spec = only(per_channel=True, group=2)
    swept = q.gptq({"w": jnp.full((4, 1), 1.2)}, grams, spec, ranges)["w"]
    np.testing.assert_array_equal(swept[:, 0], [1.0, 1.0, 2.0, 2.0])


def test_uncorrelated_inputs_are_rounded():
    w = jax.random.normal(jax.random.key(0), (2, 1)) * 2
    swept = q.gptq({"w": w}, gram_of(jnp.eye(2)), only(), whole_steps((1, 1)))
    np.testing.assert_array_equal(swept["w"], jnp.clip(jnp.round(w), -3, 3))


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_better_than_rounding_and_no_layer_much_worse(digits, digits_grams, layer_errors, bits):
    # Stem, plain, strided depthwise and pointwise convolutions, and the dense head.
    spec, ranges = quantize_at(digits, bits)
    plain = layer_errors(rounded(digits, spec, ranges, digits.params))
    errors = layer_errors(q.gptq(digits.params, digits_grams, spec, ranges))
    for path in digits_grams:
        assert errors[path] < 1.1 * plain[path], path  # held-out: few inputs leave little to gain
    assert sum(errors.values()) < 0.6 * sum(plain.values())


def test_better_accuracy_than_rounding(digits, digits_grams):
    spec, ranges = quantize_at(digits, 3)
    predict = jax.jit(digits.fn)

    def accuracy(params):
        right = predict(params, digits.held_out_images).argmax(-1) == digits.held_out_labels
        return float(right.mean())

    swept = accuracy(q.gptq(digits.params, digits_grams, spec, ranges))
    assert swept > accuracy(rounded(digits, spec, ranges, digits.params)) + 0.05


QUANTIZERS = [
    q.Quantizer(4, "symmetric", per_channel=True),
    q.Quantizer(3, "affine", learning="fixed"),
    q.Quantizer(8, "affine", per_channel=True, learning="pact"),
    q.Quantizer(4, per_channel=True, power_of_two=True),
    q.Quantizer(1, "binary", per_channel=True, learning="fixed"),
    q.Quantizer(8, "e5m2", per_channel=True),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: quantizer.scheme)
def test_kernels_lie_on_their_grids_to_the_bit(model, quantizer):
    graph = core.trace(model.fn, model.params, model.x)
    spec = q.spec(graph, rules=[(".*", {"weight": quantizer, "activation": q.OFF})])
    ranges = q.calibrate(model.fn, model.params, [(model.x,)], spec, "mse")
    grams = core.input_grams(model.fn, model.params, [(model.x,)])
    swept = q.gptq(model.params, grams, spec, ranges)
    leaves, before = core.flatten_paths(swept), core.flatten_paths(model.params)
    integers = stored_kernels(model.fn, spec, swept, ranges, model.x)
    for path, leaf in leaves.items():
        if path in integers:
            values, grid = integers[path]
            np.testing.assert_array_equal(q.quantize(leaf, grid), values)
            np.testing.assert_array_equal(q.dequantize(*integers[path]), leaf)
            assert np.any(leaf != before[path])
        else:
            np.testing.assert_array_equal(leaf, before[path])
    fake = jax.jit(q.fake_quantized(model.fn, spec))(swept, ranges, model.x)
    np.testing.assert_array_equal(fake, jax.jit(model.fn)(swept, model.x))


def test_traced_bits_lie_on_their_grids_to_the_bit(model):
    graph = core.trace(model.fn, model.params, model.x)
    spec = q.spec(graph, rules=[(".*", {"activation": q.OFF})])
    ranges = q.calibrate(model.fn, model.params, [(model.x,)], spec)
    grams = core.input_grams(model.fn, model.params, [(model.x,)])
    widths = {"weight": jnp.int32(3), "activation": jnp.int32(q.OFF)}
    bits = dict.fromkeys(spec.weight_bits, widths)
    swept = q.gptq(model.params, grams, spec, ranges, bits=bits)
    fake = jax.jit(q.fake_quantized(model.fn, spec))(swept, ranges, model.x, bits=bits)
    np.testing.assert_array_equal(fake, jax.jit(model.fn)(swept, model.x))


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_jointly_better_than_pruned_and_then_rounded(digits, digits_grams, layer_errors, bits):
    kernels = core.trace(digits.fn, digits.params, digits.images[:1]).kernels
    masks = pruning.masks(pruning.magnitude(kernels, digits.params), 0.5)
    masked = pruning.apply_masks(digits.params, masks)
    moved = pruning.compensate(digits.params, masks, digits_grams)
    errors = {}
    for name, params in [("masked", masked), ("moved", moved)]:
        spec, ranges = quantize_at(digits, bits, params)
        errors[name] = sum(layer_errors(rounded(digits, spec, ranges, params)).values())
        swept = q.gptq(params, digits_grams, spec, ranges, masks)
        errors[name, "swept"] = sum(layer_errors(swept).values())
        kernels = core.flatten_paths(swept)
        for path, mask in core.flatten_paths(masks).items():
            if not core.is_masked_node(mask):
                assert not np.any(np.asarray(kernels[path])[~np.asarray(mask)])
    assert errors["moved", "swept"] < errors["moved"] < errors["masked"]
    # From weights that are not pruned yet the sweep prunes too, less well.
    spec, ranges = quantize_at(digits, bits, masked)
    at_once = q.gptq(digits.params, digits_grams, spec, ranges, masks)
    at_once = sum(layer_errors(at_once).values())
    assert errors["moved", "swept"] < at_once < 0.9 * errors["masked"]


def grouped(groups):
    def conv(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    return conv


@pytest.mark.parametrize("channels", [1, 2])
def test_groups_are_dense_layers_of_their_own(digits, channels):
    # A depthwise (1) and a grouped (2) convolution over 2 × 2 patches of real images as 4 channels.
    x = digits.images[:16].reshape(16, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(16, 4, 4, 4)
    groups = 4 // channels
    kernel = jax.random.normal(jax.random.key(0), (2, 2, channels, 2 * groups))
    params, fn = {"w": kernel}, grouped(groups)
    grams = core.input_grams(fn, params, [(x,)])
    spec, span = only(3, per_channel=True), q.extent(kernel, (0, 1, 2))
    swept = q.gptq(params, grams, spec, {"w": {"weight": span}})
    seen = core.at_sites(
        fn, lambda site, x, kernel, apply: (apply(x, kernel), core.patches(site, x, apply))
    )(params, x)[1]["w"]
    site = grams["w"].site
    before, after = (core.kernel_matrix(site, tree["w"]) for tree in (params, swept))
    low, high = (core.kernel_matrix(site, jnp.broadcast_to(end, kernel.shape)) for end in span)
    for g in range(groups):
        alone = {"w": before[g]}
        gram = core.input_grams(dense, alone, [(seen[g],)])
        ranges = {"w": {"weight": q.Range(low[g, :1], high[g, :1])}}
        np.testing.assert_allclose(q.gptq(alone, gram, spec, ranges)["w"], after[g], rtol=1e-6)
    moved = q.quantize(before, q.symmetric(q.Range(low, high), 3))
    assert np.any(moved != q.quantize(after, q.symmetric(q.Range(low, high), 3)))


def test_a_shared_kernel_has_one_answer():
    # The inputs at the second site are those of the first, twice: H is five times one H.
    def twice(params, x):
        return (x @ params["w"]).sum() + (2.0 * x @ params["w"]).sum()

    params = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
    x = jax.random.normal(jax.random.key(1), (16, 6)) + 1
    spec = q.spec(core.trace(twice, params, x), weight_bits=3, first_last_bits=3)
    ranges = q.calibrate(twice, params, [(x,)], spec)
    swept = q.gptq(params, core.input_grams(twice, params, [(x,)]), spec, ranges)
    once = core.input_grams(dense, params, [(x,)])
    np.testing.assert_array_equal(
        swept["w"], q.gptq(params, once, only(3, per_channel=True), ranges)["w"]
    )
    ranges["w#2"] = {"weight": q.Range(*(2 * end for end in ranges["w"]["weight"]))}
    with pytest.raises(ValueError, match=r"ranges must be the same at all sites .* 'w' and 'w#2'"):
        q.gptq(params, core.input_grams(twice, params, [(x,)]), spec, ranges)


def test_jit_and_a_stack_of_experts_at_bits_of_their_own():
    x = jax.random.normal(jax.random.key(1), (16, 6)) + 1
    params = {"w": jax.random.normal(jax.random.key(0), (3, 6, 4))}
    grams = core.input_grams(dense, params, [(x,)], stacked=True)
    spec = only(8, per_channel=True)
    bits = {"w": {"weight": jnp.array([2, 4, q.OFF])}}
    ranges = {"w": {"weight": q.extent(params["w"], (1,))}}

    @jax.jit
    @jax.vmap
    def compiled(params, grams, ranges, bits):
        return q.gptq(params, grams, spec, ranges, bits=bits)

    together = compiled(params, grams, ranges, bits)["w"]
    for i, width in enumerate([2, 4, q.OFF]):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], (params, grams, ranges))
        alone = q.gptq(*own[:2], only(width, per_channel=True), own[2])["w"]
        np.testing.assert_allclose(together[i], alone, rtol=1e-6)
    np.testing.assert_array_equal(together[2], params["w"][2])
    compiled(params, grams, ranges, jax.tree.map(lambda b: b[::-1], bits))
    assert compiled._cache_size() == 1


def test_the_kernels_of_a_plan(digits):
    """As the sites of a function: better than rounding, on their grids, and zeros stay zero."""
    batches = [(digits.images[:256],), (digits.images[256:512],)]
    rules = [("params/head/kernel", {"weight": q.OFF}), (".*", {"weight": 3})]
    spec = q.spec(core.trace(digits.fn, digits.params, *batches[0]), rules)
    program = p.lower(digits.fn, digits.params, digits.images[:2])
    name = "params/project/kernel"
    (pruned,) = (n for n, source in program.sources.items() if source.site == name)
    own = program.params[pruned]
    kept = np.abs(own["kernel"]) > np.quantile(np.abs(own["kernel"]), 0.3)
    changed = program.params | {pruned: own | {"kernel": np.where(kept, own["kernel"], 0)}}
    made = q.plan(program.replace(changed), spec)
    ranges = q.calibrate_edges(made, batches, "minmax")
    new = q.gptq_planned(made, ranges, batches)
    assert not np.any(np.asarray(new[pruned]["kernel"])[~kept])
    (head,) = (n for n in new if n not in made.ranged)
    np.testing.assert_array_equal(new[head]["kernel"], program.params[head]["kernel"])
    for name in made.ranged:
        grid = made.kernels[name].grid(ranges[name]["weight"])
        again = q.dequantize(q.quantize(new[name]["kernel"], grid), grid)
        np.testing.assert_allclose(again, new[name]["kernel"], rtol=1e-6)
    q_fn, expected = jax.jit(q.as_deployed(made)), p.run(made.program)(digits.held_out_images)
    nearest, swept = (
        float(jnp.mean((q_fn(params, ranges, digits.held_out_images) - expected) ** 2))
        for params in (made.program.params, new)
    )
    assert swept < 0.75 * nearest  # of networks trained on different machines 0.25 to 0.62
    q.encode(made.replace(new), ranges, digits.images[:8])
    with pytest.raises(ValueError, match=rf"ranges must have \['{made.ranged[0]}'\]\['weight'\]"):
        q.gptq_planned(made, {}, batches)


def test_dead_and_constant_inputs():
    # The second input is always zero: 1.4 is rounded, and nothing is moved onto it or off it.
    params = {"w": jnp.array([[0.4], [1.4], [0.4]])}
    x = jnp.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    grams = core.input_grams(dense, params, [(x,)])
    swept = q.gptq(params, grams, only(), whole_steps((1, 1)))["w"]
    # 0.4 → 0, and the other, which sees the same, becomes 0.8 → 1.
    np.testing.assert_array_equal(swept, [[0.0], [1.0], [1.0]])
    nothing = core.input_grams(dense, params, [(0 * x,)])
    swept = q.gptq(params, nothing, only(), whole_steps((1, 1)))["w"]
    np.testing.assert_array_equal(swept, [[0.0], [1.0], [0.0]])


def test_what_is_not_quantized_is_left_alone():
    params, grams = {"w": jnp.array([[0.4], [1.2]])}, gram_of([[5, 2], [2, 1]])
    assert q.gptq(params, grams, only(q.OFF), {})["w"] is params["w"]
    assert q.gptq(params, {}, only(q.OFF), {})["w"] is params["w"]
    # With a mask it is only pruned: 1.2 + 2 · 0.4.
    masks = {"w": jnp.array([[False], [True]])}
    swept = q.gptq(params, grams, only(q.OFF), {}, masks, damping=TINY, order="natural")["w"]
    np.testing.assert_allclose(swept, [[0.0], [2.0]], rtol=1e-4)


def test_bad_input():
    params, grams = {"w": jnp.array([[0.4], [1.2]])}, gram_of([[5, 2], [2, 1]])
    spec, ranges = only(), whole_steps((1, 1))
    masks = {"w": jnp.array([[False], [True]])}
    for wrong, message in [
        ((params, {}, spec, ranges), "kernel to be quantized or pruned, got none for 'w' among: n"),
        ((params, {}, only(q.OFF), ranges, masks), "or pruned, got none for 'w' among: nothing"),
        (
            ({"v": params["w"]}, grams, spec, ranges),
            "grams must be of parameters, got 'w' among: v",
        ),
        ((params, grams, q.Spec(()), ranges), "spec must cover every site, got none for 'w'"),
        ((params, grams, spec, {}), r"ranges must have \['w'\]\['weight'\], got nothing"),
        ((params, grams, only(learning="dynamic"), {}), "'w' must have a range .* 'dynamic'"),
        (
            (params, grams, only(1, scheme="binary", learning="fixed"), ranges, masks),
            "masks must leave the binary kernel 'w' whole",
        ),
        ((params, grams, spec, ranges, {}), "masks must have .* params, got 'w' in one"),
        ((params, grams, spec, ranges, {"w": jnp.ones((1, 1), bool)}), r"got bool\[1,1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            q.gptq(*wrong)
    with pytest.raises(ValueError, match="order must be one of activation, natural, got 'nat'"):
        q.gptq(params, grams, spec, ranges, order="nat")
    with pytest.raises(ValueError, match="bits of 'w' must be 2 to 8, or 32 for off, got 9"):
        q.gptq(params, grams, spec, ranges, bits={"w": {"weight": 9}})
    with pytest.raises(ValueError, match=r"bits must have \['w'\]\['weight'\], got v"):
        q.gptq(params, grams, spec, ranges, bits={"v": {"weight": 4}})

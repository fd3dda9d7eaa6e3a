import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import core
from hybrid_jax import quantization as q
from hybrid_jax.quantization import reconstruction

STEM, DEPTHWISE, HEAD = (f"params/{name}/kernel" for name in ("stem", "depthwise", "head"))
KEY = jax.random.key(0)


def specify(fn, params, x, bits, per_channel=False):
    quantizers = {
        "weight": q.Quantizer(bits, per_channel=per_channel),
        "activation": q.Quantizer(8, "affine"),
    }
    return q.spec(core.trace(fn, params, x), [(".*", quantizers)])


class Case(NamedTuple):
    """The digits network at some bits, and ways to round it."""

    spec: q.Spec
    ranges: dict
    errors: Callable
    """params -> squared errors, on images held out, of the logits and of what each site takes."""
    learned: Callable
    """blocks -> params."""


@pytest.fixture(scope="module")
def case(digits):
    @functools.cache
    def at(bits):
        images = digits.images[:512].reshape(8, 64, 8, 8, 1)
        batches = [(batch,) for batch in images]
        spec = specify(digits.fn, digits.params, images[0], bits, per_channel=bits == 2)
        ranges = q.calibrate(digits.fn, digits.params, batches, spec, "mse")
        watched = core.at_sites(digits.fn, lambda site, x, kernel, apply: (apply(x, kernel), x))
        expected = jax.jit(watched)(digits.params, digits.held_out_images)
        run = jax.jit(q.fake_quantized(watched, spec))

        def errors(params):
            got = run(params, ranges, digits.held_out_images)
            return jax.tree.map(lambda a, b: float(jnp.mean((a - b) ** 2)), got, expected)

        @functools.cache
        def learned(blocks=()):
            return q.adaround(
                digits.fn, digits.params, batches, spec, ranges, KEY, blocks,
                steps=1200 if bits == 2 else 300,
            )  # fmt: skip

        return Case(spec, ranges, errors, learned)

    return at


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_adaround_beats_rounding_at_every_layer(digits, case, bits):
    here = case(bits)
    nearest, learned = here.errors(digits.params), here.errors(here.learned())
    assert learned[0] < nearest[0]
    for name in set(learned[1]) - {STEM}:  # which takes the images themselves
        assert learned[1][name] < nearest[1][name], name


@pytest.mark.slow
def test_blocks_beat_layers_at_the_end_of_the_network(digits, case):
    here = case(2)
    blocks = ("params/(expand|project)/kernel", "params/(depthwise|pointwise|head)/kernel")
    by_block, by_layer = here.errors(here.learned(blocks)), here.errors(here.learned())
    assert by_block[0] < by_layer[0] < here.errors(digits.params)[0]


def test_kernels_lie_on_their_grids_next_to_the_float_weights(digits, case):
    here = case(3)
    rounded = here.learned()
    integers = q.integer_kernels(digits.fn, here.spec, rounded, here.ranges, digits.images[:1])
    before, after = core.flatten_paths(digits.params), core.flatten_paths(rounded)
    assert len(integers) == 6
    for name, kernel in integers.items():
        np.testing.assert_array_equal(after[name], q.dequantize(*kernel))
        inside = jnp.abs(before[name]) < 3 * kernel.grid.scale
        step = jnp.abs(after[name] - before[name]) / kernel.grid.scale
        assert float(step[inside].max()) < 1.0001
        assert 0 < np.mean(step[inside] > 0.5) < 0.5  # Some, not most, go the other way.
    for path in set(before) - set(integers):
        np.testing.assert_array_equal(after[path], before[path])


def adaround(model, spec, params=None, key=KEY, **options):
    params = model.params if params is None else params
    batches = [(model.x,), (model.x[::-1],)]
    ranges = q.calibrate(model.fn, params, batches, spec)
    return q.adaround(model.fn, params, batches, spec, ranges, key, **{"steps": 30} | options)


@pytest.mark.slow
def test_the_same_key_gives_the_same_rounding(model):
    spec = specify(model.fn, model.params, model.x, 3)
    once, again = (adaround(model, spec) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_pruned_weights_stay_zero_and_32_bits_stay_as_they_are(model):
    rules = [(HEAD, {"weight": 32}), (".*", {"weight": q.Quantizer(2, "affine", True)})]
    spec = q.spec(core.trace(model.fn, model.params, model.x), rules)
    params = jax.tree.map(jnp.copy, model.params)
    kernel = params["params"]["stem"]["kernel"]
    mask = jax.random.bernoulli(KEY, 0.5, kernel.shape)
    params["params"]["stem"]["kernel"] = jnp.where(mask, kernel, 0.0)
    new = adaround(model, spec, params)["params"]
    assert not np.any(np.asarray(new["stem"]["kernel"])[~np.asarray(mask)])
    np.testing.assert_array_equal(new["head"]["kernel"], params["params"]["head"]["kernel"])
    assert not np.array_equal(new["depthwise"]["kernel"], params["params"]["depthwise"]["kernel"])


def test_groups_of_weights_have_grids_of_their_own(model):
    by_row = q.Quantizer(3, per_channel=True, group=3)
    rules = [(DEPTHWISE, {"weight": by_row}), (".*", {"weight": 32})]
    spec = q.spec(core.trace(model.fn, model.params, model.x), rules)
    ranges = q.calibrate(model.fn, model.params, [(model.x,)], spec)
    new = q.adaround(model.fn, model.params, [(model.x,)], spec, ranges, KEY, steps=30)
    integers = q.integer_kernels(model.fn, spec, new, ranges, model.x)[DEPTHWISE]
    assert integers.grid.scale.shape == (3, 1, 1, 4)
    kernel = new["params"]["depthwise"]["kernel"]
    np.testing.assert_allclose(kernel, q.dequantize(*integers), rtol=1e-6)
    assert not np.allclose(kernel, model.params["params"]["depthwise"]["kernel"])


def test_bits_in_place_of_the_spec(model):
    spec = specify(model.fn, model.params, model.x, 8)
    bits = {site.name: {"weight": jnp.int32(2), "activation": jnp.int32(8)} for site in spec.sites}
    new = adaround(model, spec, bits=bits)
    assert len(np.unique(new["params"]["stem"]["kernel"])) == 3
    spec = specify(model.fn, model.params, model.x, 2)
    jax.tree.map(np.testing.assert_array_equal, new, adaround(model, spec))


def test_grouped_convolution_in_another_layout_and_a_shared_kernel():
    def fn(p, x):
        x = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", feature_group_count=2)
        x = jax.nn.relu(x).mean((2, 3))
        return jax.nn.relu(x @ p["twice"]) @ p["twice"]

    params = {
        "conv": jax.random.normal(KEY, (6, 2, 3, 3)),
        "twice": jax.random.normal(jax.random.key(1), (6, 6)),
    }
    x = jax.random.normal(jax.random.key(2), (16, 4, 5, 5))
    spec = specify(fn, params, x, 2)
    ranges = q.calibrate(fn, params, [(x,)], spec)
    new = q.adaround(fn, params, [(x,)], spec, ranges, KEY, steps=100)
    q_fn, expected = jax.jit(q.fake_quantized(fn, spec)), fn(params, x)
    nearest, learned = (jnp.mean((q_fn(p, ranges, x) - expected) ** 2) for p in (params, new))
    assert learned < nearest


def test_equal_layers_are_compiled_once(monkeypatch):
    traced = []
    error = reconstruction._error
    monkeypatch.setattr(reconstruction, "_error", lambda *a: traced.append(a[0]) or error(*a))

    def fn(p, x):
        for name in "abcd":
            x = jax.nn.relu(x @ p[name])
        return x @ p["e"]

    params = {n: jax.random.normal(jax.random.key(i), (3, 3)) for i, n in enumerate("abcde")}
    x = jax.random.normal(KEY, (8, 3))
    spec = specify(fn, params, x, 4)
    ranges = q.calibrate(fn, params, [(x,)], spec)
    q.adaround(fn, params, [(x,), (2 * x,)], spec, ranges, KEY, steps=2)
    # Two programs, with and without the ReLU, each once for the error and once for its gradient.
    assert len(traced) == 4


def test_errors_of_half_precision_are_taken_in_float32():
    params = {"w": jnp.array([[1.0], [0.25], [0.25]], jnp.bfloat16)}
    x = jnp.ones((1, 3), jnp.bfloat16)

    def fn(params, x):
        return x @ params["w"]

    spec = specify(fn, params, x, 3)
    ranges = q.calibrate(fn, params, [(x,)], spec)
    new = q.adaround(fn, params, [(x,)], spec, ranges, KEY, steps=100)["w"]
    assert new.dtype == jnp.bfloat16
    steps = np.asarray(new.astype(jnp.float32)).ravel() * 3  # 3 bits: from −1 to 1 in thirds
    np.testing.assert_allclose(steps, np.round(steps), atol=0.02)
    assert set(np.round(steps)) <= {0, 1, 3}


def test_bad_batches(model):
    spec = specify(model.fn, model.params, model.x, 4)
    ranges = q.calibrate(model.fn, model.params, [(model.x,)], spec)

    def run(batches, ranges=ranges, spec=spec, **options):
        q.adaround(model.fn, model.params, batches, spec, ranges, KEY, **options)

    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        run([])
    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got ArrayImpl"):
        run([model.x])
    with pytest.raises(ValueError, match=r"every batch must have float32\[4,6,6,2\] at '0', got"):
        run([(model.x,), (model.x[:2],)])
    bad = model.x.at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=f"what the block of {STEM} sees must be finite, got"):
        run([(bad,)])
    with pytest.raises(ValueError, match=r"ranges must have \['params/head/kernel'\]\['weight'\]"):
        run([(model.x,)], {name: ranges[name] for name in (STEM, DEPTHWISE)})
    off = specify(model.fn, model.params, model.x, 32)
    with pytest.raises(ValueError, match="must quantize at least one kernel, got 32 bits for all"):
        run([(model.x,)], spec=off)
    dynamic = [(".*", {"weight": q.Quantizer(4, learning="dynamic")})]
    with pytest.raises(ValueError, match=f"must be calibrated, got 'dynamic' for .* '{STEM}'"):
        run([(model.x,)], spec=q.spec(core.trace(model.fn, model.params, model.x), dynamic))
    signs = [(".*", {"weight": q.Quantizer(1, "binary", learning="fixed")})]
    binary = q.spec(core.trace(model.fn, model.params, model.x), signs)
    with pytest.raises(ValueError, match="must have integer grids, got 'binary' for"):
        run([(model.x,)], spec=binary)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        run([(model.x,)], steps=0)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0, got -1"):
        run([(model.x,)], learning_rate=-1)


def test_bad_blocks(model):
    spec = specify(model.fn, model.params, model.x, 4)
    with pytest.raises(ValueError, match="rule 'stem' must match at least one path"):
        adaround(model, spec, blocks=["stem"])
    with pytest.raises(ValueError, match=f"got '{HEAD}' cut off"):
        adaround(model, spec, blocks=[f"{STEM}|{HEAD}"])


def test_kernels_that_are_no_parameters():
    x = jnp.ones((2, 2))

    def run(fn, params, blocks=()):
        spec = specify(fn, params, x, 4)
        ranges = q.calibrate(fn, params, [(x,)], spec)
        q.adaround(fn, params, [(x,)], spec, ranges, KEY, blocks, steps=1)

    w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(
        ValueError, match="must be a parameter as it stands, outside loops, got 'w'"
    ):
        run(lambda p, x: x @ p["w"].T, {"w": w})
    with pytest.raises(
        ValueError, match="must be a parameter as it stands, outside loops, got 'w'"
    ):
        run(lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0], {"w": w[None]})
    with pytest.raises(ValueError, match="blocks must not part the sites of kernel 'w'"):
        run(lambda p, x: x @ p["w"] @ p["w"], {"w": w}, ["w#2"])

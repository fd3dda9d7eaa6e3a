import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import datasets

from hybrid_jax import quantization as q
from hybrid_jax.quantization import histograms

FACTORIES = [q.minmax, q.moving_average, q.percentile, q.mse, q.entropy]
SYMMETRIC = [q.mean_abs, q.ternary]


def ends(observer, *batches, scheme=q.affine, bits=8):
    state = observer.init(jnp.asarray(batches[0], jnp.float32))
    for batch in batches[1:]:
        state = observer.merge(state, observer.init(jnp.asarray(batch, jnp.float32)))
    return [float(end) for end in observer.value(state, scheme, bits)]


def test_minmax():
    assert ends(q.minmax(), [1.0, 3.0], [-2.0, 0.0], [2.0]) == [-2.0, 3.0]


def test_moving_average():
    # High: 4, then 0.9 · 4 + 0.1 · 8 = 4.4, then 0.9 · 4.4 + 0.1 · 0 = 3.96.
    low, high = ends(q.moving_average(0.9), [0.0, 4.0], [0.0, 8.0], [0.0, 0.0])
    np.testing.assert_allclose([low, high], [0.0, 3.96], rtol=1e-6)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentile_to_a_bin(percent):
    x = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    low, high = ends(q.percentile(percent), *np.split(x, 4))
    expected = np.percentile(x, [100 - percent, percent])
    bin_width = 2 * 8 / 2048  # the radius is the power of two above max |x|, between 4 and 8
    np.testing.assert_allclose([low, high], expected, atol=1.5 * bin_width)


def test_percentile_counts_the_zeros():
    # 1 value in 100 is 5, the rest are 0: 98 % leaves out two at the top, 99.5 % none.
    x = np.zeros(100)
    x[0] = 5.0
    assert ends(q.percentile(98.0), x) == [0.0, 0.0]
    assert ends(q.percentile(99.5), x) == [0.0, 5.0]


@pytest.mark.parametrize("factory", [q.percentile, q.mse])  # entropy and ternary: the same states
@given(
    scales=st.lists(st.integers(-20, 20), min_size=2, max_size=4), seed=st.integers(0, 2**31 - 1)
)
@settings(max_examples=15)
def test_streaming_a_histogram_is_exact(factory, scales, seed):
    """Batches in any order, of any magnitude, give the very counts of all values at once."""
    rng = np.random.default_rng(seed)
    batches = [np.float32(rng.normal(size=8) * 2.0**s) for s in scales]
    observer = factory()
    whole = observer.init(jnp.concatenate(batches))
    for order in (batches, batches[::-1]):
        state = observer.init(jnp.asarray(order[0]))
        for batch in order[1:]:
            state = observer.merge(state, observer.init(jnp.asarray(batch)))
        for a, b in zip(state, whole, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("factory", FACTORIES + SYMMETRIC)
def test_a_state_of_zeros_is_neutral(factory):
    observer = factory()
    state = observer.init(jnp.array([2.0, 3.0]))
    nothing = jax.tree.map(jnp.zeros_like, state)
    for merged in (observer.merge(state, nothing), observer.merge(nothing, state)):
        chex.assert_trees_all_equal(merged, state)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("constant", [0.0, 3.0, -3.0])
def test_constant_tensor(factory, constant):
    low, high = ends(factory(), np.full(10, constant), np.full(5, constant))
    grid = q.affine(q.Range(jnp.float32(low), jnp.float32(high)), 8)
    np.testing.assert_allclose(q.fake_quant(jnp.full(3, constant), grid), constant, rtol=1e-6)


@pytest.mark.parametrize("factory", SYMMETRIC)
@pytest.mark.parametrize("constant", [0.0, 3.0, -3.0])
def test_constant_magnitude(factory, constant):
    low, high = ends(factory(), np.full(10, constant), np.full(5, constant))
    # To half a bin: 4 / 1024 / 2.
    np.testing.assert_allclose([low, high], [-abs(constant), abs(constant)], atol=0.002)


def test_mean_abs_streams():
    # (1 + 2 + 3 + 0 + 8) / 5.
    low, high = ends(q.mean_abs(), [-1.0, 2.0, -3.0], [0.0, 8.0])
    np.testing.assert_allclose([low, high], [-2.8, 2.8], rtol=1e-6)


def test_mean_abs_is_the_best_range_for_signs():
    x = np.float32(np.random.default_rng(0).normal(size=5000))
    best = max(np.abs(ends(q.mse(), x, scheme=q.binary, bits=1)))
    np.testing.assert_allclose(best, np.abs(x).mean(), atol=np.abs(x).max() / 100)


def test_ternary_is_the_formula_of_the_paper():
    x = np.float32(np.random.default_rng(0).normal(size=20_000))
    x[:5000] = 0.0  # they count in the mean
    threshold = 0.7 * np.abs(x).mean()
    chosen = np.abs(x) > threshold
    scale = np.abs(x)[chosen].mean()
    low, high = ends(q.ternary(), *np.split(x, 4))
    bin_width = 2 * 8 / 2048  # max |x| lies between 4 and 8
    np.testing.assert_allclose([low, high], [-scale, scale], atol=bin_width)
    # Rounding to the nearest of {−a, 0, a} is no worse than the paper's threshold, and better than
    # the grid of the same bits over all values.
    paper = np.mean((np.where(chosen, scale * np.sign(x), 0) - x) ** 2)

    def error(a):
        grid = q.symmetric(q.Range(jnp.float32(-a), jnp.float32(a)), 2)
        return float(np.mean((q.fake_quant(jnp.asarray(x), grid) - x) ** 2))

    assert error(high) <= paper * 1.001
    assert error(high) < error(np.abs(x).max())


def divergences(x, levels, bins=2048):
    """TensorRT's search in loops, on |x| in half as many bins: KL of each number of bins kept."""
    radius = 2.0 ** np.ceil(np.log2(np.abs(x).max()))
    counts, _ = np.histogram(np.abs(x), bins // 2, (0, radius))
    last = int(np.ceil(np.abs(x).max() / radius * (bins // 2)))
    found = {}
    for percent in range(1, 101):
        clip = np.abs(x).max() * percent / 100
        middles = (np.arange(bins // 2) + 0.5) * radius * 2 / bins
        kept = int(np.sum(middles < clip + radius / bins))
        p = counts[:kept].astype(float)
        p[-1] += counts[kept:].sum()
        level = np.minimum(np.round(middles[:kept] / (clip / levels)), levels)
        merged = np.zeros(kept)
        for value in np.unique(level):
            here = (level == value) & (counts[:kept] > 0)
            if here.any():
                merged[here] = counts[:kept][here].sum() / here.sum()
        p, merged = p / p.sum(), merged / max(merged.sum(), 1)
        some = p > 0
        found[percent] = np.sum(p[some] * np.log(p[some] / np.maximum(merged[some], 1e-7)))
    assert kept <= last + 1
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tail", [0.0, 12.0])
def test_entropy_is_the_search_of_its_source(bits, tail):
    rng = np.random.default_rng(bits)
    x = np.append(np.abs(np.float32(rng.normal(size=20_000))), np.float32(tail)) + 1e-6
    high = ends(q.entropy(), x, scheme=q.affine, bits=bits)[1]
    expected = divergences(x, 2**bits - 1)
    chosen = round(100 * high / x.max())
    assert expected[chosen] <= min(expected.values()) * 1.02 + 1e-6


def test_entropy_clips_a_tail_and_keeps_a_flat_distribution():
    rng = np.random.default_rng(0)
    bell = np.append(rng.normal(size=20_000), 50.0)
    assert ends(q.entropy(), bell, scheme=q.symmetric, bits=8)[1] < 10
    flat = np.linspace(-1, 1, 100_001)
    assert ends(q.entropy(), flat, scheme=q.symmetric, bits=8)[1] > 0.95


def test_mse_clips_an_outlier_only_where_bits_are_few():
    x = np.append(np.random.default_rng(0).normal(size=5000), 12.0)
    clips = [ends(q.mse(), x, scheme=q.symmetric, bits=bits)[1] for bits in range(2, 9)]
    assert clips == sorted(clips)
    assert clips[0] < 4
    assert clips[-1] > 4


@pytest.mark.parametrize("scheme", [q.symmetric, q.affine])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_beats_minmax_on_real_images(scheme, bits):
    """Band-passed handwritten digits: what a first convolution hands on."""
    images = np.float32(datasets.load_digits().images / 16)
    x = np.diff(images - images.mean(0), axis=-1)

    def error(factory):
        low, high = ends(factory(), *np.array_split(x, 5), scheme=scheme, bits=bits)
        grid = scheme(q.Range(jnp.float32(low), jnp.float32(high)), bits)
        return float(jnp.mean((q.fake_quant(jnp.asarray(x), grid) - x) ** 2))

    assert error(q.mse) < error(q.minmax)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"percent must be in \(50, 100\], got 101"):
        q.percentile(101)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1.5"):
        q.moving_average(1.5)


def test_more_equal_values_than_a_float32_counts_to():
    state = histograms.histogram(jnp.full(2**24 + 4, 1.0, jnp.bfloat16))
    assert float(state.counts.sum()) == float(state.total) == 2**24 + 4


@pytest.mark.parametrize("factory", FACTORIES)
def test_ranges_are_float32_where_jax_has_64_bits(factory):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
        span = factory().value(factory().init(x), q.affine, 8)
    assert {end.dtype for end in span} == {np.dtype(np.float32)}

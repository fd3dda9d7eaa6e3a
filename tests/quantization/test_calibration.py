import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax import quantization as q
from hybrid_jax.quantization import observers
from hybrid_jax.quantization.observers import METHODS


def spec_of(model, **kwargs):
    return q.spec(core.trace(model.fn, model.params, model.x), **kwargs)


def test_minmax_by_hand(model):
    spec = spec_of(model)
    ranges = q.calibrate(model.fn, model.params, [(model.x[:2],), (model.x[2:],)], spec)
    stem = ranges["params/stem/kernel"]
    np.testing.assert_array_equal(stem["activation"].low, model.x.min())
    np.testing.assert_array_equal(stem["activation"].high, model.x.max())
    kernel = model.params["params"]["stem"]["kernel"]
    assert stem["weight"].low.shape == (1, 1, 1, 4)
    np.testing.assert_array_equal(stem["weight"].high[0, 0, 0], kernel.max((0, 1, 2)))
    assert ranges["params/depthwise/kernel"]["weight"].high.shape == (1, 1, 1, 4)
    assert ranges["params/head/kernel"]["weight"].high.shape == (1, 3)
    # After a ReLU nothing is negative, and the grid is plain unsigned.
    assert float(ranges["params/head/kernel"]["activation"].low) == 0.0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ranges))


@pytest.mark.parametrize("method", ["ema", "mse"])
def test_a_stack_equals_separate_calibrations(model, method):
    spec = spec_of(model)
    experts = [jax.tree.map(lambda leaf, s=s: leaf * s, model.params) for s in (0.5, 2.0)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)
    bits = [jax.tree.map(lambda _, b=b: jnp.int32(b), spec.bits()) for b in (2, 8)]
    batches = [(model.x[:2],), (model.x[2:],)]
    together = q.calibrate(
        model.fn, stack, batches, spec, method, stacked=True,
        bits=jax.tree.map(lambda *leaves: jnp.stack(leaves), *bits),
    )  # fmt: skip
    for i, (params, width) in enumerate(zip(experts, bits, strict=True)):
        alone = q.calibrate(model.fn, params, batches, spec, method, bits=width)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            together,
            alone,
        )


def test_a_quantizer_may_state_its_own_method(model):
    own = q.Quantizer(4, per_channel=True, method="mse")
    spec = spec_of(model, rules=[(".*stem.*", {"weight": own})])
    batches = [(model.x,)]
    ranges = q.calibrate(model.fn, model.params, batches, spec)
    for method, name in (("mse", "params/stem/kernel"), ("minmax", "params/head/kernel")):
        alone = q.calibrate(model.fn, model.params, batches, spec, method)[name]["weight"]
        chex.assert_trees_all_equal(ranges[name]["weight"], alone)
    widest = q.calibrate(model.fn, model.params, batches, spec_of(model))["params/stem/kernel"]
    assert np.any(ranges["params/stem/kernel"]["weight"].high < widest["weight"].high)


def test_a_range_for_each_group(model):
    grouped = q.Quantizer(4, per_channel=True, group=6)
    spec = spec_of(model, rules=[(".*stem.*", {"weight": grouped})])
    span = q.calibrate(model.fn, model.params, [(model.x,)], spec)["params/stem/kernel"]["weight"]
    kernel = model.params["params"]["stem"]["kernel"]
    # 6 of the 18 weights of an output channel are one row of the 3 × 3 taps of 2 channels.
    np.testing.assert_array_equal(span.high, kernel.max((1, 2), keepdims=True))
    np.testing.assert_array_equal(span.low, kernel.min((1, 2), keepdims=True))


def test_dynamic_tensors_need_no_range(model):
    kernels = q.Quantizer(4, per_channel=True, learning="dynamic")
    spec = spec_of(model, rules=[(".*", {"weight": kernels})])
    ranges = q.calibrate(model.fn, model.params, [(model.x,)], spec)
    assert all(set(roles) == {"activation"} for roles in ranges.values())
    out = jax.jit(q.fake_quantized(model.fn, spec))(model.params, ranges, model.x)
    assert np.all(np.isfinite(out))


def test_scan_sees_all_iterations():
    def fn(params, x):
        return lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    # Inputs of the three products: 1, then 1·2 = 2, then 2·(−3) = −6.
    params, x = {"w": jnp.array([2.0, -3.0, 1.0]).reshape(3, 1, 1)}, jnp.ones((1, 1))
    spec = q.spec(core.trace(fn, params, x))
    ranges = q.calibrate(fn, params, [(x,)], spec)["w"]
    assert [float(end) for end in ranges["activation"]] == [-6.0, 2.0]
    assert [float(end[0, 0]) for end in ranges["weight"]] == [-3.0, 2.0]


@pytest.mark.parametrize("method", METHODS)
def test_a_branch_not_taken_shows_nothing(method):
    def fn(params, x):
        return lax.cond(x.sum() > 0, lambda x: x @ params["w"], lambda x: x, x)

    params = {"w": jnp.full((1, 1), 5.0)}
    x = jnp.full((1, 1), 3.0)
    spec = q.spec(core.trace(fn, params, x))
    both = q.calibrate(fn, params, [(-x,), (x,), (-x,)], spec, method)["w"]
    alone = q.calibrate(fn, params, [(x,)], spec, method)["w"]
    chex.assert_trees_all_equal(both, alone)


def test_one_compilation_for_all_batches(model):
    traced = []

    def fn(params, x):
        traced.append(x.shape)
        return model.fn(params, x)

    spec = spec_of(model)
    traced.clear()
    q.calibrate(fn, model.params, [(model.x + i,) for i in range(4)], spec, "mse")
    assert len(traced) == 1


def test_dead_channel_and_dead_activation(model):
    params = jax.tree.map(jnp.copy, model.params)
    params["params"]["stem"]["kernel"] = params["params"]["stem"]["kernel"].at[..., 1].set(0.0)
    spec = spec_of(model, weight_bits=4)
    x = jnp.zeros_like(model.x)
    ranges = q.calibrate(model.fn, params, [(x,)], spec)

    def loss(params, ranges):
        return q.fake_quantized(model.fn, spec)(params, ranges, x).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, ranges)
    core.check_finite("loss and gradients", (value, gradients))


def test_a_moving_average_weighs_batches_of_uneven_size():
    # Two images, then half as many: ½ = √¼ is the weight of 4 beside 8. Then twice as many: ¼² is
    # that of 6 beside 2.
    fn, params = lambda params, x: x @ params["w"], {"w": jnp.ones((1, 1))}
    batches = [(jnp.full((n, 1), value),) for n, value in ((2, 4.0), (1, 8.0), (4, 2.0))]
    spec = q.spec(core.trace(fn, params, *batches[0]))
    for count, expected in ((1, 4.0), (2, 6.0), (3, 2.25)):
        found = q.calibrate(fn, params, batches[:count], spec, q.moving_average(0.25))
        np.testing.assert_allclose(found["w"]["activation"].high, expected, rtol=1e-6)


def test_bad_batches(model):
    spec = spec_of(model)
    with pytest.raises(ValueError, match="every batch must hold an example, got none in batch 1"):
        q.calibrate(model.fn, model.params, [(model.x[:0],)], spec)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        q.calibrate(model.fn, model.params, [], spec)
    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got ArrayImpl"):
        q.calibrate(model.fn, model.params, [model.x], spec)
    with pytest.raises(ValueError, match=r"method must be one of .*; did you mean minmax"):
        q.calibrate(model.fn, model.params, [(model.x,)], spec, "minmaks")


@pytest.mark.parametrize(("method", "bad"), [("minmax", np.inf), ("ema", np.nan), ("mse", np.nan)])
def test_not_finite(model, method, bad):
    batches = [(model.x,), (model.x.at[0, 0, 0, 0].set(bad),)]
    expected = "what calibration saw at 'params/stem/kernel' must be finite, got 1 NaN or infinite"
    with pytest.raises(ValueError, match=expected):
        q.calibrate(model.fn, model.params, batches, spec_of(model), method)


def test_sites_in_a_while_loop():
    def fn(params, x):
        return lax.while_loop(lambda x: x.sum() < 5, lambda x: x @ params["w"], x)

    params, x = {"w": jnp.full((1, 1), 2.0)}, jnp.ones((1, 1))
    spec = q.spec(core.trace(fn, params, x))
    with pytest.raises(ValueError, match="outside `while`, got no 'w'"):
        q.calibrate(fn, params, [(x,)], spec)


def two_parts(params, x):
    return jnp.concatenate([x @ params["a"], 10.0 * (x @ params["b"])], -1) @ params["c"]


def plan_of_parts():
    params = {"a": jnp.eye(2), "b": jnp.eye(2), "c": jnp.ones((4, 1))}
    x = jnp.array([[1.0, 1.0], [0.5, 0.25]])
    return q.plan(p.lower(two_parts, params, x), q.spec(core.trace(two_parts, params, x))), x


@pytest.mark.parametrize("method", observers.of_any_bits())
def test_edges_stored_alike_are_seen_side_by_side(method):
    plan, x = plan_of_parts()
    # The parts go to 1 and to 10: however often and in whatever order, the whole goes to 10.
    ranges = q.calibrate_edges(plan, [(x,)] * 4, method)
    span = ranges[plan.slots["concatenate"].name]["activation"]
    np.testing.assert_allclose(span.high, 10.0, rtol=0.02)


def test_edges_stream_over_batches_of_any_size():
    plan, x = plan_of_parts()
    x = jnp.concatenate([x, 3 * x, -x])
    whole = q.calibrate_edges(plan, [(x,)])
    parts = q.calibrate_edges(plan, [(x[:1],), (x[1:3],), (x[3:],)])
    chex.assert_trees_all_equal(whole, parts)
    ends = {name: own["activation"] for name, own in whole.items() if "activation" in own}
    assert tuple(map(float, ends["x"])) == (-1, 3)
    assert tuple(map(float, ends[plan.slots["concatenate"].name])) == (-10, 30)
    # Of the narrower range of every batch, in the order in which they come.
    ema = q.calibrate_edges(plan, [(x[:2],), (x[2:4],)], "ema")
    np.testing.assert_allclose(ema["x"]["activation"].high, 0.9 * 1 + 0.1 * 3, rtol=1e-6)
    assert ema["a"]["weight"].high.shape == (1, 2)


@pytest.mark.parametrize("method", ["percentile", pytest.param("mse", marks=pytest.mark.slow)])
def test_ranges_of_edges_are_searched_as_those_of_sites_are(model, method):
    spec = spec_of(model, weight_bits=4, activation_bits=4)
    plan = q.plan(p.lower(model.fn, model.params, model.x), spec)
    batches = [(model.x[:1],), (model.x[1:],)]
    sites = q.calibrate(model.fn, model.params, batches, spec, method)
    edges = q.calibrate_edges(plan, batches, method)
    for name, slot in plan.stored.items():
        if slot.site is not None:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
                edges[name]["activation"],
                sites[slot.site]["activation"],
            )


def test_bad_batches_of_a_plan():
    plan, x = plan_of_parts()
    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got ArrayImpl"):
        q.calibrate_edges(plan, [x])
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        q.calibrate_edges(plan, [])
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\), got \(2, 1\)"):
        q.calibrate_edges(plan, [(x[:, :1],)])
    with pytest.raises(ValueError, match=r"what calibration saw at '.*' must be finite, got"):
        q.calibrate_edges(plan, [(x.at[0, 0].set(jnp.nan),)])

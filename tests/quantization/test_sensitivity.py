import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax import quantization as q
from hybrid_jax.quantization import stored

STEM, DEPTHWISE, HEAD = (f"params/{name}/kernel" for name in ("stem", "depthwise", "head"))
LABELS = jnp.array([0, 1, 2, 0])


@pytest.fixture(scope="module")
def spec(model):
    return q.spec(core.trace(model.fn, model.params, model.x))


@pytest.fixture(scope="module")
def ranges(model, spec):
    minmax = q.calibrate(model.fn, model.params, [(model.x,)], spec)
    narrower = jax.tree.map(lambda end: end * 0.7, minmax)
    return {2: narrower, 4: minmax}


def test_kl_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2).
    reference, logits = jnp.log(jnp.array([[3.0, 1.0]])), jnp.zeros((1, 2))
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(q.kl_divergence(logits, reference), expected, rtol=1e-5)
    both = jnp.concatenate([reference, logits]), jnp.concatenate([logits, logits])
    np.testing.assert_allclose(q.kl_divergence(both[1], both[0]), expected / 2, rtol=1e-5)


@pytest.mark.parametrize("around", [None, 4])
def test_equals_separate_calls(model, spec, ranges, around):
    """Each entry is one fake-quantized model whose bits are in its spec."""
    graph = core.trace(model.fn, model.params, model.x)
    base = {site.name: {"weight": 4, "activation": 4} for site in graph.sites} if around else None
    found = q.sensitivity(model.fn, model.params, [(model.x,)], spec, ranges, around=base)
    assert list(found) == [STEM, DEPTHWISE, HEAD]
    expected = model.fn(model.params, model.x)
    for site, role, bits in (
        (STEM, "weight", 2),
        (HEAD, "activation", 2),
        (DEPTHWISE, "weight", 4),
    ):
        others = {"weight": around or 32, "activation": around or 32}
        rules = [(site, others | {role: bits}), (".*", others)]
        q_fn = q.fake_quantized(model.fn, q.spec(graph, rules))
        spans = {name: dict(roles) for name, roles in ranges[4].items()}
        spans[site][role] = ranges[bits][site][role]
        alone = q.kl_divergence(q_fn(model.params, spans, model.x), expected)
        np.testing.assert_allclose(found[site][role][bits], alone, rtol=1e-3, atol=1e-6)


def test_damage_is_the_loss_and_the_mean_over_batches(model, spec, ranges):
    def loss(params, x, labels):
        logits = model.fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    halves = [(model.x[:2], LABELS[:2]), (model.x[2:], LABELS[2:])]

    def measure(batches):
        return q.sensitivity(
            loss, model.params, batches, spec, ranges, q.increase, roles=["weight"]
        )

    # The mean loss over four images is the mean of the means over two and two.
    whole, parts = measure([(model.x, LABELS)]), measure(halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)
    assert list(whole[STEM]) == ["weight"]
    bits = {site.name: {"weight": 32, "activation": 32} for site in spec.sites}
    bits[STEM] = {"weight": 2, "activation": 32}
    q_loss = q.fake_quantized(loss, spec)(model.params, ranges[2], model.x, LABELS, bits=bits)
    expected = q_loss - loss(model.params, model.x, LABELS)
    np.testing.assert_allclose(whole[STEM]["weight"][2], expected, rtol=1e-4, atol=1e-6)


def one_weight_rounded_away():
    # At 2 bits −0.4 becomes 0: for x the mean squared error is (0.4 x)² / 2.
    params, span = {"w": jnp.array([[1.0, -0.4]])}, q.Range(jnp.float32(-1), jnp.float32(1))
    rules = [("w", {"weight": q.Quantizer(2), "activation": 32})]

    def fn(params, x):
        return x @ params["w"]

    spec = q.spec(core.trace(fn, params, jnp.ones((1, 1))), rules)
    return fn, params, spec, {2: {"w": {"weight": span}}}


def test_batches_of_uneven_size_are_weighed_by_it():
    fn, params, spec, spans = one_weight_rounded_away()
    ranges = {2: {"w": spans[2]["w"] | {"activation": q.Range(jnp.float32(0), jnp.float32(3))}}}
    x = jnp.array([[1.0], [1.0], [1.0], [3.0]])  # 0.08 thrice and 0.72: 0.24

    def damage(y, reference):
        return jnp.mean((y - reference) ** 2)

    for batches in ([(x,)], [(x[:3],), (x[3:],)], [(x[:1],), (x[1:],)]):
        found = q.sensitivity(fn, params, batches, spec, ranges, damage, roles=["weight"])
        np.testing.assert_allclose(found["w"]["weight"][2], 0.24, rtol=1e-5)


def test_a_batch_without_an_image_is_refused(model, spec, ranges):
    with pytest.raises(ValueError, match="every batch must hold an example, got none in batch 2"):
        q.sensitivity(model.fn, model.params, [(model.x,), (model.x[:0],)], spec, ranges)


def test_sums_do_not_run_in_the_dtype_of_the_parameters():
    # 4099 weights of curvature 2, and 4099 squared errors of 1/16: in bfloat16 8192 and 256.
    params = {"w": jnp.full((1, 4099), 0.25, jnp.bfloat16)}
    trace = q.hessian_trace(lambda p: jnp.sum(p["w"] ** 2), params, key=jax.random.key(0), probes=3)
    assert float(trace["w"]) == 8198
    fn, _, spec, ranges = one_weight_rounded_away()
    x = jnp.ones((1, 1), jnp.bfloat16)
    found = q.hessian_sensitivity(fn, params, (x,), spec, ranges, {"w": jnp.float32(4099)})
    np.testing.assert_allclose(found["w"]["weight"][2], 4099 / 16, rtol=1e-6)


def test_one_compilation_for_all_sites_and_bits(model, spec, ranges):
    traced = []

    def damage(outputs, reference):
        traced.append(1)
        return q.kl_divergence(outputs, reference)

    batches = [(model.x,), (2 * model.x,)]
    q.sensitivity(model.fn, model.params, batches, spec, ranges, damage)
    assert len(traced) == 1


def test_sensitivity_names_what_is_wrong(model, spec, ranges):
    def measure(batches=((model.x,),), ranges=ranges, **kwargs):
        return q.sensitivity(model.fn, model.params, batches, spec, ranges, **kwargs)

    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got ArrayImpl"):
        measure(batches=[jnp.ones((1, 1))])
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        measure(batches=[])
    with pytest.raises(ValueError, match="roles and ranges must not be empty"):
        measure(ranges={})
    with pytest.raises(ValueError, match="roles and ranges must not be empty"):
        measure(roles=())
    with pytest.raises(ValueError, match="did you mean weight"):
        measure(roles=("weights",))
    with pytest.raises(ValueError, match="bits of ranges must be 2 to 8, or 32 for off, got 1"):
        measure(ranges={1: ranges[2]})
    with pytest.raises(ValueError, match="site of around must be one of"):
        measure(around={STEM: {"weight": 4, "activation": 4}})
    eight = {site.name: {"weight": 8, "activation": 4} for site in spec.sites}
    with pytest.raises(
        ValueError, match=f"around must have bits of ranges at '{STEM}', got weight"
    ):
        measure(around=eight)
    with pytest.raises(ValueError, match="damage must be finite, got 1 NaN"):
        measure(batches=[(model.x * jnp.float32(np.nan),)])


def test_trace_of_a_quadratic_by_hand(key):
    # ½ xᵀ A x with A = [[2, 1, 5], [1, 3, −1], [5, −1, 4]] and blocks x = (a, b), a of two entries:
    # traces 2 + 3 and 4. For one v the estimate is 5 + 2·v₁v₂ + v_a · (A_ab v_b).
    matrix = jnp.array([[2.0, 1.0, 5.0], [1.0, 3.0, -1.0], [5.0, -1.0, 4.0]])

    def loss(params):
        x = jnp.concatenate([params["a"], params["b"]])
        return 0.5 * x @ matrix @ x

    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    found = q.hessian_trace(loss, params, key=key, probes=1)
    values = []
    for a, b, c in np.ndindex(2, 2, 2):
        v = 1 - 2 * np.array([a, b, c])
        hv = np.asarray(matrix) @ v
        values.append((v[:2] @ hv[:2], v[2] * hv[2]))
    # The mean over all eight v is the trace; one probe is one of them.
    np.testing.assert_allclose(np.mean(values, axis=0), [5, 4])
    assert (float(found["a"]), float(found["b"])) in values
    # A diagonal Hessian is found by any probe.
    exact = q.hessian_trace(
        lambda p: (p["a"] ** 2 * jnp.arange(2.0)).sum(), params, key=key, probes=1
    )
    assert (float(exact["a"]), float(exact["b"])) == (2.0, 0.0)


def test_trace_is_the_exact_one_in_expectation(key):
    def loss(params, x, y):
        hidden = jnp.tanh(x @ params["a"])
        return jnp.mean((hidden @ params["b"] - y) ** 2)

    keys = jax.random.split(key, 4)
    params = {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4, 2))}
    x, y = jax.random.normal(keys[2], (8, 3)), jax.random.normal(keys[3], (8, 2))
    hessian = jax.hessian(loss)(params, x, y)
    exact = {
        name: np.trace(np.asarray(hessian[name][name]).reshape(leaf.size, leaf.size))
        for name, leaf in params.items()
    }
    probes = 400
    flat, tree = jax.flatten_util.ravel_pytree(params)
    matrix = jax.hessian(lambda flat: loss(tree(flat), x, y))(flat)
    found = q.hessian_trace(loss, params, x, y, key=key, probes=probes)
    # Of one probe the estimate of a block has variance Σ H² off the diagonal, each pair of the
    # block twice; five standard deviations of the mean.
    inside = {"a": slice(0, 12), "b": slice(12, 20)}
    off = np.square(np.asarray(matrix)) * (1 - np.eye(20))
    for name, block in inside.items():
        variance = off[block, :].sum() + off[block, block].sum()
        tolerance = 5 * np.sqrt(variance / probes)
        assert tolerance < 0.5 * abs(exact[name])
        assert abs(float(found[name]) - exact[name]) < tolerance


def test_hessian_sensitivity_by_hand():
    def fn(params, x):
        return x @ params["w"] + params["b"]

    # Per channel at 2 bits: the steps are the largest weights 1 and 2. Errors: 0.4 and −0.5.
    params = {"w": jnp.array([[1.0, 2.0], [0.4, -0.5]]), "b": jnp.ones((1, 2))}
    x = jnp.ones((1, 2))
    spec = q.spec(core.trace(fn, params, x))
    ranges = q.calibrate(fn, params, [(x,)], spec)
    traces = {"w": jnp.float32(8.0), "b": jnp.float32(1.0)}
    found = q.hessian_sensitivity(fn, params, (x,), spec, {2: ranges, 8: ranges}, traces)
    # 8 / 4 · (0.16 + 0.25)
    np.testing.assert_allclose(found["w"]["weight"][2], 0.82, rtol=1e-5)
    assert found["w"]["weight"][8] < 1e-3
    both = lambda params, x: (fn(params, x) * 0.1) @ params["w"]  # noqa: E731
    spec = q.spec(core.trace(both, params, x))
    ranges = q.calibrate(both, params, [(x,)], spec)
    shared = q.hessian_sensitivity(both, params, (x,), spec, {2: ranges}, traces)
    np.testing.assert_allclose(shared["w"]["weight"][2], 0.41, rtol=1e-5)
    np.testing.assert_allclose(shared["w#2"]["weight"][2], 0.41, rtol=1e-5)
    with pytest.raises(ValueError, match="kernel of traces must be one of b, got 'w'"):
        q.hessian_sensitivity(fn, params, (x,), spec, {2: ranges}, {"b": traces["b"]})
    nan = traces | {"w": jnp.float32(np.nan)}
    with pytest.raises(ValueError, match="traces must be finite, got 1 NaN"):
        q.hessian_sensitivity(fn, params, (x,), spec, {2: ranges}, nan)
    with pytest.raises(ValueError, match="ranges must hold the bits to try, got none"):
        q.hessian_sensitivity(fn, params, (x,), spec, {}, traces)


def test_bad_probes(key):
    with pytest.raises(ValueError, match="probes must be an integer of at least 1, got 0"):
        q.hessian_trace(lambda p: p**2, jnp.float32(1.0), key=key, probes=0)


def test_on_a_plan_it_equals_separate_plans():
    """Each damage is that of the plan with these bits, less that of the plan with the most."""
    params = {name: jax.random.normal(jax.random.key(i), (6, 6)) for i, name in enumerate("abc")}
    x = jax.random.normal(jax.random.key(9), (16, 6))

    def fn(params, x):
        y = jax.nn.relu(x @ params["a"])
        return (jax.nn.relu(y @ params["b"]) + y) @ params["c"]

    spec = q.spec(core.trace(fn, params, x))
    net, choices = p.lower(fn, params, x), {"weight": (3, 8), "activation": (4, 8)}

    def at(bits):
        planned = q.plan(net, q.with_bits(spec, bits))
        ranges = q.calibrate_edges(planned, [(x,)])
        y = q.as_deployed(planned)(net.params, ranges, x)
        return planned, ranges, q.kl_divergence(y, fn(params, x))

    planned, ranges, _ = at({name: {"weight": 3, "activation": 4} for name in "abc"})
    # b takes in 4 bits what is added in 8.
    assert [planned.stored[name].quantizer.bits for name in ("a", "a/4 bits")] == [8, 4]
    operations = stored.chosen_operations(planned, choices)
    found = q.plan_sensitivity(
        planned, [(x,)], dict.fromkeys((3, 4, 8), ranges), operations, choices
    )
    _, _, least = at({})
    for name, bits in (("a", {"weight": 3}), ("b", {"activation": 4}), ("c", {"activation": 4})):
        [(role, width)] = bits.items()
        assert found[name][role][8] == 0
        expected = at({name: bits})[2] - least
        np.testing.assert_allclose(found[name][role][width], expected, rtol=1e-3, atol=1e-6)
    # Nothing is measured where there is nothing to choose.
    choices |= {"activation": (8,)}
    found = q.plan_sensitivity(planned, [(x,)], dict.fromkeys((3, 8), ranges), operations, choices)
    assert [list(own) for own in found.values()] == [["weight"]] * 3

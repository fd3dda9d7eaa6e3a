"""Law 5 across the dispatches: run all, gather by expert, one at a time; on linear experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import contrib, core, experts

X = jax.random.normal(jax.random.key(0), (6, 5))
STACK = jax.random.normal(jax.random.key(1), (4, 5, 3))
GATE = jax.random.normal(jax.random.key(2), (5, 4)), jnp.zeros((6, 4))
TARGET = jax.random.normal(jax.random.key(3), (6, 3))


def linear(params, x):
    return x @ params


def shifted(params, x):
    """A linear gate, and what it adds to each input's logits."""
    matrix, shift = params
    return x @ matrix + shift[: len(x)]


def given(weights, x):
    """A gate whose parameters are its outputs."""
    return weights


def as_given(logits, key=None, weight=None):
    """A routing by which the gate gives the weights."""
    return experts.Routed(logits, logits)


def drops_nothing(moe):
    return lambda *args, **kwargs: (*moe(*args, **kwargs), jnp.zeros(4, jnp.int32))


@functools.cache
def compiled(routing, gather, **capacity):
    """Loss, (logits, aux, dropped), and gradients by experts, gate and inputs."""
    if gather:
        capacity = capacity or {"k": 4, "capacity_factor": 1.0}  # all have a place
        moe = contrib.gathered(linear, shifted, routing, method="unroll", **capacity)
    else:
        moe = drops_nothing(experts.mixture(linear, shifted, routing, method="unroll"))

    def loss(stack, gate, x, key):
        logits, aux, dropped = moe(stack, gate, x, key)
        return jnp.square(logits - TARGET).sum(), (logits, aux, dropped)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def close(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


def test_with_room_for_all_it_is_the_mixture(case, key):
    """Outputs, aux and gradients by the experts, the gate and the inputs."""
    got = compiled(case.routing, True)(STACK, GATE, X, key)
    close(got, compiled(case.routing, False)(STACK, GATE, X, key))


@pytest.mark.parametrize("name", ["top_1", "straight", "cost_aware"])
def test_one_at_a_time_is_the_mixture(name, key):
    """The three dispatches, wherever one expert gets weight 1."""
    top_1 = experts.top_k(1)
    costs = jnp.arange(4.0)
    routing, gate_fn = {
        "top_1": (top_1, shifted),
        "straight": (experts.straight_through(top_1), shifted),
        "cost_aware": (
            experts.cost_aware(top_1, costs, 0.5),
            lambda gate, x: shifted(gate, x) - 0.5 * costs[None],
        ),
    }[name]
    edge = experts.one_of([linear] * 4, gate_fn)

    def loss(stack, x):
        logits = edge(list(stack), GATE, x)
        return jnp.square(logits - TARGET).sum(), logits

    (_, got), (by_stack, by_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(STACK, X)
    (_, (want, aux, _)), gradients = compiled(routing, True)(STACK, GATE, X, key)
    assert (experts.usage(aux.weights) > 0).sum() > 1  # or this shows little
    close((got, by_stack), (want, gradients[0]))
    if name != "straight":  # whose gate has a gradient by x too
        close(by_x, gradients[2])


@pytest.mark.parametrize("method", ["vmap", "map", "unroll"])
def test_a_one_hot_gate_is_that_convolution_to_the_bit(method, key):
    net = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(3)])
    images = jax.random.normal(key, (4, 6, 6, 2))
    parameters = [jax.jit(net.init)(jax.random.key(e), images) for e in range(2)]
    moe = contrib.gathered(net.apply, given, capacity_factor=2.0, method=method)
    moe, alone = jax.jit(moe), jax.jit(net.apply)
    for e in range(2):
        gate = jnp.tile(jax.nn.one_hot(e, 2)[None], (4, 1))
        logits, aux, _ = moe(experts.stack(parameters), gate, images)
        np.testing.assert_array_equal(logits, aux.expert_logits[e])
        np.testing.assert_allclose(logits, alone(parameters[e], images), atol=1e-6)


def test_what_is_over_capacity_is_dropped_and_counted():
    # ceil(3/2 * 4 * 1/3) = 2 places. Expert 0 is asked for by all four: it holds inputs 3 (1) and
    # 2 (0.9) and drops two. Expert 1 holds inputs 1 and 0. Expert 2 holds 2, and a filler.
    weights = jnp.array([[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.9, 0.0, 0.1], [1.0, 0.0, 0.0]])
    moe = contrib.gathered(linear, given, as_given, capacity_factor=1.5, method="unroll")
    logits, aux, dropped = jax.jit(moe)(STACK[:3], weights, X[:4])
    np.testing.assert_array_equal(dropped, [2, 0, 0])
    assert dropped.dtype == aux.unrouted.dtype == aux.nan_gates.dtype == jnp.int32
    # Inputs 0 and 1 lose 0.6 and 0.5, and what is left grows to the sum of 1.
    want = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.9, 0.0, 0.1], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(aux.weights, want, rtol=1e-6)
    np.testing.assert_allclose(logits, jnp.einsum("be,bi,eio->bo", want, X[:4], STACK[:3]), 1e-4)
    assert (aux.unrouted, aux.nan_gates) == (0, 0)


def test_what_everyone_drops_is_zero_and_counted(key):
    # All six choose expert 2, which has ceil(6/4) = 2 places: those of the lowest index.
    gate = jnp.zeros((6, 4)).at[:, 2].set(5.0)
    moe = jax.jit(contrib.gathered(linear, given, capacity_factor=1.0, method="map"))
    logits, aux, dropped = moe(STACK, gate, X)
    np.testing.assert_array_equal(dropped, [0, 0, 4, 0])
    assert aux.unrouted == 4
    np.testing.assert_array_equal(aux.weights, jnp.zeros((6, 4)).at[:2, 2].set(1))
    np.testing.assert_allclose(logits[:2], X[:2] @ STACK[2], rtol=1e-5)
    np.testing.assert_array_equal(logits[2:], 0)


def test_an_even_load_drops_nothing_and_runs_no_more():
    shapes = []

    def expert(params, x):
        shapes.append(x.shape)
        return x @ params

    gate = 9 * jax.nn.one_hot(jnp.array([3, 1, 0, 2, 1, 0, 2, 3]), 4)
    x = jnp.concatenate([X, X[:2]])

    def loss(moe):
        def fn(stack):
            logits, aux, dropped = moe(stack, gate, x)
            return jnp.square(logits).sum(), (logits, aux.weights, dropped, aux.unrouted)

        return jax.jit(jax.value_and_grad(fn, has_aux=True))(STACK)

    few = loss(contrib.gathered(expert, given, capacity_factor=1.0, method="unroll"))
    assert set(shapes) == {(2, 5)}  # 8 inputs, 4 experts
    close(few, loss(drops_nothing(experts.mixture(linear, given, method="unroll"))), 1e-4)


def test_expert_choice_never_drops(key):
    routing = contrib.expert_choice(2, 0.7)  # ceil(0.7 * 6 * 2/4) = 3 places of 6
    (_, (logits, aux, dropped)), gradients = compiled(routing, True, k=2, capacity_factor=0.7)(
        STACK, GATE, X, key
    )
    (_, (want, full, _)), all_gradients = compiled(routing, False)(STACK, GATE, X, key)
    np.testing.assert_array_equal(dropped, 0)
    assert aux.unrouted == full.unrouted
    close((logits, aux.weights, gradients), (want, full.weights, all_gradients))


def test_nan_comes_out_as_nan_and_takes_no_place():
    # Two experts of ceil(4/2) = 2 places. Inputs 0, 1 and 2 choose expert 0, but 0 has a NaN.
    gate = jnp.array([[2.0, jnp.nan], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    moe = jax.jit(contrib.gathered(linear, given, capacity_factor=1.0, method="unroll"))
    logits, aux, dropped = moe(STACK[:2], gate, X[:4])
    assert np.isnan(logits[0]).all()
    np.testing.assert_allclose(logits[1:3], X[1:3] @ STACK[0], rtol=1e-5)
    np.testing.assert_allclose(logits[3], X[3] @ STACK[1], rtol=1e-5)
    np.testing.assert_array_equal(dropped, 0)
    assert (aux.unrouted, aux.nan_gates) == (0, 1)


@pytest.mark.parametrize("gather", [True, False])
def test_nan_is_counted_in_every_dispatch(gather, case, key):
    gate = GATE[0], GATE[1].at[4, 1].set(jnp.nan)
    (_, (logits, aux, _)), _ = compiled(case.routing, gather)(STACK, gate, X, key)
    np.testing.assert_array_equal(jnp.isnan(logits).all(1), jnp.arange(6) == 4)
    np.testing.assert_array_equal(jnp.isnan(logits).any(1), jnp.arange(6) == 4)
    assert aux.nan_gates == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_inputs_than_experts(batch):
    x = X[:batch]
    mixture = experts.mixture(linear, shifted, method="unroll")
    gathered = contrib.gathered(linear, shifted, capacity_factor=1.0, method="unroll")
    edge = experts.one_of([linear] * 4, shifted)
    want, aux = jax.jit(mixture)(STACK, GATE, x)
    assert (experts.usage(aux.weights) > 0).sum() == batch  # each has its own expert
    got, _, dropped = jax.jit(gathered)(STACK, GATE, x)
    np.testing.assert_array_equal(dropped, 0)
    close((got, jax.jit(edge)(list(STACK), GATE, x)), (want, want))


def test_no_second_compilation():
    moe = jax.jit(contrib.gathered(linear, given, method="auto"))
    moe(STACK, TARGET[:, :1] + jnp.arange(4.0)[None], X)
    moe(STACK + 1, jnp.zeros((6, 4)), X - 1)
    assert moe._cache_size() == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="capacity_factor must be a finite number above 0, got 0"):
        contrib.gathered(linear, linear, capacity_factor=0)
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        contrib.gathered(linear, linear, k=0)
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, 4\], got 5"):
        contrib.gathered(linear, given, k=5)(STACK, jnp.zeros((6, 4)), X)
    with pytest.raises(ValueError, match=r"gate_fn must return shape \(6, 4\), got \(6, 3\)"):
        contrib.gathered(linear, given)(STACK, jnp.zeros((6, 3)), X)
    with pytest.raises(ValueError, match="batch must be an integer of at least 1, got 0"):
        contrib.gathered(linear, given)(STACK, jnp.zeros((0, 4)), X[:0])


@pytest.mark.parametrize("factor", [0.1, 0.7, 1.1, 1.25, 2.3])
def test_capacity_reads_decimals(factor):
    # Of 1000 inputs and 10 experts: factor * 100, a whole number, that floats may overshoot.
    assert contrib.capacity(1000, 10, factor=factor) == round(factor * 100)
    assert contrib.capacity(1001, 10, factor=factor) == round(factor * 100) + 1


def spread(x, fill=jnp.nan):
    """Inputs (6, ...) among padding, at 0, 2, 3, 5, 6 and 8 of 9."""
    return jnp.full((9, *x.shape[1:]), fill).at[REAL].set(x)


REAL = jnp.array([0, 2, 3, 5, 6, 8])
WEIGHT = jnp.zeros(9).at[REAL].set(0.5)


@pytest.mark.parametrize("gather", [True, False])
def test_padding_takes_no_part(gather, case, key):
    """Outputs, counts and gradients of the inputs are theirs alone, and the padding is NaN.

    Drawn noise depends on the shape of the batch, so no key; an expert has ceil(6/4) = 2 places,
    where nine inputs would have three.
    """
    key = key if case.chooser == "chance" else None
    if gather:
        moe = contrib.gathered(linear, linear, case.routing, capacity_factor=1.0, method="unroll")
    else:
        moe = drops_nothing(experts.mixture(linear, linear, case.routing, method="unroll"))

    def loss(stack, gate, x, weight):
        logits, aux, dropped = moe(stack, gate, x, key, weight=weight)
        return (logits**2).sum(), (logits, aux, dropped)

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (want, alone, over)), gradients = run(STACK, GATE[0], X, None)
    (_, (got, aux, dropped)), padded = run(STACK, GATE[0], spread(X), WEIGHT)
    np.testing.assert_array_equal(aux.weights, core.selected(aux.weights, WEIGHT))
    if case.chooser == "chance":  # others are drawn
        assert np.isfinite(got).all()
        assert (aux.weights.sum(1) > 0).sum() + aux.unrouted == 6
        return
    close(got, spread(want, 0.0))
    close(padded, gradients, 1e-4)
    np.testing.assert_array_equal(dropped, over)
    for counts in ("unrouted", "nan_gates"):
        np.testing.assert_array_equal(getattr(aux, counts), getattr(alone, counts))
    assert not gather or case.most < 4 or over.sum() > 0 or case.chooser == "expert"
    close(aux.expert_logits[:, REAL], alone.expert_logits)


def test_a_stem_sees_no_padding_either():
    """A stem that makes NaN of an empty image; its gradient is that of the image alone."""
    unit = lambda scale, x: scale * x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    moe = experts.shared_stem(unit, experts.mixture(linear, linear, experts.soft(), "unroll"))
    images = jnp.array([[3.0, 4.0], [0.0, 0.0]])

    def loss(scale, x, weight):
        return moe(scale, STACK[:, :2], GATE[0][:2], x, weight=weight)[0].sum()

    gradient = jax.grad(loss)(2.0, images, jnp.array([1, 0]))
    np.testing.assert_allclose(gradient, jax.grad(loss)(2.0, images[:1], None), rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "shape"),
    [(4, (4, 4, 4, 1)), (4, (1, 4, 6, 1)), (2, (1, 1, 4, 1)), (2, (3, 5, 6, 1)), (3, (3,))],
)
def test_maps_of_any_rank_are_weighed_by_input(count, shape, key):
    """Expert e gives (e + 1) x; the gate takes the last for a mean of x above 0, else the first."""
    x = jax.random.normal(key, shape)
    level = x.reshape(len(x), -1).mean(1)
    wide = level.reshape(-1, *(1 for _ in shape[1:]))
    want = jnp.where(wide > 0, count * x, x)
    gate = lambda params, x: (  # noqa: E731
        x.reshape(len(x), -1).mean(1)[:, None] * jnp.arange(count, dtype=x.dtype)[None]
    )
    scaled = lambda w, x: w * x  # noqa: E731
    stack = jnp.arange(1.0, count + 1)
    for moe in (
        experts.mixture(scaled, gate, method="unroll"),
        contrib.gathered(scaled, gate, capacity_factor=float(count), method="unroll"),
    ):
        np.testing.assert_allclose(moe(stack, None, x)[0], want, rtol=1e-6)
    edge = experts.one_of([scaled] * count, gate)(list(stack), None, x)
    np.testing.assert_allclose(edge, want, rtol=1e-6)


def test_outputs_that_no_weights_fit_are_named():
    with pytest.raises(ValueError, match=r"leading axes \(2, 3\), .* got shape \(2, 4, 3\)"):
        experts.combine(jnp.zeros((2, 4, 3)), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"must have shape \(E, B, N\), got \(2, 3, 4, 5\)"):
        experts.cascade(jnp.zeros((2, 3, 4, 5)), 0.5)
    with pytest.raises(ValueError, match=r"must have shape \(E, 3, N\), got \(2, 3, 4, 5\)"):
        experts.oracle(jnp.zeros((2, 3, 4, 5)), jnp.zeros(3, jnp.int32))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import experts


class Net(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.features, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


NET = Net()
GATE = experts.gate_cnn(3, features=())
METHODS = ["vmap", "map", "unroll"]


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (6, 6, 6, 2))


@pytest.fixture(scope="module")
def parameters(images):
    init = jax.jit(NET.init)
    return [init(jax.random.key(e), images) for e in range(3)]


@pytest.fixture(scope="module")
def gate_params(images):
    return jax.jit(GATE.init)(jax.random.key(9), images)


def named(expert, x):
    """A gate whose parameter is the number of the expert that it always names."""
    return jnp.tile(1000 * jax.nn.one_hot(expert, 3)[None], (len(x), 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "routing",
    [experts.soft(), experts.top_k(1), experts.straight_through(experts.top_k(1))],
    ids=["soft", "top_1", "straight"],
)
def test_one_hot_gate_is_that_expert_to_the_bit(method, routing, parameters, images):
    """Law 5, within one compilation."""
    moe = jax.jit(experts.mixture(NET.apply, named, routing, method))
    alone = jax.jit(NET.apply)
    for expert in range(3):
        logits, aux = moe(experts.stack(parameters), expert, images)
        np.testing.assert_array_equal(logits, aux.expert_logits[expert])
        np.testing.assert_allclose(logits, alone(parameters[expert], images), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_one_hot_gate_has_that_experts_gradient(method, parameters, images):
    moe = experts.mixture(NET.apply, named, experts.top_k(1), method)

    def loss(stack):
        return jnp.square(moe(stack, 1, images)[0]).sum()

    got = experts.unstack(jax.jit(jax.grad(loss))(experts.stack(parameters)))
    alone = jax.jit(jax.grad(lambda params: jnp.square(NET.apply(params, images)).sum()))
    want = alone(parameters[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got[1], want)
    assert all((leaf == 0).all() for e in (0, 2) for leaf in jax.tree.leaves(got[e]))


@pytest.mark.parametrize(
    "routing", [experts.soft(), experts.top_k(1), experts.top_k(2), experts.noisy_top_k(2)]
)
def test_identical_experts_are_one_expert(routing, parameters, gate_params, images, key):
    moe = experts.mixture(NET.apply, GATE.apply, routing, "unroll")

    def loss(stack):
        logits = moe(stack, gate_params, images, key)[0]
        return jnp.square(logits).sum(), logits

    def alone(params):
        logits = NET.apply(params, images)
        return jnp.square(logits).sum(), logits

    stacked = experts.stack(parameters[:1] * 3)
    (_, got), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(stacked)
    (_, want), one = jax.jit(jax.value_and_grad(alone, has_aux=True))(parameters[0])
    np.testing.assert_allclose(got, want, atol=1e-6)
    # The gradient of the one expert is shared out among its copies.
    total = jax.tree.map(lambda leaf: leaf.sum(0), gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), total, one)


def test_the_edge_gives_what_the_mixture_gives(parameters, gate_params, images):
    moe = experts.mixture(NET.apply, GATE.apply, method="unroll")
    edge = jax.jit(experts.one_of([NET.apply] * 3, GATE.apply))
    logits, aux = jax.jit(moe)(experts.stack(parameters), gate_params, images)
    assert (experts.usage(aux.weights) > 0).sum() > 1  # or this shows little
    np.testing.assert_allclose(edge(parameters, gate_params, images), logits, atol=1e-6)
    each = [edge(parameters, gate_params, image[None])[0] for image in images]
    np.testing.assert_allclose(each, logits, atol=1e-6)


def test_the_edge_runs_one_expert(images):
    ran = []

    def expert(e):
        def fn(params, x):
            jax.debug.callback(lambda: ran.append(e))
            return params * x.mean((1, 2))

        return fn

    edge = jax.jit(experts.one_of([expert(e) for e in range(3)], lambda gate, x: x[:, 0, 0] @ gate))
    gate = jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    x = jnp.zeros((3, 2, 2, 2)).at[0, ..., 0].set(1.0).at[1, ..., 1].set(1.0).at[2, ..., 0].set(2.0)
    jax.block_until_ready(edge([jnp.float32(e) for e in range(3)], gate, x[:1]))
    jax.effects_barrier()
    assert ran == [2]
    got = edge([jnp.float32(e) for e in range(3)], gate, x)
    jax.effects_barrier()
    assert ran == [2, 2, 1, 2]
    np.testing.assert_array_equal(got, [[2, 0], [0, 1], [4, 0]])


def test_the_edge_takes_experts_of_different_shape(images, gate_params):
    nets = [Net(2), Net(4), Net(8)]
    params = [jax.jit(net.init)(jax.random.key(1), images) for net in nets]
    edge = experts.one_of([net.apply for net in nets], GATE.apply)
    got = jax.jit(edge)(params, gate_params, images)
    chosen = jnp.argmax(jax.jit(GATE.apply)(gate_params, images), -1)
    each = [jax.jit(net.apply)(p, images) for net, p in zip(nets, params, strict=True)]
    want = [each[e][i] for i, e in enumerate(chosen)]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_nan_gate_logits_come_out_as_nan(parameters, images):
    def gate(_, x):
        return jnp.zeros((len(x), 3)).at[:, 1].set(jnp.where(x[:, 0, 0, 0] > 5, jnp.nan, 1.0))

    images = images.at[2].set(9.0)
    moe = jax.jit(experts.mixture(NET.apply, gate, method="unroll"))
    logits, _ = moe(experts.stack(parameters), {}, images)
    edge = jax.jit(experts.one_of([NET.apply] * 3, gate))(parameters, {}, images)
    for got in (logits, edge):
        np.testing.assert_array_equal(jnp.isnan(got).all(1), jnp.arange(6) == 2)
        np.testing.assert_array_equal(jnp.isnan(got).any(1), jnp.arange(6) == 2)


def test_a_mixture_of_one_is_that_expert(parameters, images):
    gate = experts.gate_cnn(1, features=())
    gate_params = jax.jit(gate.init)(jax.random.key(0), images)
    moe = jax.jit(experts.mixture(NET.apply, gate.apply))
    edge = jax.jit(experts.one_of([NET.apply], gate.apply))
    want = jax.jit(NET.apply)(parameters[0], images)
    logits, _ = moe(experts.stack(parameters[:1]), gate_params, images)
    np.testing.assert_allclose(logits, want, atol=1e-6)
    np.testing.assert_allclose(edge(parameters[:1], gate_params, images), want, atol=1e-6)


def test_no_second_compilation(parameters, gate_params, images):
    moe = jax.jit(experts.mixture(NET.apply, GATE.apply, method="auto"))
    moe(experts.stack(parameters), gate_params, images)
    moe(experts.stack(parameters[::-1]), gate_params, images + 1)
    assert moe._cache_size() == 1


def test_bad_arguments(parameters, images):
    moe = experts.mixture(NET.apply, lambda _, x: jnp.zeros((len(x), 4)), method="map")
    with pytest.raises(ValueError, match=r"gate_fn must return shape \(6, 3\), got \(6, 4\)"):
        moe(experts.stack(parameters), {}, images)
    edge = experts.one_of([NET.apply] * 3, lambda _, x: jnp.zeros((len(x), 2)))
    with pytest.raises(ValueError, match=r"gate_fn must return shape \(1, 3\), got \(1, 2\)"):
        edge(parameters, {}, images)
    with pytest.raises(ValueError, match="params_list must hold 3 pytrees, got 2"):
        edge(parameters[:2], {}, images)
    edge = experts.one_of([lambda p, x: x, lambda p, x: x[:, :2]], lambda g, x: g)
    message = r"expert_fns\[1\] must return float32\[1, 3\] as the first does, got float32\[1, 2\]"
    with pytest.raises(ValueError, match=message):
        edge([0, 0], jnp.zeros((1, 2)), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="expert_fns must hold at least 1 function, got 0"):
        experts.one_of([], GATE.apply)


def test_combine_takes_the_weights_of_every_control(key):
    logits = jax.random.normal(key, (3, 5, 4))
    average = experts.combine(logits, jnp.full((5, 3), 1 / 3))
    np.testing.assert_allclose(average, logits.mean(0), atol=1e-6)
    labels = jnp.array([0, 1, 2, 3, 0])
    best = experts.combine(logits, experts.oracle(logits, labels)).argmax(-1) == labels
    np.testing.assert_array_equal(best, (logits.argmax(-1) == labels[None]).any(0))

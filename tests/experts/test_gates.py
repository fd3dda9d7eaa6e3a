import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import core, cost, experts, pruning, quantization
from hybrid_jax import program as p


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (1, 8, 8, 1), (3, 28, 20, 3), (1, 5, 5, 1)])
def test_any_image_size(shape, key):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    logits, _ = jax.eval_shape(experts.gate_cnn(4).init_with_output, key, images)
    assert logits.shape == (shape[0], 4)


def test_sees_the_image_averaged_down(key):
    # 16x16 at size 8: each 2x2 block counts by its mean alone.
    gate = experts.gate_cnn(3, size=8)
    small = jax.random.normal(key, (2, 8, 8, 1))
    large = small.repeat(2, 1).repeat(2, 2)
    ripple = jnp.tile(jnp.array([[1.0, -1.0], [-1.0, 1.0]])[None, :, :, None], (2, 8, 8, 1))
    apply = jax.jit(gate.apply)
    params = jax.jit(gate.init)(key, large)
    want = apply(params, small)
    np.testing.assert_allclose(apply(params, large), want, atol=1e-5)
    np.testing.assert_allclose(apply(params, large + ripple), want, atol=1e-5)
    assert float(jnp.abs(want[0] - want[1]).max()) > 1e-3


@pytest.mark.parametrize("name", experts.GATES)
def test_bad_arguments(name):
    make = experts.GATES[name]
    with pytest.raises(ValueError, match="num_experts must be an integer of at least 1, got 0"):
        make(0, (8,), 8)
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        make(2, (8,), 0)
    if name != "linear":
        with pytest.raises(ValueError, match="features must be an integer of at least 1, got 0"):
            make(2, (8, 0), 8)


# Of 16×16 pixels averaged down to 4×4, one channel, features (8, 16), 3 experts.
MACS = {
    "cnn": 16 * 9 * 8 + 4 * 9 * 8 * 16 + 16 * 3,
    "separable": 16 * 9 * 8 + 4 * 9 * 8 + 4 * 8 * 16 + 16 * 3,
    "mlp": 16 * 8 + 8 * 16 + 16 * 3,
    "linear": 16 * 3,
}


@pytest.mark.parametrize("name", experts.GATES)
def test_contract_of_every_gate(name, key):
    """It sees means of 4×4 pixels alone, costs what is counted by hand, and runs in integers."""
    gate, small = experts.GATES[name](3, (8, 16), 4), jax.random.normal(key, (8, 4, 4, 1))
    images = small.repeat(4, 1).repeat(4, 2)
    params = jax.jit(gate.init)(key, images)
    wanted = jax.jit(gate.apply)(params, images)
    np.testing.assert_allclose(jax.jit(gate.apply)(params, small), wanted, atol=1e-5)
    assert len(np.unique(np.round(wanted, 4))) == wanted.size
    graph = core.trace(gate.apply, params, images)
    assert cost.count(graph).macs == MACS[name]
    planned = quantization.plan(p.lower(gate.apply, params, images), quantization.spec(graph))
    ranges = quantization.calibrate_edges(planned, [(images,)])
    got = jax.jit(p.run(quantization.encode(planned, ranges, images)))(images)
    np.testing.assert_allclose(got, wanted, atol=0.05 * float(jnp.abs(wanted).max()))


def test_head_on_features_is_linear_in_the_mean_of_each_channel(key):
    gate = experts.gate_cnn(3, features=(), size=1)
    features = jax.random.normal(key, (2, 6, 4, 5))
    params = gate.init(key, features)
    head = params["params"]["Dense_0"]
    want = features.mean((1, 2)) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(gate.apply(params, features), want, atol=1e-6)


class NNXGate(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


class LinenGate(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(6, (3, 3))(x)).mean((1, 2)))


def nnx_gate(x):
    graph, params = nnx.split(NNXGate(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), params


def linen_gate(x):
    gate = LinenGate()
    return gate.apply, jax.jit(gate.init)(jax.random.key(0), x)


def shipped_gate(x):
    gate = experts.gate_cnn(3, features=(6,), size=4)
    return gate.apply, jax.jit(gate.init)(jax.random.key(0), x)


def stem_fn(kernel, x):
    layout = ("NHWC", "HWIO", "NHWC")
    return nn.relu(
        jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    )


def probe_gate(x):
    stem = jax.random.normal(jax.random.key(0), (3, 3, 2, 6)) / 3

    def features_fn(params, x):
        return stem_fn(params, x).mean((1, 2))

    head = experts.ridge(features_fn(stem, x), jnp.eye(3)[jnp.arange(len(x)) % 3])
    return experts.linear_probe(features_fn), {"features": stem, "head": head}


# gate(x) -> (gate_fn, gate_params), each of 6 channels at 4x4 pixels before a dense layer to 3.
KINDS = {"linen": linen_gate, "nnx": nnx_gate, "gate_cnn": shipped_gate, "probe": probe_gate}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (12, 4, 4, 2))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_any_function_is_a_gate_of_both_mixtures(make, images):
    drawn_fn, gate_params = make(images)
    # As drawn, a gate may prefer one expert for all images.
    level = drawn_fn(gate_params, images).mean(0, keepdims=True)
    stack = jax.random.normal(jax.random.key(2), (3, 2, 5))

    def gate_fn(gate_params, x):
        return drawn_fn(gate_params, x) - level

    def expert_fn(params, x):
        return x.mean((1, 2)) @ params

    logits, aux = jax.jit(experts.mixture(expert_fn, gate_fn, method="vmap"))(
        stack, gate_params, images
    )
    edge = jax.jit(experts.one_of([expert_fn] * 3, gate_fn))
    np.testing.assert_allclose(edge(list(stack), gate_params, images), logits, atol=1e-5)
    np.testing.assert_allclose(aux.gate_logits, gate_fn(gate_params, images), atol=1e-5)
    assert len(np.unique(aux.weights.argmax(1))) > 1


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_counted_pruned_and_quantized_as_any_model(make, images):
    gate_fn, params = make(images)
    graph = core.trace(gate_fn, params, images)
    # 4·4 positions · 9 taps · 2 · 6 + 6 · 3
    whole = cost.count(graph)
    assert whole.macs == 1728 + 18

    # Half of the 6 channels leave: 864 + 9 MACs.
    scores = pruning.group_scores(pruning.magnitude(graph.kernels, params), graph.groups)
    (group,) = graph.groups
    keep = {group.name: scores[group.name] >= jnp.median(scores[group.name])}
    masks = core.expand(jax.tree.map(np.asarray, keep), graph.groups, params)
    small_fn, small_params, certificate = core.shrink(gate_fn, params, masks, images)
    assert certificate.macs == (1746, 873)
    assert certificate.difference < 1e-5
    assert small_fn(small_params, images).shape == (12, 3)

    # At 8 bits: bytes of the integers, of a scale for each channel, and of what is left in floats.
    spec = quantization.spec(graph, weight_bits=8, activation_bits=8)
    ranges = quantization.calibrate(gate_fn, params, [(images,)], spec)
    quantized = quantization.fake_quantized(gate_fn, spec)(params, ranges, images)
    exact = gate_fn(params, images)
    assert 0 < np.abs(quantized - exact).max() < 0.05 * np.abs(exact).max()
    counted = cost.count(graph, None, spec.weight_bits, spec.activation_bits)
    assert counted.bops == 1746 * 8 * 8
    biases = whole.parameters - 108 - 18
    assert counted.bytes == 108 + 6 * 4 + 18 + 3 * 4 + 4 * biases


def test_stem_runs_once_for_gate_and_experts(images):
    key = jax.random.key(3)
    stem = jax.random.normal(key, (3, 3, 2, 6)) / 3
    stack = jax.random.normal(jax.random.key(4), (3, 6, 5))
    gate = experts.gate_cnn(3, features=(), size=1)
    gate_params = gate.init(key, stem_fn(stem, images))

    def expert_fn(params, features):
        return features.mean((1, 2)) @ params

    moe = experts.mixture(expert_fn, gate.apply, experts.noisy_top_k(2), method="vmap")
    whole = experts.shared_stem(stem_fn, moe)
    got = jax.jit(whole)(stem, stack, gate_params, images, key=key)
    want = jax.jit(moe)(stack, gate_params, stem_fn(stem, images), key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    assert str(jax.make_jaxpr(whole)(stem, stack, gate_params, images)).count("conv_general") == 1

    edge = experts.shared_stem(stem_fn, experts.one_of([expert_fn] * 3, gate.apply))
    top = experts.shared_stem(stem_fn, experts.mixture(expert_fn, gate.apply, method="vmap"))
    logits, _ = top(stem, stack, gate_params, images)
    np.testing.assert_allclose(edge(stem, list(stack), gate_params, images), logits, atol=1e-5)


def test_ridge_by_hand():
    # x = -1, 0, 1 about its mean 2; variance 2/3, so that λ = 0.5 · 2/3 = 1/3. Covariance with
    # y = 0, 3, 6 about 3: (3 + 0 + 3) / 3 = 2. W = 2 / (2/3 + 1/3) = 2, b = 3 - 2 · 2 = -1.
    head = experts.ridge(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[0.0], [3.0], [6.0]]), 0.5)
    np.testing.assert_allclose(head["kernel"], [[2.0]], rtol=1e-6)
    np.testing.assert_allclose(head["bias"], [-1.0], rtol=1e-6)


def test_ridge_weighs_inputs():
    # Weights 1, 2 and 0 are inputs 1, 2 and 2, and what is NaN counts for nothing.
    x, targets = jnp.array([[1.0], [2.0], [jnp.nan]]), jnp.array([[0.0], [3.0], [jnp.nan]])
    got = experts.ridge(x, targets, 0.5, weight=jnp.array([1.0, 2.0, 0.0]))
    index = jnp.array([0, 1, 1])
    want = experts.ridge(x[index].astype(jnp.bfloat16), targets[index].astype(jnp.bfloat16), 0.5)
    for name, leaf in want.items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(got[name], leaf, rtol=1e-5)


def test_ridge_is_the_least_of_its_loss_at_any_scale(key):
    x = jax.random.normal(key, (40, 2, 3)) * 5 + 2
    targets = jax.random.normal(jax.random.key(1), (40, 4))
    flat, penalty = x.reshape(40, 6), 0.1
    weight = penalty * flat.var(0).mean()

    def loss(head):
        error = flat @ head["kernel"] + head["bias"][None] - targets
        return jnp.square(error).sum() / 40 + weight * jnp.square(head["kernel"]).sum()

    head = jax.jit(experts.ridge)(x, targets, penalty)
    for slope in jax.tree.leaves(jax.grad(loss)(head)):
        np.testing.assert_allclose(slope, 0, atol=1e-4)
    scaled = experts.ridge(1000 * x, targets, penalty)
    np.testing.assert_allclose(1000 * scaled["kernel"], head["kernel"], rtol=1e-3, atol=1e-6)


def test_ridge_of_degenerate_features():
    targets = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    constant = jnp.full((4, 3), 7.0)
    head = experts.ridge(constant, targets)
    np.testing.assert_array_equal(head["kernel"], 0)
    np.testing.assert_array_equal(head["bias"], 0.5)
    twice = experts.ridge(jnp.repeat(targets[:, :1], 2, 1), targets, 1e-6)  # singular covariance
    np.testing.assert_allclose(twice["kernel"], [[0.5, -0.5]] * 2, atol=1e-3)
    assert np.isnan(experts.ridge(constant.at[0, 0].set(jnp.nan), targets)["kernel"]).all()


def test_ridge_bad_arguments():
    with pytest.raises(ValueError, match=r"targets must have shape \(4, E\).* got \(3, 2\)"):
        experts.ridge(jnp.ones((4, 3)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"targets must have shape \(4, E\).* got \(4,\)"):
        experts.ridge(jnp.ones((4, 3)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"features must hold at least one value, got shape \(0,"):
        experts.ridge(jnp.ones((0, 3)), jnp.ones((0, 2)))


def test_probe_on_the_parent_finds_the_better_expert(digits):
    """Expert e knows the classes of its half only; the parent's probabilities tell which."""
    half = jnp.where(jnp.arange(10) < 5, 0.0, -20.0)

    def log_probabilities(images, labels):
        logits = digits.fn(digits.params, images)
        expert_logits = jnp.stack([logits + half[None], logits + half[None, ::-1]])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(expert_logits), labels[None, :, None], 2)
        return chosen[..., 0].T

    def features_fn(params, images):
        return jax.nn.softmax(digits.fn(params, images))

    gate_fn = experts.linear_probe(features_fn)
    targets = log_probabilities(digits.images, digits.labels)
    head = experts.ridge(features_fn(digits.params, digits.images), targets)
    gate_params = {"features": digits.params, "head": head}
    chosen = gate_fn(gate_params, digits.held_out_images).argmax(1)
    best = log_probabilities(digits.held_out_images, digits.held_out_labels).argmax(1)
    assert 0.3 < best.mean() < 0.7
    assert (chosen == best).mean() > 0.9

"""Networks as they were written, taken, cut, quantized, trained and lowered."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strangers
from flax import nnx

import hybrid_jax as hj
from hybrid_jax import core, models, quantization

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
KEY = jax.random.key(3)


@functools.cache
def taken(name):
    return models.take(strangers.GIVEN[name](), X)


@functools.cache
def halved(name):
    """(predict, train, params, kept) of the first half of every group's channels."""
    network = taken(name)
    graph = core.trace(network.predict, network.params, X)
    keep = {group.name: np.arange(group.size) < group.size // 2 for group in graph.groups}
    masks = core.expand(keep, graph.groups, network.params)
    predict, params, certificate = core.shrink(network.predict, network.params, masks, X)
    assert certificate.difference < 1e-5
    train = core.narrow(network.train, network.params, certificate.kept)
    return predict, train, params, certificate.kept


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Linen", {"moments/norm/second"}),
        ("NNX", {"norm/mean", "norm/var"}),
        ("functions", {"mean"}),
    ],
)
def test_statistics_are_what_training_moves(name, expected):
    network = taken(name)
    assert models.statistics(network, X) == expected
    jitted = network._replace(train=jax.jit(network.train))
    assert models.statistics(jitted, X) == expected


@pytest.mark.parametrize("name", strangers.GIVEN)
def test_modes(name):
    predict, train, params = taken(name)
    run = jax.jit(train)
    (out, new), (again, _), (other, _) = (run(params, X, k) for k in (KEY, KEY, jax.random.key(4)))
    np.testing.assert_array_equal(out, again)
    assert jnp.abs(out - other).max() > 1e-3
    core.check_same_structure("new", params, new)
    moved = {p for p, leaf in core.flatten_paths(new).items() if not _equal(params, p, leaf)}
    assert moved == models.statistics(taken(name), X)
    one = jax.jit(predict)(params, X[:1])
    np.testing.assert_allclose(one, jax.jit(predict)(params, X)[:1], atol=1e-5)


def _equal(params, path, leaf):
    return np.array_equal(core.flatten_paths(params)[path], leaf)


@pytest.mark.parametrize("name", strangers.GIVEN)
def test_masked_equals_shrunk_in_training_too(name):
    """What is drawn is drawn whole and then cut, so that the small network has the same masks."""
    network = taken(name)
    _, train, small, kept = halved(name)
    assert all(small_leaf.size for small_leaf in jax.tree.leaves(small))
    out, new = jax.jit(train)(small, X, KEY)
    masked = core.mask_removed(network.params, kept)
    expected, changed = jax.jit(network.train)(masked, X, KEY)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    changed = core.slice_tree(changed, kept)
    for path, leaf in core.flatten_paths(changed).items():
        np.testing.assert_allclose(core.flatten_paths(new)[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", strangers.GIVEN)
def test_quantized_training_and_lowering(name):
    predict, train, params, _ = halved(name)
    spec = quantization.spec(core.trace(predict, params, X), weight_bits=4)
    ranges = quantization.calibrate(predict, params, [(X,)], spec)
    quantized = quantization.fake_quantized(train, spec)

    def loss(params):
        out, new = quantized(params, ranges, X, KEY)
        return (out**2).mean(), new

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, new), gradients = step(params)
    stays = models.statistics(models.Network(predict, train, params), X)
    stepped = core.map_with_path(
        lambda path, leaf, moved, g: moved if path in stays else leaf - 0.05 * g,
        params,
        new,
        gradients,
    )
    assert step(stepped)[0][0] < value
    # The images are quantized by the first convolution.
    assert abs((jax.jit(train)(params, X, KEY)[0] ** 2).mean() - value) > 1e-6
    program = hj.lower(predict, stepped, X)  # which compares it with the function
    assert len(program.params) >= 3


class Normed(nn.Module):
    """A BatchNorm whose mode is an attribute."""

    use_running_average: bool | None = None
    odd: bool = False

    @nn.compact
    def __call__(self, x):
        training = self.odd or self.use_running_average is False
        return nn.BatchNorm(use_running_average=not training)(x)


class Frozen(nn.Module):
    """Its mode has a name that nobody knows."""

    @nn.compact
    def __call__(self, x, frozen=True):
        return nn.BatchNorm(use_running_average=frozen)(x)


class FrozenNNX(nnx.Module):
    """The same, where what tells its BatchNorm stands above what `train()` sets."""

    def __init__(self):
        self.norm, self.frozen = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), True

    def __call__(self, x):
        return self.norm(x, use_running_average=self.frozen)


STATISTICS = {"batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"}


@pytest.mark.parametrize(
    ("module", "training"),
    [(Normed(), None), (Normed(), "odd"), (Frozen(), "not frozen")],
)
def test_a_mode_is_an_attribute_or_named(module, training):
    network = models.take(module, jax.ShapeDtypeStruct(X.shape, X.dtype), training)
    assert models.statistics(network, X) == STATISTICS


def test_a_mode_of_nnx_is_named():
    network = models.take(FrozenNNX(), X, "not frozen")
    assert models.statistics(network, X) == {"norm/mean", "norm/var"}


def test_variables_that_are_given_are_taken_as_they_are():
    module = strangers.LinenNet()
    variables = module.init(jax.random.key(7), X)
    network = models.take((module, variables), X)
    assert jax.tree.all(jax.tree.map(np.array_equal, network.params, variables))
    np.testing.assert_array_equal(
        network.predict(network.params, X), module.apply(variables, X, deterministic=True)
    )
    seeds = [
        models.take(module, X, seed=seed).params["params"]["head"]["kernel"] for seed in (0, 1)
    ]
    assert jnp.abs(seeds[0] - seeds[1]).max() > 0


def test_an_nnx_module_is_left_as_it_is():
    module = strangers.NNXNet(nnx.Rngs(0))
    module.eval()
    expected = module(X)
    before = nnx.state(module, nnx.Not(nnx.RngKey))
    network = models.take(module, X)
    jax.jit(network.train)(network.params, X, KEY)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, before, nnx.state(module, nnx.Not(nnx.RngKey)))
    )
    assert module.dropout.deterministic
    np.testing.assert_allclose(network.predict(network.params, X), expected, atol=1e-6)


def test_a_pair_of_functions_is_not_trained():
    predict, _, params = strangers.functions()
    network = models.take((predict, params | {"count": jnp.zeros((), jnp.int32)}), X)
    assert network.train is None
    assert models.statistics(network, X) == {"count"}


PREDICT, TRAIN, PARAMS = strangers.functions()


@pytest.mark.parametrize(
    ("given", "training", "message"),
    [
        (3, None, "given must be a Linen module, .* got int"),
        ((3, PARAMS), None, r"given must be .* got \(int, dict\)"),
        ((PREDICT, TRAIN), None, "given must have arrays as parameters, got <function"),
        ((PREDICT, {}), None, "given must have parameters, got none"),
        ((PREDICT, {"a": PARAMS["a"]}), None, r"must run as predict\(params, x\), got KeyError"),
        (
            (PREDICT, lambda p, x: (x, p), PARAMS),
            None,
            r"must run as train\(params, x, key\), got TypeError: .* takes 2 positional",
        ),
        ((PREDICT, lambda p, x, k: x, PARAMS), None, r"must return \(out, new params\), got "),
        (
            (PREDICT, lambda p, x, k: (PREDICT(p, x), {"a": p["a"]}), PARAMS),
            None,
            r"new params of train must have float32\[3,3,8,12\] at 'b', got no leaf",
        ),
        ((PREDICT, TRAIN, PARAMS), "train", "training must be None where functions are given"),
        (Frozen(), "frosty", "training must be an argument .* of Frozen, got 'frosty', .* frozen"),
        (Frozen(), None, "training must name what puts Frozen into training mode"),
        (FrozenNNX(), None, "training must name what puts FrozenNNX into training mode"),
        (
            (nn.Dense(3), {"params": {"bias": jnp.zeros(3)}}),
            None,
            r"must run as predict\(params, x\), got .*kernel",
        ),
    ],
)
def test_bad_networks_are_named(given, training, message):
    with pytest.raises((TypeError, ValueError), match=message):
        models.take(given, X, training)


MODEL = """
from parts import layer
import dataclasses
import flax.linen as nn

class Net(nn.Module):
    features: int = 3
    @nn.compact
    def __call__(self, x):
        return layer(self.features)(x)

def make():
    return Net()

def late():
    import parts
    return parts.layer(2)

def broken():
    raise RuntimeError("no such weights\\nat all")

def wrong():
    return "resnet8"

constant = 3
"""


def test_make(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(MODEL)
    (tmp_path / "parts.py").write_text("from flax.linen import Dense as layer\n")
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    file = f"{tmp_path}/own.py"
    assert models.make(f"{file}:late").features == 2
    network = models.take(models.make(f"{file}:make"), X)
    assert network.predict(network.params, X).shape == (4, 8, 8, 3)
    faults = {
        file: "must be FILE.py:FUNCTION or package.module:function, got no function",
        f"{tmp_path}/other.py:make": "must name a file, got none of that name",
        f"{file}:other": "must name a function of .*own.py, got none called 'other'",
        f"{file}:constant": "got none called 'constant'",
        f"{file}:broken": "that runs without arguments, got RuntimeError: no such weights$",
        f"{file}:Net.make": "got none called",
        f"{file}:wrong": "must return a network, got str$",
        f"{tmp_path}/bad.py:make": "must name what can be imported, got ModuleNotFoundError: No ",
        "no_package.at_all:make": "must name what can be imported, got ModuleNotFoundError: No ",
        "hybrid_jax.models:create": "that runs without arguments, got TypeError: .*create",
    }
    for reference, message in faults.items():
        with pytest.raises(ValueError, match=f"^model.make .*{message}") as error:
            models.make(reference)
        assert len(str(error.value).splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "parts")
    assert models.make("own:late").features == 2


def test_a_keras_model(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    # Keras's own layers count on promotion.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        keras_model()


def keras_model():
    keras = pytest.importorskip("keras", reason="keras is not installed")
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(8, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    network = models.take(model, X)
    assert {path.rpartition("/")[2] for path in models.statistics(network, X)} == {
        "moving_mean",
        "moving_variance",
    }
    np.testing.assert_allclose(network.predict(network.params, X), model(X), atol=1e-5)
    train = jax.jit(network.train)
    outs = [train(network.params, X, key)[0] for key in (KEY, KEY, jax.random.key(4))]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert jnp.abs(outs[0] - outs[2]).max() > 1e-3
    graph = core.trace(network.predict, network.params, X)
    keep = {graph.groups[0].name: np.arange(8) < 4}
    masks = core.expand(keep, graph.groups, network.params)
    _, small, certificate = core.shrink(network.predict, network.params, masks, X)
    assert certificate.difference < 1e-5
    jax.jit(core.narrow(network.train, network.params, certificate.kept))(small, X, KEY)
    hj.lower(network.predict, network.params, X)

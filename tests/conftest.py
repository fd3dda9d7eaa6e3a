"""Strict set-up for every test: four CPU devices, no silent promotion, shared compilations."""

import functools
import itertools
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import core, data, models
from launch import compilation

# Workers and later runs share what was compiled once; keyed by jax version through XLA itself.
compilation.set_up(str(pathlib.Path(tempfile.gettempdir()) / "hybrid_jax_test_cache"))
os.environ["HYBRID_JAX_CACHE"] = str(pathlib.Path(tempfile.gettempdir()) / "hybrid_jax_tests")
jax.config.update("jax_num_cpu_devices", 4)
# What is not about several devices runs on one, and compiles once.
jax.config.update("jax_default_device", jax.devices()[0])
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of a run: what is tested is the program, not how hard XLA works on it.
jax.config.update("jax_disable_most_optimizations", True)


STEPS = 250

# Whole models where they compile quickly; of the deep ones, every kind of block once or twice.
SIZES = {
    "resnet8": {},
    "resnet20": {"blocks": [2, 2, 1]},
    "resnet32": {"blocks": [1, 2, 1], "shortcut": "project"},
    "resnet56": {"blocks": [3, 1, 1]},
    "resnet18": {"blocks": [2, 1, 1, 1], "stem": "cifar", "widths": [8, 8, 16, 16]},
    "resnet50": {"blocks": [2, 1], "widths": [8, 16], "stem": "cifar"},
    "vgg16_bn": {"widths": [[8, 8], [16, 16], [24, 24]]},
    "mobilenet_v2": {"stages": [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 1, 2]], "stem": "cifar"},
    "efficientnet_lite0": {"stages": [[1, 8, 1, 1, 3], [6, 8, 2, 2, 5]], "widths": [8, 32]},
    "densenet": {"blocks": [2, 2, 1]},
    "densenet40": {"blocks": [2, 1]},
}
# Of the same kinds of blocks as another: their tests are of the long run.
ALIKE = {"resnet18", "resnet20", "resnet32", "resnet56", "efficientnet_lite0", "densenet"}


class Trained(NamedTuple):
    """A network that has learned scikit-learn's digits, and real images to judge it by.

    `params` is the whole variables dict; images are float32 (B, 8, 8, 1), labels int32 (B,).
    """

    fn: Callable[[Any, jax.Array], jax.Array]
    train: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    params: Any
    images: jax.Array
    labels: jax.Array
    held_out_images: jax.Array
    held_out_labels: jax.Array


class DigitsNet(nn.Module):
    """A stem, a residual block, a depthwise and a pointwise convolution, a dense head."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm_relu(x, skip=0.0):
            return nn.relu(nn.BatchNorm(not train, momentum=0.9)(x) + skip)

        conv = functools.partial(nn.Conv, use_bias=False)
        x = norm_relu(conv(8, (3, 3), name="stem")(x))
        y = norm_relu(conv(12, (3, 3), name="expand")(x))
        x = norm_relu(conv(8, (3, 3), name="project")(y), skip=x)
        x = norm_relu(conv(8, (3, 3), 2, feature_group_count=8, name="depthwise")(x))
        x = norm_relu(conv(16, (1, 1), name="pointwise")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def pytest_configure(config):
    """What the ordinary run draws is always the same; the long run looks for what fails."""
    ordinary = "not slow" in config.option.markexpr
    # What is drawn is compiled first, which takes as long as it takes.
    hypothesis.settings.register_profile("compiled", deadline=None, derandomize=ordinary)
    hypothesis.settings.load_profile("compiled")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        takes_model = "small_model" in getattr(item, "fixturenames", ())
        if takes_model and item.callspec.params["name"] in ALIKE:
            item.add_marker(pytest.mark.slow)


_ran = itertools.count(1)


def pytest_runtest_teardown():
    """JAX keeps 8,192 functions of a process, and then no new one: `_cache_size` of it is 0.

    A whole run makes as many. Clearing is seldom, since what tests share is compiled anew.
    """
    if next(_ran) % 500 == 0:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def compiled(caplog):
    """compiled(): how many programs XLA was given since the last call."""
    caplog.set_level(logging.DEBUG, "jax")

    def count():
        found = sum("Compiling" in record.getMessage() for record in caplog.records)
        caplog.clear()
        return found

    with jax.log_compiles():
        yield count


@pytest.fixture(scope="session")
def digits():
    splits = data.load("digits", seed=0)
    images, held_out = (
        jnp.asarray(part.images, jnp.float32) / 255 for part in (splits.train, splits.validation)
    )
    labels, held_out_labels = (jnp.asarray(p.labels) for p in (splits.train, splits.validation))
    net, tx = DigitsNet(), optax.sgd(optax.cosine_decay_schedule(0.2, STEPS), momentum=0.9)

    def predict(params, images):
        return net.apply(params, images)

    def train(params, images):
        return net.apply(params, images, train=True, mutable=["batch_stats"])

    # Compiled step by step: on a CPU a convolution inside a loop is far slower than outside.
    @jax.jit
    def step(variables, state, key):
        batch = jax.random.randint(key, (64,), 0, len(images))

        def loss(params):
            logits, updates = train(variables | {"params": params}, images[batch])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
            return losses.mean(), updates

        gradients, statistics = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(gradients, state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **statistics}, state

    variables = jax.jit(net.init)(jax.random.key(0), images[:1])
    state = tx.init(variables["params"])
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        for key in jax.random.split(jax.random.key(1), STEPS):
            variables, state = step(variables, state, key)
    return Trained(predict, train, variables, images, labels, held_out, held_out_labels)


@pytest.fixture(scope="session")
def digits_grams(digits):
    """The Gram matrices of the digits' network on training images."""
    batches = [(digits.images[:256],), (digits.images[256:512],)]
    return core.input_grams(digits.fn, digits.params, batches)


@pytest.fixture(scope="session")
def layer_errors(digits):
    """params -> {path of a kernel: ‖X W − X Ŵ‖² / ‖X W‖²} on held-out images."""
    held_out = core.input_grams(digits.fn, digits.params, [(digits.held_out_images,)])
    kernels = core.flatten_paths(digits.params)

    def energy(gram, w):
        return np.einsum("gio,gij,gjo->", w, gram.matrix, w, optimize=True)

    def errors(params):
        changed, found = core.flatten_paths(params), {}
        for path, gram in held_out.items():
            old, new = (
                np.asarray(core.kernel_matrix(gram.site, tree[path])) for tree in (kernels, changed)
            )
            found[path] = energy(gram, old - new) / energy(gram, old)
        return found

    return errors


class Small(NamedTuple):
    """A small version of a model that we ship, for 5 classes; the fields are those of `Trained`."""

    fn: Callable[[Any, jax.Array], jax.Array]
    train: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    params: Any
    images: jax.Array


@functools.cache
def _small_model(name):
    module = models.create(name, 5, **SIZES[name])
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((4, 16, 16, 3)), jnp.float32)

    def draw(path, leaf):
        """As after training: no layer explodes, no statistic is at its initial 0 or 1."""
        x = rng.standard_normal(leaf.shape)
        if path.endswith("kernel"):
            x = x * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            x = 0.3 * np.tanh(x) + path.endswith(("scale", "var"))
        return jnp.asarray(x, jnp.float32)

    def train(params, images):
        return module.apply(params, images, True, mutable=["batch_stats"])

    params = core.map_with_path(draw, jax.eval_shape(module.init, jax.random.key(0), images))
    return Small(lambda params, images: module.apply(params, images), train, params, images)


@pytest.fixture(scope="session")
def small_model():
    """A function from the name of a model that we ship to a `Small` version of it."""
    return _small_model

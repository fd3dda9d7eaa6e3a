import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import core, models

X = jax.random.normal(jax.random.key(0), (4, 5))
PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (5, 3)),
    "v": jax.random.normal(jax.random.key(2), (3, 2)),
    "mean": jnp.array([0.5, -1.0, 2.0]),
    "var": jnp.array([0.5, 1.0, 2.0]),
    "scale": jnp.array([2.0, -3.0, 0.0]),
    "bias": jnp.array([1.0, 2.0, 3.0]),
}


def norm(p, y):
    return (y - p["mean"][None]) * (jax.lax.rsqrt(p["var"] + 1e-3) * p["scale"])[None]


def two_layers(p, x):
    return jax.nn.relu(norm(p, x @ p["w"]) + p["bias"][None]) @ p["v"]


def check(fn, params, *inputs, tolerance=1e-5):
    folded_fn, refold = core.fold(fn, params, *inputs)
    folded = jax.jit(refold)(params)
    expected, got = jax.jit(fn)(params, *inputs), jax.jit(folded_fn)(folded, *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected
    )
    return folded_fn, folded


def test_a_normalization_goes_into_the_kernel_and_a_bias():
    _, folded = check(two_layers, PARAMS, X)
    assert set(folded) == {"w", "w/bias", "v", "v/bias"}
    a = np.array([2.0, -3.0, 0.0]) / np.sqrt(np.array([0.501, 1.001, 2.001]))
    np.testing.assert_allclose(folded["w"], PARAMS["w"] * a[None], rtol=1e-6)
    expected = np.array([1.0, 2.0, 3.0]) - np.array([0.5, -1.0, 2.0]) * a
    np.testing.assert_allclose(folded["w/bias"], expected, rtol=1e-6)
    np.testing.assert_array_equal(folded["v"], PARAMS["v"])
    np.testing.assert_array_equal(folded["v/bias"], [0.0, 0.0])


AFFINE = {
    # name: (chain, a, b) with c = (1, 2, 4)
    "add": (lambda y, c: c + y, [1, 1, 1], [1, 2, 4]),
    "sub": (lambda y, c: y - c, [1, 1, 1], [-1, -2, -4]),
    "sub from": (lambda y, c: c - y, [-1, -1, -1], [1, 2, 4]),
    "mul": (lambda y, c: c * (y + 1.0), [1, 2, 4], [1, 2, 4]),
    "div": (lambda y, c: (y + 1.0) / c, [1, 1 / 2, 1 / 4], [1, 1 / 2, 1 / 4]),
    "neg": (lambda y, c: -(y + c), [-1, -1, -1], [-1, -2, -4]),
    "convert": (lambda y, c: y.astype(jnp.float32) * 2.0, [2, 2, 2], [0, 0, 0]),
}


@pytest.mark.parametrize("name", AFFINE)
def test_each_affine_step(name):
    chain, a, b = AFFINE[name]
    params = {"w": PARAMS["w"], "c": jnp.array([1.0, 2.0, 4.0])}
    for spread in (lambda c, y: c[None], lambda c, y: jnp.broadcast_to(c[None], y.shape)):

        def fn(p, x, spread=spread):
            y = x @ p["w"]
            return chain(y, spread(p["c"], y))

        _, folded = check(fn, params, X)
        np.testing.assert_allclose(folded["w"], params["w"] * np.array([a], np.float32), rtol=1e-6)
        np.testing.assert_allclose(folded["w/bias"], b, rtol=1e-6)


# What must not be folded, or not at once: (function, the parameters that are left).
STAYS = {
    "what divides by the activation": (lambda p, x: p["bias"][None] / (x @ p["w"]), {"bias"}),
    "what differs along the batch": (
        lambda p, x: x @ p["w"] + jnp.concatenate([p["bias"], p["scale"][:1]])[:, None],
        {"bias", "scale"},
    ),
    "what another equation reads too": (
        lambda p, x: (lambda y: norm(p, y) + y)(x @ p["w"]),
        {"mean", "var", "scale"},
    ),
    "an output": (lambda p, x: (lambda y: (y, y + p["bias"][None]))(x @ p["w"]), {"bias"}),
    "what comes before a site": (
        lambda p, x: norm(p, x[:, :3]) @ p["v"],
        {"mean", "var", "scale"},
    ),
    "what is computed from the input": (lambda p, x: x @ p["w"] + x[:, :3], set()),
    "a kernel that is read elsewhere": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["bias"][None]) + jnp.sum(p["w"]),
        {"w", "bias"},
    ),
    "a square": (lambda p, x: (lambda y: y * y)(x @ p["w"]), set()),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_the_same_is_left(name):
    fn, left = STAYS[name]
    _, folded = check(fn, PARAMS, X)
    assert set(folded) - {"w", "w/bias", "v", "v/bias"} == left - {"w"}
    assert ("w/bias" not in folded) == ("w" in left or "before" in name)


def test_a_kernel_used_twice_is_folded_once_for_each_site():
    def fn(p, x):
        return (x @ p["w"] + p["bias"][None], 2.0 * (x @ p["w"]))

    _, folded = check(fn, PARAMS, X)
    np.testing.assert_allclose(folded["w#2"], 2 * folded["w"])


def test_chains_cross_jit_and_lie_in_remat_but_not_in_loops():
    def fn(p, x):
        y = jax.jit(norm)(p, x @ p["w"])

        @jax.checkpoint
        def block(p, y):
            return jax.nn.relu(y @ p["v"] + 1.0)

        def body(carry, _):
            return carry @ p["u"] + p["bias"][None, :2], None

        return jax.lax.scan(body, block(p, y), None, length=2)[0]

    params = PARAMS | {"u": jnp.eye(2) / 2}
    _, folded = check(fn, params, X)
    assert set(folded) == {"w", "w/bias", "v", "v/bias", "u", "bias"}
    np.testing.assert_array_equal(folded["v/bias"], [1.0, 1.0])


def test_several_output_axes_and_one_product_for_each_head():
    def fn(p, x):
        heads = jnp.einsum("bi,ihd->bhd", x, p["q"]) * p["s"][None]
        return jnp.einsum("bhd,hde->bhe", heads, p["o"]) + p["t"][None, None]

    keys = jax.random.split(jax.random.key(3), 4)
    shapes = {"q": (5, 2, 3), "s": (2, 3), "o": (2, 3, 4), "t": (4,)}
    params = {n: jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys)}
    _, folded = check(fn, params, X)
    assert folded["q/bias"].shape == (2, 3)
    assert folded["o/bias"].shape == (4,)


@pytest.mark.parametrize(
    ("name", "sizes", "left"),
    [
        ("resnet8", {"widths": [8, 8, 8]}, 0),
        ("mobilenet_v2", {"stages": [[1, 8, 1, 1], [6, 8, 2, 2]], "stem": "cifar"}, 0),
        # A BatchNorm that comes before its convolution has no kernel to go into.
        ("densenet", {"blocks": [2, 1]}, 5),
    ],
)
def test_models_that_are_shipped(name, sizes, left):
    module = models.create(name, 5, **sizes)
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    variables = jax.tree.map(
        lambda leaf: leaf + jnp.linspace(0.1, 0.6, leaf.size) if leaf.ndim == 1 else leaf, variables
    )
    folded_fn, folded = check(module.apply, variables, x, tolerance=1e-4)
    names = [site.name for site in core.trace(module.apply, variables, x).sites]
    graph = core.trace(folded_fn, folded, x)
    assert [site.name for site in graph.sites] == names
    norms = [path for path in folded if path.startswith("batch_stats") and path.endswith("mean")]
    assert len(norms) == left


def test_nnx_and_a_model_that_has_learned(digits):
    _, folded = check(digits.fn, digits.params, digits.held_out_images, tolerance=1e-4)
    assert not any(path.startswith("batch_stats") for path in folded)
    net = nnx.Sequential(
        nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0)),
        nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)),
    )
    definition, state = nnx.split(net)
    _, folded = check(lambda state, x: nnx.merge(definition, state)(x), state, digits.images[:2])
    assert len(folded) == 2


def test_it_trains_through_the_folding_and_takes_any_batch():
    folded_fn, refold = core.fold(two_layers, PARAMS, X)

    def loss(fn, params):
        return jnp.sum(jnp.square(fn(params, X)))

    through = jax.grad(lambda p: loss(folded_fn, refold(p)))(PARAMS)
    plain = jax.grad(lambda p: loss(two_layers, p))(PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(through[name], plain[name], rtol=1e-4, atol=1e-4)
    assert folded_fn(refold(PARAMS), jnp.ones((7, 5))).shape == (7, 2)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), PARAMS)
    both = jax.vmap(lambda p: folded_fn(refold(p), X))(stack)
    alone = two_layers(jax.tree.map(lambda leaf: leaf[1], stack), X)
    np.testing.assert_allclose(both[1], alone, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_normalization_is_computed_any_more():
    folded_fn, refold = core.fold(two_layers, PARAMS, X)
    jaxpr = jax.make_jaxpr(folded_fn)(refold(PARAMS), X)
    names = [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
    assert names.count("dot_general") == 2
    assert not {"rsqrt", "sub", "mul"} & set(names)
    shapes = jax.eval_shape(lambda p: p, PARAMS)
    assert jax.eval_shape(core.fold(two_layers, shapes, X)[1], shapes)["w"].shape == (5, 3)

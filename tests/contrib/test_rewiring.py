import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import flax_kernels

from hybrid_jax import contrib, pruning

KEY = jax.random.key(0)


def bits(*values):
    return jnp.array([values], bool)


def first_kept(kernels, params):
    """Scores that keep the first weights: of equal scores the lower index is kept."""
    return jax.tree.map(jnp.ones_like, params)


def test_rewire_by_hand():
    masks = {"w": bits(1, 1, 1, 1, 0, 0, 0, 0)}
    weights = {"w": jnp.array([[5.0, -1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]])}
    growth = {"w": jnp.array([[9.0, 0.05, 9.0, 0.3, 0.1, 0.4, 0.3, 0.2]])}
    # Of four kept, floor(0.5 · 4 + ½) = 2 are dropped: |−1| and |2|. Of the six that are not
    # kept then, 0.4 grows and of the two 0.3 the first, which was just dropped.
    got = contrib.rewire(masks, weights, growth, 0.5)
    np.testing.assert_array_equal(got["w"], bits(1, 0, 1, 1, 0, 1, 0, 0))
    # floor(0.3 · 4 + ½) = 1: |−1| goes, 0.4 comes; floor(0.12 · 4 + ½) = 0; and all four.
    for drop, expected in {
        0.3: bits(1, 0, 1, 1, 0, 1, 0, 0),
        0.12: bits(1, 1, 1, 1, 0, 0, 0, 0),
        1.0: bits(1, 0, 1, 1, 0, 1, 0, 0),
    }.items():
        got = contrib.rewire(masks, weights, growth, drop)
        np.testing.assert_array_equal(got["w"], expected)


def test_rewire_keeps_two_of_four():
    masks = {"w": bits(1, 1, 0, 0, 0, 0, 1, 1).T}
    weights = {"w": jnp.array([[1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 5.0, 6.0]]).T}
    growth = {"w": jnp.array([[0.0, 0.0, 1.0, 2.0, 9.0, 9.0, 0.0, 0.0]]).T}
    # Half of four, the smallest of the leaf, go: both from the first block, where both grow.
    got = contrib.rewire(masks, weights, growth, 0.5, contrib.n_m(flax_kernels(weights), 2, 4))
    np.testing.assert_array_equal(got["w"].T, bits(0, 0, 1, 1, 0, 0, 1, 1))


@settings(max_examples=30)
@given(
    mask=st.lists(st.booleans(), min_size=12, max_size=12),
    growth=st.lists(
        st.sampled_from([0.0, 1.0, 2.0, float("inf"), float("nan")]), min_size=12, max_size=12
    ),
    drop=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_rewire_never_changes_the_count(mask, growth, drop):
    mask = jnp.array(mask)
    weights = jnp.where(mask, jnp.arange(12.0), 0.0)
    got = contrib.rewire({"w": mask}, {"w": weights}, {"w": jnp.array(growth)}, drop)["w"]
    n = int(mask.sum())
    assert got.sum() == n
    # The largest n − k weights are among them, whatever the growth.
    largest = sorted(np.flatnonzero(mask), key=lambda i: -i)[: n - int(drop * n + 0.5)]
    assert got[jnp.array(largest, int)].all()


def run(tx, params, gradients):
    """Parameters and states after each of `gradients`."""
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update({"w": jnp.array([gradient])}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params["w"][0], state))
    return seen


PARAMS = {"w": jnp.array([[5.0, -1.0, 3.0, 2.0, 7.0, 7.0, 7.0, 7.0]])}
KERNELS = flax_kernels(PARAMS)


def test_rigl_by_hand():
    tx = contrib.rigl(
        optax.sgd(0.1, momentum=0.9), KERNELS, 0.5, KEY, 4, every=2, drop=1.0, initial=first_kept
    )
    rest, dense = [0.0] * 8, [1.0] * 8
    gradient = [1.0, -0.05, 1.0, 0.25, 0.1, -4.0, 0.3, 0.2]
    seen = run(tx, PARAMS, [rest, rest, gradient, dense, [*rest[:7], 99.0]])

    # The first step lands on the first mask, and neither it nor the second rewires.
    for params, state in seen[:2]:
        np.testing.assert_array_equal(params, [5.0, -1.0, 3.0, 2.0, 0, 0, 0, 0])
        np.testing.assert_array_equal(state.masks["w"], bits(1, 1, 1, 1, 0, 0, 0, 0))
    # Step 2 of 4: ½ · 1 · (1 + cos(π/2)) = ½ of the four. The optimizer leads to 4.9, −0.995,
    # 2.9, 1.975: the second and fourth are dropped. −4 and 0.3 are the largest gradients of the
    # others (0.05 and 0.25 of what was dropped included), and start at zero.
    params, state = seen[2]
    np.testing.assert_allclose(params, [4.9, 0, 2.9, 0, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(state.masks["w"], bits(1, 0, 1, 0, 0, 1, 1, 0))
    # Momentum: the gradient of the two that stayed, nothing of those that came and went.
    np.testing.assert_allclose(state.inner[0].trace["w"][0], [1, 0, 1, 0, 0, 0, 0, 0])
    # Step 3: momentum 0.9 · 1 + 1 = 1.9 and 0 + 1.
    params, state = seen[3]
    np.testing.assert_allclose(params, [4.71, 0, 2.71, 0, 0, -0.1, -0.1, 0], rtol=1e-5)
    # Step 4 is the end: nothing grows any more.
    np.testing.assert_array_equal(seen[4][1].masks["w"], seen[2][1].masks["w"])


def test_rigl_drops_along_a_cosine():
    n, end = 1000, 8
    params = {"w": jnp.arange(1.0, 2 * n + 1).reshape(2, n)}
    tx = contrib.rigl(optax.sgd(0.0), flax_kernels(params), 0.5, KEY, end, every=2, drop=0.4)
    state, update = tx.init(params), jax.jit(tx.update)
    changed = []
    for _ in range(10):
        # Nothing where kept, so that what is dropped does not grow again at once.
        _, new = update({"w": jnp.where(state.masks["w"], 0.0, 1.0)}, state, params)
        changed.append(int((state.masks["w"] & ~new.masks["w"]).sum()))
        state = new
    # floor(0.2 (1 + cos(π t / 8)) · 1000 + ½): cos is 0.7071 at 2, 0 at 4, −0.7071 at 6.
    assert changed == [0, 0, 341, 0, 200, 0, 59, 0, 0, 0]


def test_set_by_hand():
    tx = contrib.set_(
        optax.sgd(0.1, momentum=0.9), KERNELS, 0.5, KEY, 4, every=1, drop=0.3, initial=first_kept
    )
    gradient = [1.0, 0.0, 1.0, 0.0, 99.0, 99.0, 99.0, 99.0]
    (_, first), (params, state) = run(tx, PARAMS, [[0.0] * 8, gradient])
    assert first.masks["w"].sum() == 4
    # floor(0.3 · 4 + ½) = 1 is dropped, −1; the best random number of the others grows.
    scores = pruning.random(KERNELS, PARAMS, jax.random.fold_in(KEY, 1))["w"][0]
    grown = int(jnp.argmax(scores.at[jnp.array([0, 2, 3])].set(-1.0)))
    expected = np.array([1, 0, 1, 1, 0, 0, 0, 0], bool)
    expected[grown] = True
    np.testing.assert_array_equal(state.masks["w"][0], expected)
    stays = [4.9, -1.0 if grown == 1 else 0.0, 2.9, 2.0, 0, 0, 0, 0]
    np.testing.assert_allclose(params, stays, rtol=1e-6)


def test_set_grows_anywhere():
    masks, weights = {"w": bits(1, 1, 0, 0, 0, 0)}, {"w": jnp.array([[2.0, 1.0, 0, 0, 0, 0]])}

    def grown(key):
        return contrib.rewire(
            masks, weights, pruning.random(flax_kernels(weights), weights, key), 0.5
        )["w"][0]

    share = jax.vmap(grown)(jax.random.split(KEY, 2000)).mean(axis=0)
    # One of the five that are not kept, each in a fifth of the cases: 0.2 ± 4 √(0.16 / 2000).
    np.testing.assert_allclose(share, [1.0, *[0.2] * 5], atol=0.036)


def test_a_grown_weight_gets_the_state_that_init_gives():
    params = {"w": jnp.array([[4.0, 1.0, 0.0, 0.0]])}
    # Adagrad's sums start at 0.1 and grow by g²: at 0.1 + 4 for what stays, 0.1 for what came.
    tx = contrib.rigl(
        optax.adagrad(0.1, initial_accumulator_value=0.1),
        flax_kernels(params),
        0.5,
        KEY,
        4,
        every=1,
        drop=0.5,
        initial=first_kept,
    )
    (_, _), (_, state) = run(tx, params, [[0.0] * 4, [2.0, 0.0, 3.0, 0.0]])
    np.testing.assert_array_equal(state.masks["w"], bits(1, 0, 1, 0))
    sums = state.inner[0].sum_of_squares["w"][0]
    np.testing.assert_allclose(sums, [4.1, 0.1, 0.1, 0.1], rtol=1e-6)


def test_first_masks_are_random_or_by_score_with_any_allocation():
    params = {"a": jnp.arange(288.0).reshape(36, 8), "b": jnp.arange(48.0).reshape(8, 6)}
    kernels = flax_kernels(params)
    rigl = functools.partial(contrib.rigl, optax.sgd(0.1), kernels, 0.5, KEY, 10)
    random = rigl().init(params).masks
    expected = pruning.masks(pruning.random(kernels, params, KEY), 0.5)
    chex.assert_trees_all_equal(random, expected)
    largest = rigl(allocation=pruning.erk(kernels), initial=pruning.magnitude).init(params).masks
    expected = pruning.masks(
        pruning.magnitude(kernels, params), 0.5, allocation=pruning.erk(kernels)
    )
    chex.assert_trees_all_equal(largest, expected)
    exempt = rigl(exempt=["a"]).init(params).masks
    assert exempt["a"] == optax.MaskedNode()


def test_n_m_holds_through_training():
    params = {"w": jax.random.normal(KEY, (16, 3))}
    kernels = flax_kernels(params)
    two_of_four = contrib.n_m(kernels, 2, 4)
    tx = contrib.rigl(
        optax.sgd(0.1), kernels, 0.5, KEY, 9, granularity=two_of_four, every=1, drop=0.5
    )
    state, update, first = tx.init(params), jax.jit(tx.update), tx.init(params).masks["w"]
    for step in range(10):
        gradients = {"w": jax.random.normal(jax.random.key(step), (16, 3))}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        assert (state.masks["w"].reshape(4, 4, 3).sum(axis=1) == 2).all()
    assert (state.masks["w"] != first).any()


def test_bad_input_is_named():
    sgd = optax.sgd(0.1)
    for method in (contrib.rigl, contrib.set_):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.5"):
            method(sgd, KERNELS, 1.5, KEY, 10)
        with pytest.raises(ValueError, match=r"drop must be in \[0, 1\], got 2"):
            method(sgd, KERNELS, 0.5, KEY, 10, drop=2)
        with pytest.raises(ValueError, match="end must be an integer of at least 1, got 0"):
            method(sgd, KERNELS, 0.5, KEY, 0)
        with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
            method(sgd, KERNELS, 0.5, KEY, 10, every=0)
        with pytest.raises(ValueError, match=r"inner must be an optax transformation, got 0.1"):
            method(0.1, KERNELS, 0.5, KEY, 10)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 0.5\], got 0.8"):
        contrib.rigl(sgd, KERNELS, 0.8, KEY, 10, granularity=contrib.n_m(KERNELS, 2, 4)).init(
            PARAMS
        )
    params = {"w": jnp.ones((2, 2, 1, 3))}
    kernels = flax_kernels(params)
    tx = contrib.rigl(sgd, kernels, 0.5, KEY, 10, granularity=contrib.kernels(kernels))
    with pytest.raises(ValueError, match=r"single weights.*kernels with 3 units for 12 weights"):
        tx.init(params)


def test_an_init_that_looks_into_the_parameters_is_named():
    peeking = optax.GradientTransformation(
        lambda params: {"m": jnp.zeros_like(params["w"])},
        lambda updates, state, params=None: (updates, state),
    )
    tx = contrib.rigl(peeking, KERNELS, 0.5, KEY, 10)
    with pytest.raises(ValueError, match=r"must have an init that takes any pytree.*TypeErr"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_rigl_learns_real_images_where_fixed_random_masks_do_not(digits):
    images, held_out = (x.reshape(len(x), -1) for x in (digits.images, digits.held_out_images))
    steps = 300

    def predict(params, x):
        return jax.nn.relu(x @ params["hidden"]) @ params["head"]

    def accuracy(end, key):
        key, *keys = jax.random.split(key, 4)
        params = {
            "hidden": jax.random.normal(keys[0], (images.shape[1], 128)) / 6,
            "head": jax.random.normal(keys[1], (128, 10)) / 8,
        }
        sgd = optax.sgd(0.1, momentum=0.9)
        tx = contrib.rigl(sgd, flax_kernels(params), 0.95, keys[2], end, every=20)

        def step(carry, key):
            params, state = carry
            batch = jax.random.randint(key, (64,), 0, len(images))

            def loss(params):
                logits = predict(params, images[batch])
                labels = digits.labels[batch]
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, steps)
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        assert params["hidden"].size == 8192
        right = predict(params, held_out).argmax(axis=-1) == digits.held_out_labels
        return right.mean(), state.masks["hidden"].sum() + state.masks["head"].sum()

    def over_seeds(end):
        run = jax.jit(functools.partial(accuracy, end))
        return np.array([run(jax.random.key(seed)) for seed in range(3)]).T

    fixed, rewired = over_seeds(end=1), over_seeds(end=225)
    # 8192 − 7782 and 1280 − 1216 weights are kept, from the first to the last.
    assert (fixed[1] == 474).all()
    assert (rewired[1] == 474).all()
    assert (rewired[0] > fixed[0] + 0.05).all(), (fixed[0], rewired[0])
    assert rewired[0].mean() > 0.85, rewired[0]

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import flax_kernels

from hybrid_jax import contrib, core, models, pruning


def kind(granularity, *args, **options):
    return lambda kernels: granularity(kernels, *args, **options)


def masked(scores, sparsity=None, granularity=None):
    scores = {"w": scores}
    return pruning.masks(scores, sparsity, granularity(flax_kernels(scores)))


def test_n_m_runs_along_the_contracted_axis():
    # Kernel (C = 4, O = 2): the best two of each column of four.
    scores = jnp.array([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]])
    expected = [[False, True], [False, True], [True, False], [True, False]]
    assert masked(scores, 0.5, kind(contrib.n_m, 2, 4))["w"].tolist() == expected
    # By default as many as 1:2 allows; equal scores within a pair keep the first.
    tied = jnp.array([[1.0, 2.0], [1.0, 3.0], [0.0, 9.0], [5.0, 9.0]])
    expected = [[True, False], [False, True], [False, True], [True, False]]
    assert masked(tied, granularity=kind(contrib.n_m, 1, 2))["w"].tolist() == expected


def test_n_m_on_its_way_there():
    # 2:4 at sparsity 0.25 loses floor(0.25 · 4 + ½) = 1 of each four.
    mask = masked(jnp.arange(8.0).reshape(8, 1), 0.25, kind(contrib.n_m, 2, 4))["w"]
    assert mask[:, 0].tolist() == [False, True, True, True] * 2


# Four blocks of 2×2: sums 4, 5 / 3, 12; maxima 1, 5 / 2, 3; norms 2, 5 / √5, 6.
BLOCKS = jnp.array(
    [
        [1.0, 1.0, 5.0, 0.0],
        [1.0, 1.0, 0.0, 0.0],
        [2.0, 0.0, 3.0, 3.0],
        [0.0, 1.0, 3.0, 3.0],
    ]
)


@pytest.mark.parametrize(
    ("reduce", "lost"), [("sum", "lower left"), ("mean", "lower left"), ("max", "upper left")]
)
def test_blocks_leave_as_a_whole(reduce, lost):
    mask = masked(BLOCKS, 0.25, kind(contrib.blocks, 2, 2, reduce=reduce))["w"]
    expected = np.ones((4, 4), bool)
    expected[{"upper left": slice(0, 2), "lower left": slice(2, 4)}[lost], :2] = False
    np.testing.assert_array_equal(mask, expected)


def test_the_norm_of_a_block():
    # ‖(1, 1, 1, 1)‖ = 2 < ‖(2, 0, 0, 1)‖ = √5 < 5 < 6: both blocks on the left.
    mask = masked(BLOCKS, 0.5, kind(contrib.blocks, 2, 2, reduce="l2"))["w"]
    assert mask.tolist() == [[False, False, True, True]] * 4


def test_blocks_are_those_of_one_place_in_the_kernel():
    # (H, W, C, O) = (1, 2, 2, 4), blocks of 2×2. At (0, 0) sums 4 and 8, at (0, 1) 2 and 6.
    scores = jnp.stack([jnp.repeat(jnp.array([[x, y]]), 2, 1) for x, y in ((1.0, 2.0), (0.5, 1.5))])
    scores = jnp.broadcast_to(scores[None], (1, 2, 2, 4))
    mask = masked(scores, 0.5, kind(contrib.blocks, 2, 2))["w"]
    assert mask[0, 0].tolist() == mask[0, 1].tolist() == [[False, False, True, True]] * 2
    # Equal scores: the first of (H, W, C/2, O/2), here both at (0, 0).
    mask = masked(jnp.ones((1, 2, 2, 4)), 0.5, kind(contrib.blocks, 2, 2))["w"]
    assert mask[0].all(axis=(1, 2)).tolist() == [True, False]
    assert not mask[0, 1].any()


def test_kernels_leave_as_a_whole():
    # (H, W, C, O) = (1, 2, 2, 2), the kernel of (c, o) sums to 1 + 2, 6 + 0 / 4 + 4, 2 + 2.
    first = [[1.0, 6.0], [4.0, 2.0]]
    second = [[2.0, 0.0], [4.0, 2.0]]
    mask = masked(jnp.array([[first, second]]), 0.5, kind(contrib.kernels))["w"]
    assert mask[0, 0].tolist() == mask[0, 1].tolist() == [[False, True], [True, False]]


def test_erk_of_kernels_has_the_densities_of_their_leaves():
    # Raw densities (3+3+4+8)/288 = 1/16 and (1+1+8+6)/48 = 1/3, of 32 and 48 kernels: shares as
    # 2 : 16. At 0.5 floor(0.5 · 80 + ½) = 40 of 80 leave and 40 stay: 4.44 and 35.56.
    scores = {"a": jnp.ones((3, 3, 4, 8)), "b": jnp.ones((1, 1, 8, 6))}
    kernels = flax_kernels(scores)
    kept = pruning.masks(scores, 0.5, contrib.kernels(kernels), pruning.erk(kernels))
    counts = {name: int(mask.any(axis=(0, 1)).sum()) for name, mask in kept.items()}
    assert counts == {"a": 4, "b": 36}
    assert int(kept["a"].sum()) == 4 * 9


def test_a_leaf_keeps_a_kernel():
    scores = {"a": jnp.ones((3, 3, 2, 2)), "b": 2 * jnp.ones((3, 3, 2, 2))}
    granularity = contrib.kernels(flax_kernels(scores), at_least=1)
    kept = pruning.masks(scores, 0.5, granularity, pruning.global_())
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"a": 9, "b": 27}


def test_bad_input_is_named():
    scores = jnp.ones((6, 4))
    with pytest.raises(ValueError, match=r"in \[0, 0.5\], got 0.8"):
        masked(scores, 0.8, kind(contrib.n_m, 2, 4))
    with pytest.raises(
        ValueError, match=r"m must divide C = 6 of 'w' with shape \(6, 4\), got 4; exempt"
    ):
        masked(scores, 0.5, kind(contrib.n_m, 2, 4))
    # A single row is no exception.
    for shape in ((6, 4), (2, 1)):
        kernels = flax_kernels({"w": jnp.ones(shape)})
        with pytest.raises(ValueError, match=r"must be uniform\(\) with n_m\(1, 2\).*got erk\(\)"):
            pruning.masks(
                {"w": jnp.ones(shape)}, 0.5, contrib.n_m(kernels, 1, 2), pruning.erk(kernels)
            )
    with pytest.raises(ValueError, match=r"n must be an integer in \[1, 4\], got 5"):
        contrib.n_m({}, 5, 4)
    with pytest.raises(ValueError, match=r"bc must divide C = 6 of 'w' .* got 4; exempt"):
        masked(scores, 0.5, kind(contrib.blocks, 4, 2))
    with pytest.raises(ValueError, match=r"bo must divide O = 4 of 'w' .* got 3; exempt"):
        masked(scores, 0.5, kind(contrib.blocks, 2, 3))
    with pytest.raises(ValueError, match="bo must be an integer of at least 1, got 0"):
        contrib.blocks({}, 2, 0)
    kernels = flax_kernels({"w": scores})
    for granularity in (contrib.kernels(kernels), contrib.blocks(kernels, 2, 2)):
        with pytest.raises(
            ValueError, match=rf"must be of kernels with {granularity.name[:6]}.* at 'bias', .*: w"
        ):
            pruning.masks({"bias": jnp.ones(4)}, 0.5, granularity)
        with pytest.raises(ValueError, match=r"'w' must have shape \(6, 4\), got \(4, 6\)"):
            pruning.masks({"w": scores.T}, 0.5, granularity)
    with pytest.raises(ValueError, match="reduce must be one of"):
        contrib.kernels({}, reduce="median")
    with pytest.raises(ValueError, match="at_least must be an integer of at least 0, got -1"):
        pruning.unstructured(at_least=-1)


@pytest.mark.parametrize("name", models.names())
def test_two_of_four_runs_along_the_contracted_axis(name, small_model):
    fn, _, variables, x = small_model(name)
    graph = core.trace(fn, variables, x)
    axes = {site.path: site.kernel_in_axes[-1] for site in graph.sites}
    fits = {
        path: axis for path, axis in axes.items() if graph.parameters[path].shape[axis] % 4 == 0
    }
    scores = core.map_with_path(
        lambda path, leaf: jnp.abs(leaf) if path in fits else optax.MaskedNode(), variables
    )
    masks = core.flatten_paths(pruning.masks(scores, granularity=contrib.n_m(graph.kernels, 2, 4)))
    assert fits
    for path, axis in fits.items():
        blocks = np.moveaxis(np.asarray(masks[path]), axis, -1)
        assert (blocks.reshape(-1, 4).sum(-1) == 2).all(), path

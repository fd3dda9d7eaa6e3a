import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import core


def dense(params, x):
    return x @ params["w"]


PARAMS = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
X = jnp.array([[1.0, 2.0], [3.0, -1.0]])
GRAM = np.array([[[10.0, -1.0], [-1.0, 5.0]]])  # 1 + 9, 2 − 3; 4 + 1


def grams_of(fn, params=PARAMS, *inputs, **kwargs):
    return core.input_grams(fn, params, [inputs or (X,)], **kwargs)


def test_dense_by_hand():
    gram = grams_of(dense)["w"]
    np.testing.assert_array_equal(gram.matrix, GRAM)
    assert [site.name for site in gram.sites] == ["w"]
    # Batches, of different lengths, add up.
    split = core.input_grams(dense, PARAMS, [(X,), (X[:1],)])["w"].matrix
    np.testing.assert_array_equal(split, GRAM + np.array([[[1.0, 2.0], [2.0, 4.0]]]))


def test_the_quadratic_form_is_the_energy_of_the_output(digits):
    # tr(Wᵀ XᵀX W) = ‖X W‖², of every site: strided, depthwise, pointwise, dense.
    def energy(site, x, kernel, apply):
        y = apply(x, kernel)
        return y, jnp.sum(jnp.square(y))

    x = digits.images[:8]
    _, energies = jax.jit(core.at_sites(digits.fn, energy))(digits.params, x)
    grams = core.input_grams(digits.fn, digits.params, [(x,)])
    kernels = core.flatten_paths(digits.params)
    assert set(grams) == set(energies)
    for path, gram in grams.items():
        w = core.kernel_matrix(gram.site, kernels[path])
        form = jnp.einsum("gio,gij,gjo->", w, gram.matrix, w)
        np.testing.assert_allclose(form, energies[path], rtol=1e-4)
    assert grams["params/depthwise/kernel"].matrix.shape == (8, 9, 9)


def test_a_shared_kernel_adds_its_sites():
    def twice(params, x):
        return (x @ params["w"]).sum() + (2.0 * x @ params["w"]).sum()

    gram = grams_of(twice)["w"]
    np.testing.assert_array_equal(gram.matrix, 5 * GRAM)
    assert [site.name for site in gram.sites] == ["w", "w#2"]


def test_a_scan_adds_its_iterations():
    def loop(params, x):
        # Inputs x, then x W.
        return lax.scan(lambda x, _: (x @ params["w"], None), x, length=2)[0]

    later = np.asarray(X @ PARAMS["w"])
    np.testing.assert_array_equal(grams_of(loop)["w"].matrix[0], GRAM[0] + later.T @ later)


def test_a_branch_not_taken_adds_nothing():
    def branch(params, x):
        return lax.cond(x.sum() > 0, lambda x: x @ params["w"], lambda x: x, x)

    both = core.input_grams(branch, PARAMS, [(X,), (-X,)])["w"]
    np.testing.assert_array_equal(both.matrix, GRAM)


def test_a_kernel_cast_to_compute_is_the_parameter():
    def half(params, x):
        return x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)

    params = {"w": PARAMS["w"] / 3}  # not representable in bfloat16
    gram = grams_of(half, params)["w"].matrix
    assert gram.dtype == jnp.float32
    np.testing.assert_array_equal(gram, GRAM)


def test_a_stack_equals_separate_experts():
    experts = [{"a": PARAMS["w"] * s, "b": PARAMS["w"]} for s in (1.0, -2.0)]

    def fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)
    together = grams_of(fn, stack, stacked=True)
    for i, params in enumerate(experts):
        alone = grams_of(fn, params)
        for path in "ab":
            np.testing.assert_allclose(together[path].matrix[i], alone[path].matrix)


def standardized(params, x):
    return x @ (params["w"] - params["w"].mean())


def sliced(params, x):
    return lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]


def looped(params, x):
    return lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, x: x @ params["w"], x)


def both_ways(params, x):
    other = lax.dot_general(x, params["w"], (((1,), (1,)), ((), ())))
    return x @ params["w"] + other


@pytest.mark.parametrize(
    ("fn", "params", "message"),
    [
        (standardized, PARAMS, "'w' must be the parameter itself .* it has other values there"),
        (lambda p, x: x @ p["w"].T, PARAMS, "'w' must be the parameter itself"),
        (sliced, {"w": PARAMS["w"][None]}, r"'w' must be .* itself .* it has shape \(2, 2\) there"),
        (looped, PARAMS, "fn must use 'w' outside `while`"),
        (both_ways, PARAMS, "'w' must be the same matrix wherever it is used.* at: w, w#2"),
    ],
)
def test_a_kernel_that_is_not_one_matrix(fn, params, message):
    with pytest.raises(ValueError, match=message):
        grams_of(fn, params)
    # Left out, it is nobody's concern.
    more = params | {"v": jnp.ones((2, 1))}
    exempt = grams_of(lambda p, x: (x @ p["v"]).sum() + fn(p, x).sum(), more, exempt=["w"])
    assert list(exempt) == ["v"]


def test_bad_input():
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        core.input_grams(dense, PARAMS, [])
    with pytest.raises(TypeError, match="batches must yield tuples of inputs, got list"):
        core.input_grams(dense, PARAMS, [[X]])
    with pytest.raises(ValueError, match=r"inputs of the kernels must be finite.* at 'w'"):
        grams_of(dense, PARAMS, X.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"params must be finite.* at 'w'"):
        grams_of(dense, {"w": PARAMS["w"].at[0, 0].set(jnp.nan)})
    with pytest.raises(ValueError, match="rule 'v' must match at least one path"):
        grams_of(dense, exempt=["v"])
    grams = grams_of(dense)
    with pytest.raises(ValueError, match="grams must be of parameters, got 'w' among: v"):
        core.check_grams({"v": PARAMS["w"]}, grams)
    with pytest.raises(ValueError, match=r"params must have shape \(2, 2\) at 'w', got \(2, 3\)"):
        core.check_grams({"w": jnp.ones((2, 3))}, grams)

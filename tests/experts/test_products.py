import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hybrid_jax import experts

LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CWNH", "WIOH", "HNCW")]
OPTIONS = {
    "same": dict(window_strides=(1, 1), padding="SAME"),
    "strided": dict(window_strides=(2, 3), padding=[(1, 2), (0, -1)], rhs_dilation=(1, 2)),
    "transposed": dict(window_strides=(1, 2), padding=[(3, 0), (1, 1)], lhs_dilation=(2, 3)),
}


def convolutions(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("conv_general_dilated")


def drawn(sizes, axes, seed):
    shape = [sizes[axis] for axis in axes]
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_same_outputs_and_derivatives(layout, options):
    """Forward; the gradient's own convolutions replaced; and the products differentiated."""

    def fn(kernel, x):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **options)

    def gradient(fn):
        return jax.grad(lambda kernel, x: jnp.sin(fn(kernel, x)).sum(), (0, 1))

    x = drawn({"N": 2, "C": 3, "H": 7, "W": 9}, layout[0], 0)
    kernel = drawn({"I": 3, "O": 4, "H": 3, "W": 2}, layout[1], 1)
    want = jax.jit(gradient(fn))(kernel, x)
    assert_close(jax.jit(experts.as_products(fn))(kernel, x), jax.jit(fn)(kernel, x))
    for products in (experts.as_products(gradient(fn)), gradient(experts.as_products(fn))):
        assert convolutions(products, kernel, x) == 0
        assert_close(jax.jit(products)(kernel, x), want)


def test_one_batched_product_under_vmap():
    def fn(kernel, x):
        return lax.conv(x, kernel, (1, 1), "SAME")

    kernels, x = drawn({"E": 3, "O": 4, "I": 2, "H": 3}, "EOIHH", 0), jnp.ones((2, 2, 5, 5))
    mapped = jax.vmap(experts.as_products(fn), (0, None))
    text = str(jax.make_jaxpr(mapped)(kernels, x))
    assert text.count("dot_general") == 1
    assert "conv_general_dilated" not in text
    assert_close(mapped(kernels, x), jnp.stack([fn(kernel, x) for kernel in kernels]))


def test_inside_nested_calls_and_grouped_left_as_it_is():
    @jax.jit
    def fn(kernel, x):
        return jax.checkpoint(lambda x: lax.conv(x, kernel, (1,), "SAME"))(x)

    def grouped(kernel, x):
        return lax.conv_general_dilated(x, kernel, (1,), "SAME", feature_group_count=2)

    x = drawn({"N": 2, "C": 2, "W": 5}, "NCW", 0)
    kernel = drawn({"O": 2, "I": 2, "W": 3}, "OIW", 1)
    assert convolutions(experts.as_products(fn), kernel, x) == 0
    assert_close(experts.as_products(fn)(kernel, x), fn(kernel, x))
    assert convolutions(experts.as_products(grouped), kernel[:, :1], x) == 1
    assert_close(experts.as_products(grouped)(kernel[:, :1], x), grouped(kernel[:, :1], x))


def test_integers_accumulate_as_the_convolution_does():
    # 100 * 100 * 3 taps = 30000 is no int8.
    def fn(kernel, x):
        return lax.conv(x, kernel, (1,), "VALID", preferred_element_type=jnp.int32)

    x, kernel = jnp.full((1, 1, 4), 100, jnp.int8), jnp.full((1, 1, 3), 100, jnp.int8)
    y = experts.as_products(fn)(kernel, x)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, [[[30000, 30000]]])

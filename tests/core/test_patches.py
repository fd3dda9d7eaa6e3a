"""Every kind of site equals its matrix product."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import core


def conv(layout, **options):
    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["k"], dimension_numbers=layout, **{"window_strides": (1, 1)} | options
        )

    return fn


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


class Case(NamedTuple):
    fn: Callable  # of {"k": kernel} and an input
    kernel: tuple  # its shape
    taken: tuple  # shape of the input
    groups: int  # G


SITES = {
    "dense": Case(lambda p, x: x @ p["k"], (3, 4), (5, 3), 1),
    "kernel on the left": Case(lambda p, x: p["k"] @ x, (4, 3), (3, 5), 1),
    "a vector": Case(lambda p, x: x @ p["k"], (3,), (5, 3), 1),
    "two axes in, two out": Case(
        lambda p, x: jnp.einsum("bhwc,cxhy->bwxy", x, p["k"]), (3, 2, 4, 5), (2, 4, 6, 3), 1
    ),
    "one product for each head": Case(
        lambda p, x: jnp.einsum("bhd,hde->bhe", x, p["k"]), (2, 3, 4), (5, 2, 3), 2
    ),
    "same, strided": Case(
        conv(NHWC, window_strides=(2, 1), padding="SAME"), (3, 3, 2, 4), (2, 5, 6, 2), 1
    ),
    "channels first": Case(conv(NCHW, padding="VALID"), (4, 2, 3, 2), (2, 2, 5, 6), 1),
    "grouped": Case(
        conv(NHWC, padding="SAME", feature_group_count=2), (3, 2, 3, 4), (2, 5, 6, 6), 2
    ),
    "depthwise, dilated": Case(
        conv(NHWC, padding="SAME", feature_group_count=3, rhs_dilation=(2, 2)),
        (3, 3, 1, 6),
        (2, 6, 6, 3),
        3,
    ),
    "transposed": Case(
        conv(NHWC, padding=((1, 2), (1, 2)), lhs_dilation=(2, 2)), (3, 3, 2, 4), (2, 3, 4, 2), 1
    ),
    "experts": Case(
        lambda p, x: jax.vmap(conv(NHWC, padding="SAME"))(p, x), (2, 3, 3, 3, 4), (2, 1, 4, 4, 3), 2
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_a_site_is_its_patches_times_its_matrix(name):
    case = SITES[name]
    a, b = jax.random.split(jax.random.key(0))
    kernel, x = jax.random.normal(a, case.kernel), jax.random.normal(b, case.taken)

    def rule(site, x, kernel, apply):
        y = apply(x, kernel)
        rows, matrix = core.patches(site, x, apply), core.kernel_matrix(site, kernel)
        back = core.kernel_from_matrix(site, matrix)
        return y, (rows, matrix, core.output_matrix(site, y), kernel, back)

    _, records = jax.jit(core.at_sites(case.fn, rule))({"k": kernel}, x)
    rows, matrix, y, as_taken, back = records["k"]
    assert len(rows) == len(matrix) == case.groups
    np.testing.assert_allclose(rows @ matrix, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(back, as_taken)

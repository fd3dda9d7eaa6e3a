"""A site as a batched matrix product: patches (G, P, n) times kernel (G, n, O/G).

G feature groups of a convolution (or batch axes of a product), P positions of the result with the
batch, n weights of one output channel, in the order of the kernel's `kernel_in_axes`. What holds
for a matrix of weights (Gram matrices, norms of inputs, least squares) is written once for it and
then holds for every convolution and product, in any layout.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_jax.core.sites import Site


def patches(
    site: Site, x: jax.Array, apply: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """What each output position of a site sees of its input, as rows.

    `x` and `apply` are what a rule of `at_sites` gets. The result is (G, P, n) of the dtype of `x`:
    `patches @ kernel_matrix(site, kernel)` is `output_matrix(site, apply(x, kernel))`. Taps in the
    padding are zero.
    """
    inner, n = _inner(site)
    others = _others(site)
    # One kernel that picks one tap, for each tap: the operation itself knows strides and padding.
    units = jnp.eye(n, dtype=x.dtype).reshape(n, *inner, *[1] * len(others))
    order = (*site.kernel_in_axes, *others)
    units = jnp.moveaxis(units, range(1, units.ndim), [1 + axis for axis in order])
    for axis, size in zip(*_group_axes(site)):
        units = jnp.repeat(units, size, axis=1 + axis)
    seen = jax.vmap(lambda kernel: apply(x, kernel), out_axes=-1)(units)
    if site.kind == "conv":
        seen = jnp.moveaxis(seen, site.output_axes[0], 0)
    return seen.reshape(groups(site), -1, n)


def kernel_matrix(site: Site, kernel: jax.Array) -> jax.Array:
    """A kernel (as the operation takes it) as (G, n, O/G)."""
    n, count = _inner(site)[1], groups(site)
    if site.kind == "conv":
        rows = jnp.transpose(kernel, (*site.kernel_in_axes, *site.kernel_out_axes))
        return jnp.moveaxis(rows.reshape(n, count, -1), 1, 0)
    order = (*_group_axes(site)[0], *site.kernel_in_axes, *site.kernel_out_axes)
    return jnp.transpose(kernel, order).reshape(count, n, -1)


def kernel_from_matrix(site: Site, matrix: jax.Array) -> jax.Array:
    """The kernel of which `matrix` (G, n, O/G) is the `kernel_matrix`."""
    inner = _inner(site)[0]
    outer = [site.kernel_shape[axis] for axis in site.kernel_out_axes]
    if site.kind == "conv":
        order = (*site.kernel_in_axes, *site.kernel_out_axes)
        ordered = jnp.moveaxis(matrix, 0, 1).reshape(*inner, *outer)
    else:
        axes, sizes = _group_axes(site)
        order = (*axes, *site.kernel_in_axes, *site.kernel_out_axes)
        ordered = matrix.reshape(*sizes, *inner, *outer)
    return jnp.transpose(ordered, [order.index(axis) for axis in range(len(order))])


def output_matrix(site: Site, y: jax.Array) -> jax.Array:
    """What the operation returns as (G, P, O/G)."""
    if site.kind == "conv":
        rows = jnp.moveaxis(y, site.output_axes[0], -1)
        rows = rows.reshape(-1, groups(site), rows.shape[-1] // groups(site))
        return jnp.moveaxis(rows, 1, 0)
    outer = site.output_axes
    rows = jnp.moveaxis(y, outer, range(y.ndim - len(outer), y.ndim))
    width = math.prod(y.shape[axis] for axis in outer)
    return rows.reshape(groups(site), -1, width)


def groups(site: Site) -> int:
    """G: the number of independent matrix products that a site is."""
    return math.prod(_group_axes(site)[1])


def _inner(site):
    """Sizes of the axes that are summed over, and their product n."""
    sizes = [site.kernel_shape[axis] for axis in site.kernel_in_axes]
    return sizes, math.prod(sizes)


def _others(site):
    return [a for a in range(len(site.kernel_shape)) if a not in site.kernel_in_axes]


def _group_axes(site):
    """Axes of the kernel that run over groups, and how many groups each holds."""
    if site.kind == "conv":
        return site.kernel_out_axes, (site.groups,)
    axes = tuple(axis for axis in _others(site) if axis not in site.kernel_out_axes)
    return axes, tuple(site.kernel_shape[axis] for axis in axes)

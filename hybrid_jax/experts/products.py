"""Convolutions as matrix products: the same function where a backend runs those faster.

Mapped over kernels, a convolution becomes a grouped one, and inside a loop XLA compiles it for a
CPU without its fast library: both are several times slower than the convolution alone. A matrix
product stays a (batched) matrix product in either.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax import core


def as_products(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `fn` with every ungrouped convolution as the product of patches and kernel.

    The convolutions of derivatives inside `fn` are replaced too, so a whole training step can be
    handed in; what comes out can be differentiated and mapped. Outputs agree up to rounding. A
    convolution in feature or batch groups stays as it is. The patches take the memory of as many
    inputs as the window has taps. (`core.patches`, which serves any site of a model, picks the taps
    by convolutions of its own.)

    Args:
      fn: Function of pytrees of arrays.

    Example:
      >>> fn = lambda kernel, x: lax.conv(x, kernel, (2,), 'SAME')
      >>> kernel, x = jnp.ones((1, 1, 3)), jnp.arange(4.0).reshape(1, 1, 4)
      >>> as_products(fn)(kernel, x)
      Array([[[3., 5.]]], dtype=float32)
    """

    def products(*args):
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        # Every equation is visited: those of derivatives are no sites of a `core.Graph`.
        outputs, _ = core.evaluate(
            jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(args), _rule, active=lambda path: True
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return products


def _rule(path, eqn, values):
    del path
    params = eqn.params
    if (
        eqn.primitive is lax.conv_general_dilated_p
        and params["feature_group_count"] == params["batch_group_count"] == 1
    ):
        return [_convolve(*values, params)], {}
    return core.bind(eqn, values), {}


def _convolve(x, kernel, params):
    """One convolution as a product: axes are named by 'n', 'c', 'o' and the letters of space."""
    (n, c, *space), (_, _, *kernel_space), _ = params["dimension_numbers"]
    padding = [(0, 0, 0)] * x.ndim
    for axis, (low, high), dilation in zip(space, params["padding"], params["lhs_dilation"]):
        padding[axis] = (low, high, dilation - 1)
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    window = [kernel.shape[axis] for axis in kernel_space]
    steps, strides = params["rhs_dilation"], params["window_strides"]
    positions = [
        (x.shape[axis] - (size - 1) * step - 1) // stride + 1
        for axis, size, step, stride in zip(space, window, steps, strides)
    ]

    def cut(indices, index_strides, sizes, size_strides):
        """Along each axis of space `sizes` elements, apart by `size_strides`."""
        start, stop, stride = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for axis, i, apart, size, step in zip(space, indices, index_strides, sizes, size_strides):
            start[axis], stride[axis] = i * apart, step
            stop[axis] = start[axis] + (size - 1) * step + 1
        return lax.slice(x, start, stop, stride)

    letters = "defg"[: len(space)]
    x_axes, kernel_axes, y_axes = (
        _letters(spec, [*first, *letters])
        for spec, first in zip(params["dimension_numbers"], ("nc", "oc", "no"))
    )
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    if math.prod(window) <= math.prod(positions):
        # t runs over the taps of the window, the letters of space over positions of the result.
        taps = [cut(i, steps, positions, strides) for i in itertools.product(*map(range, window))]
        order = [*kernel_space, *params["dimension_numbers"].rhs_spec[1::-1]]
        rows = jnp.transpose(kernel, order).reshape(len(taps), x.shape[c], -1)
        x_axes = x_axes.replace("c", "tc")
        return jnp.einsum(f"{x_axes},tco->{y_axes}", jnp.stack(taps, c), rows, **options)
    # As in the gradient of a kernel: few positions (t), each the product with a large window.
    windows = [cut(i, strides, window, steps) for i in itertools.product(*map(range, positions))]
    x_axes = x_axes.replace("n", "tn")
    y = jnp.einsum(f"{x_axes},{kernel_axes}->tno", jnp.stack(windows, n), kernel, **options)
    order = [["n", "o", *letters].index(name) for name in y_axes]
    y = jnp.moveaxis(y.reshape(*positions, *y.shape[1:]), (-2, -1), (0, 1))
    return jnp.transpose(y, order)


def _letters(spec, names):
    """The letters of an array's axes in order; `spec` says which axis each name is."""
    return "".join(name for _, name in sorted(zip(spec, names)))

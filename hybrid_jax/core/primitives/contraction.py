"""Convolutions and matrix products: their channels, their sizes, and how often they multiply."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import interpreter
from hybrid_jax.core.labels import Value, sizes
from hybrid_jax.core.primitives.base import PRIMITIVES, Primitive
from hybrid_jax.core.primitives.elementwise import product
from hybrid_jax.core.primitives.moves import left
from hybrid_jax.core.primitives.reduce import zero_stays


def _contract(labels, x, y, i, j):
    labels.tie(x.labels[i], y.labels[j])
    if product(x.rest[i], y.rest[j]) != 0:
        for a in (x.labels[i], y.labels[j]):
            labels.freeze(a, "is contracted where a masked channel counts")


def _dot(labels, params, values, outvars):
    x, y = values
    (x_in, y_in), (x_batch, y_batch) = params["dimension_numbers"]
    for i, j in zip(x_in, y_in, strict=True):
        _contract(labels, x, y, i, j)
    out_labels, out_rest = [], []
    for i, j in zip(x_batch, y_batch, strict=True):
        labels.tie(x.labels[i], y.labels[j])
        out_labels.append(x.labels[i] if not x.labels[i].any() else y.labels[j])
        out_rest.append(zero_stays(product(x.rest[i], y.rest[j])))
    for value, used in ((x, (*x_in, *x_batch)), (y, (*y_in, *y_batch))):
        for axis in range(len(value.shape)):
            if axis not in used:
                out_labels.append(value.labels[axis])
                out_rest.append(zero_stays(value.rest[axis]))
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _dot_macs(eqn: jex.JaxprEqn, operands: Sequence[Value], result: Value) -> int:
    contracted = eqn.params["dimension_numbers"][0][0]
    return math.prod(result.shape) * math.prod(operands[0].shape[axis] for axis in contracted)


def _convolution(labels, params, values, outvars):
    x, kernel = values
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    (x_batch, x_in, *x_space), (k_out, k_in, *k_space) = numbers.lhs_spec, numbers.rhs_spec
    for value, axes in ((x, x_space), (kernel, k_space)):
        for axis in axes:
            labels.freeze(value.labels[axis], "is a spatial axis of a convolution")
    channels, inside, outside = x.labels[x_in], kernel.labels[k_in], kernel.labels[k_out]
    alone = groups > 1 and len(inside) == 1
    if groups == 1:
        _contract(labels, x, kernel, x_in, k_in)
    elif alone:
        # Depthwise: a channel leaves with all the outputs that it alone feeds.
        labels.tie(np.repeat(channels, len(outside) // groups), outside)
    else:
        # Grouped: every group keeps the same places, or the groups would no longer be equal.
        for place in channels.reshape(groups, -1):
            labels.tie(inside, place)
        if product(x.rest[x_in], kernel.rest[k_in]) != 0:
            labels.freeze(inside, "is contracted where a masked channel counts")
        first, *others = outside.reshape(groups, -1)
        for other in others:
            labels.tie(first, other)
    out_labels = [np.zeros(n, np.int32) for n in sizes(outvars[0].aval.shape)]
    out_rest: list[Any] = [None] * len(out_labels)
    batch, feature, *_ = numbers.out_spec
    out_labels[batch], out_rest[batch] = x.labels[x_batch], zero_stays(x.rest[x_batch])
    # A channel of zeros makes zeros, alone with any kernel.
    made = product(x.rest[x_in], kernel.rest[k_out]) if alone else kernel.rest[k_out]
    out_labels[feature], out_rest[feature] = outside, zero_stays(made)
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _convolution_resized(eqn, values, ins, outs):
    groups = eqn.params["feature_group_count"]
    numbers = eqn.params["dimension_numbers"]
    if not outs[0][numbers.out_spec[1]].any():
        # No channel is left, which a convolution in groups refuses.
        return [jnp.zeros(left(eqn.outvars[0].aval.shape, outs[0]), eqn.outvars[0].aval.dtype)]
    if groups > 1 and len(ins[1][numbers.rhs_spec[1]]) == 1:
        groups = int(ins[0][numbers.lhs_spec[1]].sum())
    return interpreter.bind(eqn, values, feature_group_count=groups)


def _convolution_macs(eqn: jex.JaxprEqn, operands: Sequence[Value], result: Value) -> int:
    x, y = (value.shape for value in operands)
    x_spec, y_spec, out_spec = eqn.params["dimension_numbers"]
    meetings = [
        _meetings(x[i], y[j], result.shape[k], *along)
        for i, j, k, *along in zip(
            x_spec[2:],
            y_spec[2:],
            out_spec[2:],
            eqn.params["window_strides"],
            eqn.params["lhs_dilation"],
            eqn.params["rhs_dilation"],
            eqn.params["padding"],
            strict=True,
        )
    ]
    # C of one group times O, for each example.
    channels = y[y_spec[1]] * math.prod(result.shape[axis] for axis in out_spec[:2])
    return channels * math.prod(meetings)


def _meetings(entries, taps, places, stride, dilation, tap_dilation, padding) -> int:
    """How often a tap meets an entry along one axis; zeros of padding or dilation cost nothing."""
    starts = np.arange(places)[:, None] * stride - padding[0]
    met = (starts + np.arange(taps) * tap_dilation) % dilation == 0
    return min(int(met.sum()), entries * taps)


PRIMITIVES |= {
    "dot_general": Primitive(_dot, macs=_dot_macs),
    "conv_general_dilated": Primitive(_convolution, _convolution_resized, macs=_convolution_macs),
}

"""Convolutions, dense layers and pools in C.

Products of integers are calls of the functions in kernels.c with constant descriptors; pools, and
all in floats, are loops over the entries of each window that lie on the input.
"""

import math
from collections.abc import Sequence

import numpy as np

from hybrid_jax import program as p
from hybrid_jax.deploy import c_text
from hybrid_jax.deploy.c_context import (
    Context,
    clamped,
    multiplier,
    requantized,
    result,
    steps,
)
from hybrid_jax.program import arithmetic, integer_step

_ONE = p.Encoding(1.0)


def weighted(op: p.Conv | p.Dense, context: Context) -> str:
    if context.program.in_floats(op):
        return _weighted_floats(op, context)
    (x,), y, weights = op.inputs, op.output, op.weights
    encoding, output = context.encoding(x), context.encoding(y)
    packed, constants = y in context.packed, context.constants
    sums = np.asarray(weights.values, np.int64).sum(tuple(range(weights.values.ndim - 1)))
    bias = arithmetic.integer_bias(weights, encoding) - encoding.zero_point * sums
    factor = arithmetic.multiplier(encoding.scale, weights.scale, output=output or _ONE)
    # What is packed is read as twice what it is.
    bias, factor = bias << packed, np.broadcast_to(factor, bias.shape) / np.float32(1 << packed)
    layer = {
        "weights": constants.array("weights", stored(op, packed)),
        "bias": constants.array("bias", bias.astype(np.int32)),
        "multiplier": constants.array("multiplier", factor),
        "groups": getattr(op, "groups", 1),
        "packed": int(packed),
        "zero": encoding.zero_point,
    }
    function = "depthwise" if _is_depthwise(op) else "conv"
    place = f"arena->bytes + {context.plan.scratch[y]}" if y in context.plan.scratch else "0"
    ends = f"{context.operand(x).pointer}, {context.operand(y).pointer}"
    described = {
        "Window": _window(op, context),
        "Layer": layer,
        "Result": result(output, op.clip),
    }
    fields = ", ".join(f"&{constants.descriptor(*pair)}" for pair in described.items())
    call = f"{function}({ends}, {fields}, {place});"
    value = "{y}" if output else clamped("{y}", op.clip)
    if value == "{y}":
        return call
    made = {"y": context.operand(y)}
    return f"{call}\n{c_text.each(context.shape(y), made, f'{{y}} = {value}')}"


def packs(op: p.Conv | p.Dense, encoding: p.Encoding) -> bool:
    """Whether its weights fit in half a byte, and twice their sums in an int32."""
    axes = tuple(range(op.weights.values.ndim - 1))
    reach = 255 * np.abs(np.asarray(op.weights.values, np.int64)).sum(axes)
    reach += np.abs(arithmetic.integer_bias(op.weights, encoding))
    return op.weights.bits <= 4 and int(reach.max()) < 2**30


def stored(op: p.Conv | p.Dense, packed: bool) -> np.ndarray:
    """The kernels as int8, in the order in which kernels.c reads them."""
    values = np.asarray(op.weights.values)
    if _is_depthwise(op):
        return _in_fours(values.reshape(-1, values.shape[-1]), packed)
    rows = np.ascontiguousarray(np.moveaxis(values, -1, 0)).reshape(values.shape[-1], -1)
    groups = rows.reshape(getattr(op, "groups", 1), -1, rows.shape[1])
    return np.concatenate([part for group in groups for part in _in_pairs(group, packed)])


def _in_pairs(rows, packed):
    """Two features together, four entries at a time, and the last of an odd number alone."""
    even, n = len(rows) // 2 * 2, rows.shape[1]
    low, high = rows[:even:2], rows[1:even:2]
    if packed:
        return _halves(low, high).ravel(), _neighbours(rows[even:]).ravel()
    fours = (np.hstack([low[:, i : i + 4], high[:, i : i + 4]]) for i in range(0, n, 4))
    return np.hstack([*fours]).ravel(), rows[even:].ravel()


def _in_fours(taps, packed):
    """(taps, C): four channels together, two of two taps at a time; those beyond alone."""
    even = taps.shape[1] // 4 * 4
    halves = [np.stack([taps[:, i:even:4], taps[:, i + 1 : even : 4]], 2) for i in (0, 2)]
    # (C / 4, taps · 2) each: the first and the last two channels.
    first, last = (half.transpose(1, 0, 2).reshape(even // 4, 2 * len(taps)) for half in halves)
    rows = taps[:, even:].T
    if packed:
        return np.concatenate([_halves(first, last).ravel(), _neighbours(rows).ravel()])
    fours = (
        np.hstack([first[:, i : i + 4], last[:, i : i + 4]]) for i in range(0, 2 * len(taps), 4)
    )
    return np.concatenate([np.hstack([*fours]).ravel(), rows.ravel()])


def _is_depthwise(op):
    """Whether each channel makes one, so that the channels lie side by side in the kernel too."""
    return (
        isinstance(op, p.Conv)
        and op.groups == op.weights.values.shape[-1] > 1 == (op.weights.values.shape[2])
    )


def _halves(low, high):
    """Two kernels of up to 4 bits in the halves of bytes."""
    low, high = (np.asarray(values, np.int32) // integer_step(4) & 15 for values in (low, high))
    return (low | high << 4).astype(np.uint8).view(np.int8)


def _neighbours(rows):
    """Two neighbours to a byte, the first in the low half; each row from a whole byte."""
    even = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return _halves(even[:, ::2], even[:, 1::2])


def scratch(op: p.Conv | p.Dense, shape: Sequence[int]) -> tuple[int, int, int]:
    """Memory in which kernels.c lays out the windows of a layer, whose output has this shape.

    It is (how many of the first axes of its kernel, bytes for each entry along these, bytes
    beside).
    """
    taps = math.prod(op.weights.values.shape[:2])
    if _is_depthwise(op):
        return 4, 1, 8 * taps
    pixels = math.prod(shape[:2]) if isinstance(op, p.Conv) else 1
    copied = isinstance(op, p.Conv) and (taps > 1 or any(map(any, op.padding)))
    # Of two pixels in int16, whole words of them; and byte by byte.
    each = 6 if copied else 4
    return (3, each, 3 * each) if pixels > 1 else (3, int(copied), 0)


def max_pool(op: p.MaxPool, context: Context) -> str:
    if context.program.in_floats(op):
        start, step = "float value = -INFINITY", "value = larger({x}, value)"
    else:
        start, step = "uint8_t value = 0", "value = {x} > value ? {x} : value"
    return _windows(op, context, start, step, "value")


def average_pool(op: p.AveragePool, context: Context) -> str:
    encoding, output = context.encoding(op.inputs[0]), context.encoding(op.output)
    count = math.prod(op.window) if op.count_padding else 0
    counted = "" if count else ";\ncount++"
    if context.program.in_floats(op):
        value = f"value / {count or 'count'}"
        return _windows(op, context, "float value = 0.0f", "value += {x}" + counted, value)
    if count:
        factor = multiplier([encoding], output, count)
    else:
        given, made = (c_text.literal(np.float32(e.scale)) for e in (encoding, output or _ONE))
        factor = f"({given} / ({made} * (float)(count ? count : 1)))"
    step = f"value += {steps('{x}', encoding)}" + counted
    return _windows(op, context, "int32_t value = 0", step, requantized("value", factor, output))


def _window(op, context):
    shape, output, *sides = _geometry(op, context)
    down, across = (
        dict(
            zip(
                ("length", "outputs", "window", "stride", "padding", "dilation"),
                (shape[i], output[i], *(side[i] for side in sides)),
                strict=True,
            )
        )
        for i in range(2)
    )
    for axis in (down, across):
        axis["padding"] = axis["padding"][0]
    return {"down": down, "across": across, "channels": shape[2], "features": output[2]}


def _geometry(op, context):
    """(H, W, C), (H', W', O), window, strides, padding, dilation; of a dense layer one place."""
    shape, output = context.shape(op.inputs[0]), context.shape(op.output)
    once, none = (1, 1), ((0, 0), (0, 0))
    if isinstance(op, p.Dense):
        return (1, 1, *shape), (1, 1, *output), once, once, none, once
    if isinstance(op, p.Conv):
        return shape, output, op.weights.values.shape[:2], op.strides, op.padding, op.dilation
    return shape, output, op.window, op.strides, op.padding, once


def _weighted_floats(op, context):
    weights = op.weights
    values = np.asarray(weights.values)
    if weights.scale is not None:
        values = values.astype(np.float32) * weights.scale
    arrays = [
        context.constants.array(*pair) for pair in (("weights", values), ("bias", weights.bias))
    ]
    value = clamped("value", op.clip)
    return _windows(op, context, "float value = {b}", "value += {x} * {w}", value, arrays)


def _windows(op, context, start, step, value, arrays=()):
    """Of each window a start, a statement for each entry on the input, and the result.

    Of a pool each channel is a group of its own.
    """
    shape, output, window, strides, padding, dilation = _geometry(op, context)
    (height, width, channels), features = shape, output[2]
    groups = getattr(op, "groups", 1) if arrays else channels
    depth, each_makes = channels // groups, features // groups
    line = width * channels
    (top, _), (left, _) = padding
    x, y = context.operand(op.inputs[0]), context.operand(op.output)
    (rows, columns), (below, beside) = strides, dilation
    places = x.offset - top * line - left * channels
    # {letter: operand along the places of the result, its strides along those of the window}.
    made = {
        "x": (
            c_text.Operand(x.array, places, (rows * line, columns * channels, depth, 0)),
            (below * line, beside * channels, 1),
        )
    }
    for letter, array in zip("wb", arrays, strict=False):
        inside = (window[1] * depth * features, depth * features, features)
        made[letter] = c_text.Operand(array, 0, (0, 0, each_makes, 1)), inside
    outside = max(max(pair) for pair in padding) > 0
    if outside:
        made["r"] = c_text.Operand("", -top, (rows, 0, 0, 0)), (below, 0, 0)
        made["c"] = c_text.Operand("", -left, (0, columns, 0, 0)), (0, beside, 0)
    y_strides = (output[1] * features, features, each_makes, 1)
    operands = {letter: operand for letter, (operand, _) in made.items()}
    operands["y"] = y._replace(strides=y_strides)

    def tap(at):
        entries = {letter: operand.entry for letter, operand in at.items()}
        statements = step.format(**entries) + ";"
        if not outside:
            return statements
        on = f"(uint32_t)({at['r'].index}) < {height}u && (uint32_t)({at['c'].index}) < {width}u"
        return f"if ({on}) {c_text.block(statements)}"

    def entry(at):
        along = {k: at[k]._replace(strides=inner) for k, (_, inner) in made.items() if k != "b"}
        lines = [
            f"{start.format(**{k: operand.entry for k, operand in at.items()})};",
            c_text.each((*window, depth), along, tap, "k"),
            f"{at['y'].entry} = {value};",
        ]
        return "\n".join(["int32_t count = 0;"] * ("count" in value) + lines)

    return c_text.each((*output[:2], groups, each_makes), operands, entry)

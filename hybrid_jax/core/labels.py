"""Channel labels: how each primitive ties, passes on or freezes the indices of its axes.

Every index of every axis of an array carries a label, an integer. Two labels that an equation
*ties* can only be removed together. Label 0 is never removed; a *frozen* label is not either, and
says why. Next to its labels an axis knows its `rest`: the value that the array holds at an index
whose channel is masked (its parameters zero), or None if that is not one known number. What is
reduced over may lose an index only where the rest is neutral, as in Σ x with rest 0.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

INPUT, TANGENT = "input", "tangent"
Origin = frozenset[str] | str
"""Paths of the parameters that an array is computed from alone, or INPUT, or TANGENT."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What is known of an array: per axis its labels (int32[n]) and rest, and where it is from."""

    labels: tuple[np.ndarray, ...]
    rest: tuple[float | None, ...]
    origin: Origin
    constant: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(len(labels) for labels in self.labels)


def sizes(shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape with 1 for every symbolic dimension: as no channel axis is one, it has no labels."""
    return tuple(int(n) if isinstance(n, int | np.integer) else 1 for n in shape)


class Labels:
    """The labels given out so far, the pairs tied, and the labels frozen with the reason."""

    def __init__(self):
        self.count = 1
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, str]] = []

    def fresh(self, n: int) -> np.ndarray:
        """Gives n labels that nothing carries yet."""
        labels = np.arange(self.count, self.count + n, dtype=np.int32)
        self.count += n
        return labels

    def axis(self, n: int) -> np.ndarray:
        """Labels of a new axis; the only index of an axis is never removed."""
        return np.zeros(1, np.int32) if n == 1 else self.fresh(n)

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """These may not be removed."""
        if labels.any():
            self.frozen.append((labels, reason))

    def tie(self, a: np.ndarray, b: np.ndarray, reason: str = "is tied to an axis of the input"):
        """a[i] and b[i] can only be removed together."""
        if a is b or not (a.any() or b.any()):
            return
        both = (a != 0) & (b != 0)
        self.edges.append((a[both], b[both]))
        self.freeze(a[b == 0], reason)
        self.freeze(b[a == 0], reason)

    def value(self, shape: Sequence[int], origin: Origin, rest=None, constant=None) -> Value:
        """A value with fresh labels on every axis."""
        labels = tuple(self.axis(n) for n in sizes(shape))
        return Value(labels, (rest,) * len(shape), origin, constant)


def propagate(labels: Labels, eqn: jex.JaxprEqn, values: list[Value]) -> list[Value]:
    """Labels of an equation's outputs, tying and freezing as its primitive demands.

    A primitive without a rule here is a barrier: its inputs are frozen and its outputs start with
    fresh labels, since they can be computed in full and sliced afterwards.
    """
    name = eqn.primitive.name
    origin = join_origins(values)
    if name in ELEMENTWISE:
        return [_elementwise(labels, eqn, values, origin)]
    rule = RULES.get(name)
    outs = rule(labels, eqn.params, values, eqn.outvars) if rule else None
    if outs is None:
        return barrier(labels, eqn, values, f"goes through {name}")
    for out in outs:
        for axis in out.labels:
            if len(axis) == 1:
                labels.freeze(axis, "is picked out alone")
    return [dataclasses.replace(out, origin=origin) for out in outs]


def barrier(labels: Labels, eqn: jex.JaxprEqn, values: list[Value], reason: str) -> list[Value]:
    """Freezes every input; outputs are computed in full and may be sliced."""
    for value in values:
        for axis in value.labels:
            labels.freeze(axis, reason)
    return [labels.value(v.aval.shape, join_origins(values)) for v in eqn.outvars]


def join_origins(values: Sequence[Value]) -> Origin:
    """Where something computed from all these comes from."""
    origins = [value.origin for value in values]
    for strong in (TANGENT, INPUT):
        if strong in origins:
            return strong
    return frozenset().union(*origins)


def common(values: Sequence[float | None]) -> float | None:
    """The one value they all have, or None."""
    first = values[0] if values else None
    return first if all(value == first for value in values) else None


def _unary(f: Callable[[float], float]) -> Callable[..., float | None]:
    return lambda params, x: None if x is None else f(x)


def _product(params, x, y):
    # 0 times anything is 0, known or not.
    if x == 0 or y == 0:
        return 0.0
    return None if x is None or y is None else x * y


def _quotient(params, x, y):
    if x == 0 and y != 0:
        return 0.0
    return None if x is None or y is None else x / y


def _binary(f: Callable[[float, float], float]) -> Callable[..., float | None]:
    return lambda params, x, y: None if x is None or y is None else f(x, y)


def _select(params, which, *cases):
    return common(cases)


def _clamp(params, low, x, high):
    return None if None in (low, x, high) else min(max(x, low), high)


def _power(params, x):
    return None if x is None else x ** params["y"]


def _logistic(x):
    return 1 / (1 + math.exp(-x))


def _unknown(params, *args):
    return None


def _table() -> dict[str, Callable[..., float | None]]:
    same = _unary(lambda x: x)
    passing = "copy copy_p convert_element_type reduce_precision stop_gradient name real"
    table = dict.fromkeys([*passing.split(), "sharding_constraint"], same)
    table |= {
        "add": _binary(lambda x, y: x + y),
        "add_any": _binary(lambda x, y: x + y),
        "sub": _binary(lambda x, y: x - y),
        "max": _binary(max),
        "min": _binary(min),
        "mul": _product,
        "div": _quotient,
        "integer_pow": _power,
        "select_n": _select,
        "clamp": _clamp,
        "neg": _unary(lambda x: -x),
        "abs": _unary(abs),
        "sign": _unary(lambda x: float(np.sign(x))),
        "floor": _unary(math.floor),
        "ceil": _unary(math.ceil),
        "round": _unary(round),
        "square": _unary(lambda x: x * x),
        "sqrt": _unary(math.sqrt),
        "rsqrt": _unary(lambda x: 1 / math.sqrt(x)),
        "exp": _unary(math.exp),
        "expm1": _unary(math.expm1),
        "log": _unary(math.log),
        "log1p": _unary(math.log1p),
        "tanh": _unary(math.tanh),
        "logistic": _unary(_logistic),
        "erf": _unary(math.erf),
        "erfc": _unary(math.erfc),
        "sin": _unary(math.sin),
        "cos": _unary(math.cos),
    }
    unknown = (
        "pow rem nextafter atan2 exp2 tan asin acos atan sinh cosh asinh acosh atanh erf_inv "
        "lgamma digamma cbrt is_finite eq ne lt le gt ge and or xor not shift_left "
        "shift_right_logical shift_right_arithmetic imag complex conj population_count clz "
        "bitcast_convert_type"
    )
    return table | dict.fromkeys(unknown.split(), _unknown)


ELEMENTWISE = _table()
"""Element-wise primitives -> their value on numbers, where None means not known."""


def _rest(f, params, args) -> float | None:
    try:
        value = f(params, *args)
    except (ArithmeticError, ValueError):
        return None
    return value if value is None or math.isfinite(value) else None


def _elementwise(labels, eqn, values, origin) -> Value:
    """Ties the axes of equal size; an axis of size 1 or a scalar broadcasts."""
    f, shape = ELEMENTWISE[eqn.primitive.name], sizes(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "bitcast_convert_type" and values[0].shape != shape:
        return barrier(labels, eqn, values, "goes through bitcast_convert_type")[0]
    out_labels, out_rest = [], []
    for axis, size in enumerate(shape):
        full = [v for v in values if v.labels and len(v.labels[axis]) == size]
        for other in full[1:]:
            labels.tie(full[0].labels[axis], other.labels[axis])
        # Elsewhere a frozen axis decides: label 0 must not be hidden behind a fresh one.
        zero = [v for v in full if not v.labels[axis].any()]
        out_labels.append((zero or full)[0].labels[axis])
        args = [v.rest[axis] if any(v is u for u in full) else v.constant for v in values]
        out_rest.append(_rest(f, eqn.params, args))
    constant = _rest(f, eqn.params, [v.constant for v in values])
    return Value(tuple(out_labels), tuple(out_rest), origin, constant)


def _broadcast(labels, params, values, outvars):
    x, shape = values[0], sizes(outvars[0].aval.shape)
    out_labels: list[Any] = [None] * len(shape)
    out_rest: list[Any] = [x.constant] * len(shape)
    for axis, out in enumerate(params["broadcast_dimensions"]):
        if len(x.labels[axis]) == shape[out]:
            out_labels[out], out_rest[out] = x.labels[axis], x.rest[axis]
    filled = [labels.axis(n) if a is None else a for n, a in zip(shape, out_labels, strict=True)]
    return [Value(tuple(filled), tuple(out_rest), x.origin, x.constant)]


def segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest runs of axes with equal products.

    Example:
      >>> segments((2, 4, 4, 8), (2, 128))
      [([0], [0]), ([1, 2, 3], [1])]
    """
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right, a, b = [], [], 1, 1
        while not left or not right or a != b:
            if (a <= b and i < len(old)) or j >= len(new):
                if i >= len(old):
                    break
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        runs.append((left, right))
    return runs


def _reshape(labels, params, values, outvars):
    x, shape = values[0], sizes(outvars[0].aval.shape)
    if params.get("dimensions") is not None or 0 in shape:
        return None
    out_labels = [np.zeros(n, np.int32) for n in shape]
    out_rest: list[Any] = [x.constant] * len(shape)
    for old, new in segments(x.shape, shape):
        old = [axis for axis in old if len(x.labels[axis]) > 1]
        new = [axis for axis in new if shape[axis] > 1]
        live = [axis for axis in old if x.labels[axis].any()]
        if not old or not live:
            continue
        axis, position = live[0], old.index(live[0])
        if len(live) == 1 and len(new) == 1:
            # Merging: the one live axis, tiled by those after it and repeated by those before.
            lengths = [len(x.labels[a]) for a in old]
            spread = x.labels[axis].reshape([-1 if i == position else 1 for i in range(len(old))])
            out_labels[new[0]] = np.broadcast_to(spread, lengths).reshape(-1)
            out_rest[new[0]] = x.rest[axis]
        elif len(old) == 1:
            # Splitting: the last axis stays live, tied over all the others.
            rows = x.labels[axis].reshape(-1, shape[new[-1]])
            for row in rows[1:]:
                labels.tie(rows[0], row)
            out_labels[new[-1]], out_rest[new[-1]] = rows[0], x.rest[axis]
        else:
            for a in live:
                labels.freeze(x.labels[a], "is reshaped together with another live axis")
    return [Value(tuple(out_labels), tuple(out_rest), x.origin, x.constant)]


def _reorder(f):
    """A primitive that permutes, drops or keeps whole axes: f(params, rank) -> source axes."""

    def rule(labels, params, values, outvars):
        x, axes = values[0], f(params, values[0])
        picked = tuple(x.labels[a] for a in axes), tuple(x.rest[a] for a in axes)
        return [Value(*picked, x.origin, x.constant)]

    return rule


def _squeeze_axes(params, x):
    dropped = {a % len(x.shape) for a in params["dimensions"]}
    return [a for a in range(len(x.shape)) if a not in dropped]


def _reduce(neutral: float | None, keeps: Callable[[float | None], float | None]):
    """A reduction whose masked entries must equal `neutral`, or the axis is frozen."""

    def rule(labels, params, values, outvars):
        x = values[0]
        for axis in params["axes"]:
            if neutral is None or x.rest[axis] != neutral:
                labels.freeze(x.labels[axis], "is reduced over where a masked channel counts")
        kept = [axis for axis in range(len(x.shape)) if axis not in params["axes"]]
        rest = tuple(keeps(x.rest[axis]) for axis in kept)
        return [Value(tuple(x.labels[axis] for axis in kept), rest, x.origin)] * len(outvars)

    return rule


def _zero_stays(rest):
    return 0.0 if rest == 0 else None


def _concatenate(labels, params, values, outvars):
    where, first = params["dimension"], values[0]
    for other in values[1:]:
        for axis in range(len(first.shape)):
            if axis != where:
                labels.tie(first.labels[axis], other.labels[axis])
    joined = np.concatenate([value.labels[where] for value in values])
    out = tuple(joined if axis == where else a for axis, a in enumerate(first.labels))
    rest = tuple(common([v.rest[axis] for v in values]) for axis in range(len(out)))
    return [Value(out, rest, first.origin, common([v.constant for v in values]))]


def _stack(labels, params, values, outvars):
    first, where = values[0], params["axis"]
    for other in values[1:]:
        for a, b in zip(first.labels, other.labels, strict=True):
            labels.tie(a, b)
    new = np.zeros(len(values), np.int32)
    rest = [common([v.rest[axis] for v in values]) for axis in range(len(first.shape))]
    out_labels = (*first.labels[:where], new, *first.labels[where:])
    return [Value(out_labels, (*rest[:where], None, *rest[where:]), first.origin)]


def _slice(labels, params, values, outvars):
    x = values[0]
    strides = params["strides"] or (1,) * len(x.shape)
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    symbolic = [not isinstance(n, int | np.integer) for n in outvars[0].aval.shape]
    out = tuple(
        a if whole else a[slice(*cut)]
        for a, cut, whole in zip(x.labels, cuts, symbolic, strict=True)
    )
    return [Value(out, x.rest, x.origin, x.constant)]


def _split(labels, params, values, outvars):
    x, where = values[0], params["axis"]
    pieces = np.split(x.labels[where], np.cumsum(params["sizes"])[:-1])
    return [
        Value(
            tuple(piece if a == where else b for a, b in enumerate(x.labels)),
            x.rest,
            x.origin,
            x.constant,
        )
        for piece in pieces
    ]


def _pad(labels, params, values, outvars):
    x, filler = values
    out_labels, out_rest = [], []
    for axis, rest, (low, high, inside) in zip(
        x.labels, x.rest, params["padding_config"], strict=True
    ):
        if inside or low < 0 or high < 0:
            labels.freeze(axis, "is padded between its channels or cut by a negative pad")
            size = len(axis) + (len(axis) - 1) * inside + low + high
            out_labels.append(np.zeros(size, np.int32))
            out_rest.append(None)
        else:
            out_labels.append(np.concatenate([labels.fresh(low), axis, labels.fresh(high)]))
            out_rest.append(common([rest, filler.constant]) if low or high else rest)
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _tile(labels, params, values, outvars):
    x = values[0]
    out = tuple(np.tile(a, n) for a, n in zip(x.labels, params["reps"], strict=True))
    return [Value(out, x.rest, x.origin, x.constant)]


def _along(parameter: str):
    """A primitive that mixes one axis and treats the others alike (cumsum, sort, reverse, …)."""

    def rule(labels, params, values, outvars):
        where = np.atleast_1d(params[parameter])
        for value in values:
            for axis in where:
                labels.freeze(value.labels[axis], "is mixed along by a scan or sort")
            for a, b in zip(values[0].labels, value.labels, strict=True):
                labels.tie(a, b)
        x = values[0]
        return [Value(x.labels, (None,) * len(x.shape), x.origin)] * len(outvars)

    return rule


def _dynamic(sizes: Callable[[dict, list[Value]], Sequence[int]]):
    """dynamic_slice: an axis taken whole passes, another is frozen."""

    def rule(labels, params, values, outvars):
        x, out_labels, out_rest = values[0], [], []
        for axis, size in enumerate(sizes(params, values)):
            whole = size == len(x.labels[axis])
            if not whole:
                labels.freeze(x.labels[axis], "is sliced at a computed index")
            out_labels.append(x.labels[axis] if whole else np.zeros(size, np.int32))
            out_rest.append(x.rest[axis] if whole else None)
        return [Value(tuple(out_labels), tuple(out_rest), x.origin)]

    return rule


def gather_axes(params, shape: Sequence[int]) -> dict[int, int]:
    """Operand axes that a gather takes whole -> their axis in the output."""
    numbers = params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(len(shape)) if axis not in gone]
    return {
        axis: out
        for axis, out in zip(kept, numbers.offset_dims, strict=True)
        if params["slice_sizes"][axis] == shape[axis] and axis not in numbers.start_index_map
    }


def _gather(labels, params, values, outvars):
    x, indices = values
    whole = gather_axes(params, x.shape)
    for axis, a in enumerate(x.labels):
        if axis not in whole:
            labels.freeze(a, "is gathered from")
    for a in indices.labels:
        labels.freeze(a, "indexes a gather")
    out_labels = [np.zeros(n, np.int32) for n in sizes(outvars[0].aval.shape)]
    out_rest: list[Any] = [None] * len(out_labels)
    for axis, out in whole.items():
        out_labels[out], out_rest[out] = x.labels[axis], x.rest[axis]
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _contract(labels, x, y, i, j):
    labels.tie(x.labels[i], y.labels[j])
    if _product(None, x.rest[i], y.rest[j]) != 0:
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
        out_rest.append(_zero_stays(_product(None, x.rest[i], y.rest[j])))
    for value, used in ((x, (*x_in, *x_batch)), (y, (*y_in, *y_batch))):
        for axis in range(len(value.shape)):
            if axis not in used:
                out_labels.append(value.labels[axis])
                out_rest.append(_zero_stays(value.rest[axis]))
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


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
    if groups == 1:
        _contract(labels, x, kernel, x_in, k_in)
    elif len(inside) == 1:
        # Depthwise: a channel leaves with all the outputs that it alone feeds.
        labels.tie(np.repeat(channels, len(outside) // groups), outside)
    else:
        # Grouped: every group keeps the same places, or the groups would no longer be equal.
        for place in channels.reshape(groups, -1):
            labels.tie(inside, place)
        if _product(None, x.rest[x_in], kernel.rest[k_in]) != 0:
            labels.freeze(inside, "is contracted where a masked channel counts")
        first, *others = outside.reshape(groups, -1)
        for other in others:
            labels.tie(first, other)
    out_labels = [np.zeros(n, np.int32) for n in sizes(outvars[0].aval.shape)]
    out_rest: list[Any] = [None] * len(out_labels)
    batch, feature, *_ = numbers.out_spec
    out_labels[batch], out_rest[batch] = x.labels[x_batch], _zero_stays(x.rest[x_batch])
    out_labels[feature], out_rest[feature] = outside, _zero_stays(kernel.rest[k_out])
    return [Value(tuple(out_labels), tuple(out_rest), x.origin)]


def _window(keeps: Callable[[float | None], float | None]):
    """Pooling: an axis with window 1 passes, another is frozen."""

    def rule(labels, params, values, outvars):
        x, out_labels, out_rest = values[0], [], []
        for axis, size in enumerate(sizes(outvars[0].aval.shape)):
            trivial = params["window_dimensions"][axis] == 1 and size == x.shape[axis]
            if not trivial:
                labels.freeze(x.labels[axis], "is pooled over")
            out_labels.append(x.labels[axis] if trivial else np.zeros(size, np.int32))
            out_rest.append(keeps(x.rest[axis]) if trivial else None)
        return [Value(tuple(out_labels), tuple(out_rest), x.origin)]

    return rule


def _same(rest):
    return rest


RULES = {
    "optimization_barrier": lambda labels, params, values, outvars: values,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reorder(_squeeze_axes),
    "transpose": _reorder(lambda params, x: params["permutation"]),
    "reduce_sum": _reduce(0.0, _zero_stays),
    "reduce_max": _reduce(None, _same),
    "reduce_min": _reduce(None, _same),
    "reduce_prod": _reduce(1.0, _zero_stays),
    "reduce_and": _reduce(None, lambda rest: None),
    "reduce_or": _reduce(None, lambda rest: None),
    "argmax": _reduce(None, lambda rest: None),
    "argmin": _reduce(None, lambda rest: None),
    "concatenate": _concatenate,
    "stack": _stack,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "tile": _tile,
    "rev": _along("dimensions"),
    "cumsum": _along("axis"),
    "cumprod": _along("axis"),
    "cummax": _along("axis"),
    "cummin": _along("axis"),
    "cumlogsumexp": _along("axis"),
    "sort": _along("dimension"),
    "dynamic_slice": _dynamic(lambda params, values: params["slice_sizes"]),
    "gather": _gather,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _window(_same),
    "reduce_window_min": _window(_same),
    "reduce_window_sum": _window(_zero_stays),
}
"""Primitives -> rule(labels, params, values, outvars) -> output values, or None for a barrier."""


def is_contraction(eqn: jex.JaxprEqn) -> bool:
    """Whether the equation multiplies and accumulates."""
    return eqn.primitive.name in ("conv_general_dilated", "dot_general")


def literal(value: Any, labels: Labels) -> Value:
    """The value of a constant known while tracing."""
    known = not isinstance(value, jax.core.Tracer) and np.ndim(value) == 0
    known = known and jnp.issubdtype(jnp.result_type(value), jnp.number)
    constant = float(value) if known and np.isrealobj(value) else None
    return labels.value(np.shape(value), frozenset(), constant=constant)

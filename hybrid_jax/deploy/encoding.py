"""From an inference graph in floats to one in integers: which tensor is stored how.

A tensor has the encoding of the site that reads it, so that the site computes with the integers
that it was trained with. Where several sites read it with different ranges, or something else reads
it too and the site's bits are few, the tensor gets 8 bits and the range of its join, or one of its
own, and a `Convert` stands before the site. Pools, reshapes and the like share their input's
encoding.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hybrid_jax import core, quantization
from hybrid_jax.deploy import reference
from hybrid_jax.deploy.builder import Source
from hybrid_jax.deploy.operations import evaluate, rounded
from hybrid_jax.deploy.program import (
    SAME_ENCODING,
    AveragePool,
    Concatenate,
    Conv,
    Convert,
    Dense,
    Encoding,
    Lookup,
    Mean,
    Multiply,
    Program,
    Softmax,
    Tensor,
    Weights,
)

# What LiteRT's kernels of these functions return, whatever the values are.
_FIXED = {"logistic": Encoding(1 / 256), "tanh": Encoding(1 / 128, 128)}
_MAY_RETURN_FLOATS = (Conv, Dense, Multiply, Mean, AveragePool)


def encode(
    program: Program,
    sources: Mapping[str, Source],
    joins: Mapping[str, str],
    spec: quantization.Spec,
    ranges: Mapping[str, Any],
    x: np.ndarray,
) -> Program:
    """Quantizes an inference graph as `lower` states.

    Args:
      program: In floats.
      sources: {site name: what its weights were made of}.
      joins: {tensor: name of the join that it takes part in}.
      spec: How each site is quantized, and perhaps each join.
      ranges: {site name: {'weight': Range, 'activation': Range}}, of joins the latter alone.
      x: float32 (B, …), for the ranges of what enters neither.
    """
    known = {own.name for own in spec.joins}
    joins = {tensor: spec[name] for tensor, name in joins.items() if name in known}
    kernels, grids = _on_grids(sources, joins.values(), spec, ranges)
    weights = {
        op.name: _integers(op, sources[op.name], spec, kernels.get(op.name))
        if op.name in sources
        else _signs(op.weights)
        for op in program.weighted
    }
    wanted = {name: _activation(spec[name].activation, grids.get(name)) for name in sources}
    given = {tensor: _of_join(join, wanted, grids) for tensor, join in joins.items()}
    spans = _spans(program, weights, wanted, x)
    encodings = _choose(program, wanted, given, spans)
    wanted, encodings = _within_ratio(wanted, encodings)
    return _rebuild(program, weights, wanted, encodings)


def _on_grids(sources, joins, spec, ranges):
    """{site: (integers, scale)} of kernels, and {site or join: Grid} of activations.

    All are computed at once: one by one, compiling them takes longer than all else.
    """
    spans: dict[str, dict[str, Any]] = {"weight": {}, "activation": {}}
    for name in sources:
        for role, schemes in _SCHEMES.items():
            quantizer = getattr(spec[name], role)
            if quantizer.bits == quantization.OFF:
                continue
            if quantizer.scheme not in schemes:
                raise ValueError(
                    f"{role} of {name!r} must be {' or '.join(schemes)} to be integers, "
                    f"got {quantizer.scheme}"
                )
            if quantizer.group is not None:
                raise ValueError(
                    f"{role} of {name!r} must have one scale for each output channel, "
                    f"got groups of {quantizer.group}"
                )
            spans[role][name] = _span(spec[name].range_site(role), role, quantizer, ranges)
    for join in joins:
        spans["activation"][join.name] = _span(join.name, "activation", join.activation, ranges)

    def compute(spans, kernels):
        made = {}
        for name, span in spans["weight"].items():
            grid = spec[name].weight.grid(span)
            made[name] = quantization.quantize(kernels[name], grid), grid.scale
        grids = {name: spec[name].activation.grid(s) for name, s in spans["activation"].items()}
        return made, grids

    kernels = {name: source.kernel for name, source in sources.items()}
    return jax.device_get(jax.jit(compute)(spans, kernels))


_SCHEMES = {"weight": ("symmetric", "binary"), "activation": ("affine", "symmetric")}


def _integers(op, source, spec, made) -> Weights:
    """The integers of a site's kernel, with what follows it in their scales."""
    if made is None:
        return op.weights
    values, scale = made
    quantizer = spec[op.name].weight
    values = source.arrange(values).astype(np.int32)
    if quantizer.scheme == "binary":
        values, scale = 2 * values - 1, scale / np.float32(2)
    outputs = source.arrange(scale).reshape(-1, source.shape[-1])[0] * source.scale
    sign = np.sign(outputs).astype(np.int8)
    used = np.maximum(np.abs(outputs), quantization.LEAST_SCALE).astype(np.float32)
    values = values * sign
    # As large as [−63, 63] holds them, the accumulator's steps are the finest for the bias.
    bits = _room(values, quantizer.bits)
    step = quantization.integer_step(bits)
    high = (values * step).astype(np.int8)
    return Weights(high, used / np.float32(step), op.weights.bias, bits)


def _room(values, bits):
    """The fewest bits, from `bits` on, that hold the values and leave half an int32 to the bias."""
    fewest = bits if values.all() else max(bits, 2)  # signs times zero are no signs
    reach = 255 * np.abs(values).sum(tuple(range(values.ndim - 1)), np.int64).max()
    enough = (b for b in range(fewest, 8) if reach * quantization.integer_step(b) < 2**30)
    return next(enough, 8)


def _within_reach(weights: Weights, x: Encoding | None) -> Weights:
    """The weights with the bias of each channel within 2^30 steps of the accumulator.

    Only a channel that is all but dead beside its bias has more. It gets a larger scale, and its
    kernel is rounded to that: what it adds is then right to a billionth of the bias.
    """
    if weights.scale is None or x is None:
        return weights
    scale = np.maximum(weights.scale, np.abs(weights.bias) / np.float32(x.scale * 2**30))
    if (scale == weights.scale).all():
        return weights
    bits = max(weights.bits, 2)  # signs that become zero are no signs
    step = quantization.integer_step(bits)
    values = np.rint(weights.values / step * (weights.scale / scale)) * step
    return Weights(values.astype(np.int8), scale.astype(np.float32), weights.bias, bits)


def _signs(weights: Weights) -> Weights:
    """A 1×1 depthwise kernel in integers: its size is all in the scale of the channel."""
    signs = np.sign(weights.values).astype(np.int8)
    size = np.abs(weights.values.reshape(-1))
    scale = (np.where(size == 0, size.max() or 1, size) / 127).astype(np.float32)
    return Weights(127 * signs, scale, weights.bias, 8)


def _activation(quantizer, grid) -> Encoding | None:
    if grid is None:
        return None
    shift = 128 if quantizer.scheme == "symmetric" else 0
    ends = (int(end) + shift for end in (grid.zero_point, grid.low, grid.high))
    return Encoding(float(grid.scale), *ends)


def _of_join(join, wanted, grids) -> Encoding:
    """The encoding of a join's tensor: that of the site which takes it, if in as many bits."""
    own = _activation(join.activation, grids[join.name])
    taken = wanted.get(join.shares)
    return taken if taken is not None and taken.high - taken.low >= 254 else own


def _span(name, role, quantizer, ranges):
    if quantizer.learning == "dynamic":
        raise ValueError(f"{role} of {name!r} must have a range that is known, got 'dynamic'")
    return quantization.range_at(ranges, name, role, None if role == "weight" else ())


def _spans(program, weights, wanted, x) -> dict[str, tuple[float, float]]:
    """The ends of every tensor's values for `x`, with the sites computing as quantized."""

    def step(op, values, encodings, output, shape, form):
        del encodings, output  # the program is one of floats
        if isinstance(op, Conv | Dense):
            given, encoding = weights[op.name], wanted.get(op.name)
            if given.scale is not None:
                floats = given.values * given.scale
                op = dataclasses.replace(op, weights=Weights(floats, None, given.bias))
            if encoding is not None:
                values = [rounded(values[0], encoding)]
        return evaluate(op, values, [None] * len(values), None, shape, form)

    @jax.jit
    def see(x):
        made = reference.trace_tensors(program, x, step=step)
        return {name: (value.min(), value.max()) for name, value in made.items()}

    seen = see(x)
    core.check_finite("the values that tensors take for x", seen)
    return {name: (float(low), float(high)) for name, (low, high) in seen.items()}


def _choose(program, wanted, given, spans) -> dict[str, Encoding | None]:
    """The encoding of every tensor; those of one class have the same."""
    readers = collections.Counter(name for op in program.operations for name in op.inputs)
    root = {name: name for name in program.tensors}

    def find(name):
        while root[name] != name:
            name = root[name]
        return name

    for op in program.operations:
        if isinstance(op, SAME_ENCODING):
            root[find(op.output)] = find(op.inputs[0])
        if isinstance(op, Concatenate):
            for name in op.inputs:
                if readers[name] == 1 and find(name) not in (program.input, find(op.output)):
                    root[find(name)] = find(op.output)
    asked: dict[str, set] = collections.defaultdict(set)
    others: dict[str, int] = collections.Counter()
    makers = {find(op.output): op for op in program.operations if not isinstance(op, SAME_ENCODING)}
    floats = {find(op.inputs[0]) for op in program.operations if isinstance(op, Softmax)}
    floats |= {find(op.output) for op in program.operations if isinstance(op, Softmax)}
    for op in program.operations:
        for name in op.inputs:
            if isinstance(op, Conv | Dense) and op.name in wanted:
                asked[find(name)].add(wanted[op.name])
            elif not isinstance(op, (*SAME_ENCODING, Softmax)) and not (
                isinstance(op, Concatenate) and find(name) == find(op.output)
            ):
                others[find(name)] += 1
    ends = floats | {find(program.output)}
    members = collections.defaultdict(list)
    for name in program.tensors:
        members[find(name)].append(name)

    def of_class(name):
        sites = asked[name]
        if name in ends and not sites and not others[name]:
            if isinstance(makers.get(name), _MAY_RETURN_FLOATS):
                return None
        elif len(sites) == 1:
            (only,) = sites
            if not others[name] or (only is not None and only.high - only.low >= 254):
                return only
        maker = makers.get(name)
        if isinstance(maker, Lookup) and maker.function in _FIXED:
            return _FIXED[maker.function]
        for member in members[name]:
            if member in given:
                return given[member]
        low = min(0.0, *(spans[member][0] for member in members[name]))
        high = max(0.0, *(spans[member][1] for member in members[name]))
        scale = np.float32(max((high - low) / 255, quantization.LEAST_SCALE))
        return Encoding(float(scale), int(np.clip(np.rint(-low / scale), 0, 255)))

    chosen = {name: of_class(name) for name in members}
    return {name: chosen[find(name)] for name in program.tensors}


def _within_ratio(*of_tensors):
    """Encodings in which what is always zero has 1/128 of the largest scale, not the least.

    XNNPACK's kernels refuse to multiply by 256 or more from one scale to the next. The zero point
    is then the one integer, so that whatever else the tensor may come to hold is 0 as well.
    """
    given = [encoding for each in of_tensors for encoding in each.values() if encoding]
    room = max((encoding.scale for encoding in given), default=1.0) / 128

    def awake(encoding):
        dead = encoding and encoding.scale == quantization.LEAST_SCALE
        return Encoding(room, *3 * [encoding.zero_point]) if dead else encoding

    return [{name: awake(encoding) for name, encoding in each.items()} for each in of_tensors]


def _rebuild(program, weights, wanted, encodings) -> Program:
    """The program with its tensors encoded, and conversions where two encodings meet."""
    tensors = {program.input: program.tensors[program.input]}
    operations, converted = [], {}

    def get(name, encoding):
        if tensors[name].encoding == encoding:
            return name
        if (name, encoding) not in converted:
            new, count = f"{name}/converted", 1
            while new in tensors:
                count += 1
                new = f"{name}/converted_{count}"
            tensors[new] = Tensor(tensors[name].shape, encoding)
            operations.append(Convert((name,), new))
            converted[name, encoding] = new
        return converted[name, encoding]

    for op in program.operations:
        output = encodings[op.output]
        if isinstance(op, Conv | Dense):
            own = wanted.get(op.name, encodings[op.inputs[0]])
            op = dataclasses.replace(op, weights=_within_reach(weights[op.name], own))
            inputs = [get(op.inputs[0], own)]
            if op.weights.scale is None:
                inputs = [get(inputs[0], None)]
        elif isinstance(op, Softmax):
            inputs = [get(op.inputs[0], None)]
        elif isinstance(op, SAME_ENCODING):
            inputs = [get(op.inputs[0], output)]
        else:
            inputs = [get(name, encodings[name]) for name in op.inputs]
        whole = None not in [tensors[name].encoding for name in inputs]
        if not whole or (output is None and not isinstance(op, _MAY_RETURN_FLOATS)):
            inputs = [get(name, None) for name in inputs]
            whole = False
        natural = output if whole or isinstance(op, SAME_ENCODING) else None
        shape = program.tensors[op.output].shape
        name = op.output if natural == output else f"{op.output}/floats"
        tensors[name] = Tensor(shape, natural)
        operations.append(dataclasses.replace(op, inputs=tuple(inputs), output=name))
        if natural != output:
            tensors[op.output] = Tensor(shape, output)
            operations.append(Convert((name,), op.output))
    result = get(program.output, None)
    return Program(program.input, result, tensors, tuple(operations))

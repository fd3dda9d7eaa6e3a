"""Cross-layer equalization: channels of one layer get like ranges, and the next layer undoes it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax import program as p

# Powers of two scale without rounding, so that a difference is the function's own.
_PROBE = np.float32(2**6)


class _Part(NamedTuple):
    """The entries of a kernel that belong to channels: index[u] along `axis` for channel u."""

    name: str
    axis: int
    index: np.ndarray


class _Pair(NamedTuple):
    """Channels between an operation and those that read it: 1/s before, s after."""

    maker: _Part
    readers: tuple[_Part, ...]


def equalize(
    program: p.Program, *inputs: Any, iterations: int = 20, tolerance: float = 1e-5
) -> tuple[p.Program, dict[str, str]]:
    """Scales channels between layers so that kernels quantize better; the function stays the same.

    Channel i of a convolution or dense layer and of those that read it are scaled by 1/s and s,

        s_i = √(r_i r'_i) / r'_i

    with r_i the largest magnitude of the weights that make channel i and r'_i of those that read
    it, which makes both √(r_i r'_i). All are gone through, `iterations` times at most, until no
    scale differs from 1 by more than `tolerance`. This helps a grid for each tensor; a grid for
    each output channel has scales of its own.

    It holds where what lies between them is positively homogeneous: ReLU and pooling are, ReLU6,
    SiLU and a sum with what is not scaled are not. No list says so: every pair is tried on `inputs`
    (B, …) with factors far from 1, and left out if an output changes by more than `tolerance` of
    its largest value. What the inputs do not show (an activation that none of them reaches) is not
    found: give real images.

    Returned are the scaled program, in floats and before it is planned, and {output of an
    operation: why it is not scaled}. Its sources know the scales: the range of a kernel is still
    that of its site times them where a channel that is read has one range, and an edge that was
    scaled is no longer given its site's.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    arXiv 1906.04721, section 4.1.

    Example:
      >>> import jax.numpy as jnp
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params['a'] + params['b'][None]) @ params['c']
      >>> params = {'a': jnp.array([[1.0, 16.0]]), 'b': jnp.ones(2), 'c': jnp.array([[4.0], [1.0]])}
      >>> x = jnp.array([[1.0], [-3.0]])
      >>> new, left_out = equalize(p.lower(fn, params, x), x)
      >>> print(new.params['a']['kernel'], new.params['c']['kernel'].ravel(), left_out)
      [[2. 4.]] [2. 4.] {'c': 'makes an output of the function'}
    """
    core.check_integer("iterations", iterations, 1)
    core.check_positive("tolerance", tolerance)
    if not any(program.weighted):
        return program, {}
    run = jax.jit(core.fast_convolutions(functools.partial(p.apply, program)))

    def outputs(params):
        return [np.asarray(y, np.float32) for y in jax.tree.leaves(run(params, *inputs))]

    expected = outputs(program.params)
    core.check_finite("outputs of program on inputs", dict(enumerate(expected)))

    def holds(pair):
        for factor in (_PROBE, 1 / _PROBE):
            scale = np.full(len(pair.maker.index), factor)
            for a, b in zip(outputs(_scaled(program, pair, scale).params), expected, strict=True):
                if np.abs(a - b).max(initial=0) > tolerance * np.abs(b).max(initial=0):
                    return False
        return True

    pairs, left_out = [], {}
    for name, found in _candidates(program, inputs).items():
        held = [] if isinstance(found, str) else list(filter(holds, found))
        pairs += held
        if not held:
            reason = "is not followed by positively homogeneous operations alone"
            left_out[name] = found if isinstance(found, str) else reason
    for _ in range(iterations):
        moved = 0.0
        for pair in pairs:
            made, read = _reach(program, [pair.maker]), _reach(program, pair.readers)
            dead = (made == 0) | (read == 0)
            scale = np.where(dead, 1, np.sqrt(made / np.where(dead, 1, read)))
            program = _scaled(program, pair, scale)
            moved = max(moved, np.abs(np.log(scale)).max())
        if moved < tolerance:
            break
    return program, left_out


def _candidates(program, inputs) -> dict[str, list[_Pair] | str]:
    graph = core.trace(functools.partial(p.apply, program), program.params, *inputs)
    groups = [
        {(m.path.removesuffix("/kernel"), m.axis): m.index for m in group.members}
        for group in graph.groups
    ]
    found: dict[str, list[_Pair] | str] = {}
    for op in program.weighted:
        reached, readers = {op.output}, []
        for other in program.operations:
            if not reached.isdisjoint(other.inputs):
                if isinstance(other, p.Conv | p.Dense):
                    readers.append(other)
                else:
                    reached.add(other.output)
        if not reached.isdisjoint(program.outputs):
            found[op.output] = "makes an output of the function"
            continue
        pairs = [_pair(group, op, readers) for group in groups]
        reason = "makes channels that are no single axis of a kernel that reads"
        found[op.output] = [pair for pair in pairs if pair] or reason
    return found


def _pair(group, op, readers) -> _Pair | None:
    """The channels of a group between an operation and its readers; None if it has none."""

    def part(op, axis):
        index = group.get((op.output, axis))
        return None if index is None else _Part(op.output, axis, index)

    made = part(op, op.weights.values.ndim - 1)
    read = [part(reader, _input_axis(reader)) for reader in readers]
    return _Pair(made, tuple(filter(None, read))) if made and any(read) else None


def _input_axis(op):
    """That of the channels read; a depthwise kernel has one index for what it reads and makes."""
    shape = op.weights.values.shape
    depthwise = isinstance(op, p.Conv) and op.groups > 1 and shape[-2] == 1
    return len(shape) - (1 if depthwise else 2)


def _scaled(program: p.Program, pair: _Pair, scale: np.ndarray) -> p.Program:
    """The program with the channels of a pair divided by the scale, which the readers undo."""
    params, sources = dict(program.params), dict(program.sources)
    for part, factor in [(pair.maker, 1 / scale), *((own, scale) for own in pair.readers)]:
        own, source = params[part.name], sources.get(part.name)
        rank = np.ndim(own["kernel"])
        along = np.ones(np.shape(own["kernel"])[part.axis], np.float32)
        along[part.index] = factor[:, None]
        kernel = own["kernel"] * along.reshape([-1 if i == part.axis else 1 for i in range(rank)])
        outer = part.axis == rank - 1
        bias = own["bias"] * along if part is pair.maker else own["bias"]
        params[part.name] = {"kernel": kernel, "bias": bias}
        if source and outer:
            source = dataclasses.replace(source, scale=source.scale * along)
        if source and part is not pair.maker:
            # What a site took was scaled: its input has another range, if only for that reason.
            size, shift = source.before or (np.float32(1), np.float32(0))
            before = size if outer else size * along, shift
            source = dataclasses.replace(source, before=before)
        if source:
            sources[part.name] = source
    return dataclasses.replace(program.replace(params), sources=sources)


def _reach(program: p.Program, parts: Sequence[_Part]) -> np.ndarray:
    """The largest magnitude of each channel's weights over all the parts."""

    def reach(part):
        kernel = np.abs(np.moveaxis(program.makers[part.name].weights.values, part.axis, 0))
        return kernel.reshape(len(kernel), -1).max(1)[part.index].max(1)

    return np.max([reach(part) for part in parts], axis=0)

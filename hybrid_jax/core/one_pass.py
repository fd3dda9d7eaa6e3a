"""Any function with each chain of per-channel sums and products as one product and one sum.

BatchNorm in training mode subtracts a mean, multiplies by a scale and adds a bias: three tensors,
which the gradient reads again. As one affine map its gradient is the closed form, two sums over the
result's gradient and one pass over the input.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hybrid_jax.core import interpreter, versions

_CASTS = ("convert_element_type", "copy")


def one_pass_affine(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `fn` with (x - mean) · scale + bias, and what else is affine so, in one pass over x.

    A chain is of sums, differences, products and quotients of a floating tensor with one number for
    all entries or one for each entry of one axis, of which nothing else reads what is between. It
    becomes scale · x + shift, both in float32. Apply it to what is to be differentiated, whose
    gradient then reads x alone. The results are those of `fn` up to rounding, which grows with the
    mean over the deviation. Source: Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167.
    """

    @functools.wraps(fn, updated=())
    def changed(*args):
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        links = dict(_links(closed.jaxpr, ()))

        def rule(path, eqn, values):
            link = links[path]
            given = values[link.place]
            if not isinstance(given, _Started):
                given = _Started(given, _Affine.start(link.axes, given.shape))
            first, affine = given
            affine = affine.then(eqn.primitive.name, link.place, values)
            if not link.ends:
                return [_Started(first, affine)], {}
            scale, shift = (affine.along(affine.each(v), first.ndim) for v in affine[2:])
            result = first.astype(scale.dtype) * scale + shift
            return [result.astype(eqn.outvars[0].aval.dtype)], {}

        outputs, _ = interpreter.evaluate(
            closed.jaxpr, closed.consts, jax.tree.leaves(args), rule, interpreter.containing(links)
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return changed


class _Affine(NamedTuple):
    """What becomes of y: scale · y + shift, float32, for its channels on `axes` of `sizes`."""

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    scale: jax.Array
    shift: jax.Array

    @classmethod
    def start(cls, axes: Sequence[int], shape: Sequence[int]) -> "_Affine":
        """A value of that shape itself."""
        sizes = tuple(shape[axis] for axis in axes)
        return cls(tuple(axes), sizes, jnp.float32(1), jnp.float32(0))

    def then(self, name: str, place: int, values: Sequence[Any]) -> "_Affine":
        """After one more affine equation of that name, of which operand `place` is this one."""
        if name in _CASTS:
            return self
        scale, shift = self.scale, self.shift
        if name == "neg":
            return self._replace(scale=-scale, shift=-shift)
        other = self._one_each(jnp.asarray(values[1 - place]).astype(jnp.float32))
        if name == "mul":
            return self._replace(scale=scale * other, shift=shift * other)
        if name == "div":
            return self._replace(scale=scale / other, shift=shift / other)
        if name == "add":
            return self._replace(shift=shift + other)
        if place == 0:
            return self._replace(shift=shift - other)
        return self._replace(scale=-scale, shift=other - shift)

    def each(self, value: jax.Array) -> jax.Array:
        """The scale or the shift in the shape of the channels."""
        if value.ndim:
            value = value.reshape([value.shape[axis] for axis in self.axes])
        return jnp.broadcast_to(value, self.sizes)

    def along(self, value: jax.Array, rank: int) -> jax.Array:
        """A value in the shape of the channels, to be broadcast to one of that rank."""
        sizes = dict(zip(self.axes, self.sizes, strict=True))
        return value.reshape([sizes.get(axis, 1) for axis in range(rank)])

    def _one_each(self, operand: jax.Array) -> jax.Array:
        """One entry for each channel of an operand that does not vary along other axes."""
        for axis in range(operand.ndim):
            if axis not in self.axes:
                operand = jax.lax.slice_in_dim(operand, 0, 1, axis=axis)
        return operand


class _Link(NamedTuple):
    """An equation of a chain: which operand comes from it, along which axes it varies, its end."""

    place: int
    axes: tuple[int, ...]
    ends: bool


class _Started(NamedTuple):
    """Where a chain began, and what has become of it."""

    first: jax.Array
    affine: _Affine


def _links(jaxpr, path) -> Iterator[tuple[interpreter.Path, _Link]]:
    """The links of all chains that save a pass, outside of loops, branches and derivatives."""
    readers = collections.defaultdict(list)
    for index, eqn in enumerate([*jaxpr.eqns, None]):
        for atom in jaxpr.outvars if eqn is None else eqn.invars:
            if not isinstance(atom, jex.Literal):
                readers[atom].append(index)
    taken: set[int] = set()
    for index, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name in (*versions.CALLS, *versions.REMAT):
            yield from _links(versions.body(eqn).jaxpr, (*path, index, "body"))
        if index in taken:
            continue
        chain, axes, last = [], set(), None
        while (found := _affine(jaxpr.eqns[index], last, axes)) is not None:
            place, axes = found
            chain.append((index, place))
            (last,) = jaxpr.eqns[index].outvars
            if len(readers[last]) != 1 or readers[last][0] == len(jaxpr.eqns):
                break
            (index,) = readers[last]
        if sum(jaxpr.eqns[at].primitive.name not in _CASTS for at, _ in chain) > 1:
            taken |= {at for at, _ in chain}
            rank = last.aval.ndim
            for at, place in chain:
                yield (*path, at), _Link(place, tuple(axes) or (rank - 1,), at == chain[-1][0])


def _affine(eqn, last, axes):
    """How an equation goes on with a chain: (its operand, all axes along which others varied)."""
    name = eqn.primitive.name
    if name not in (*_CASTS, "neg", "add", "sub", "mul", "div"):
        return None
    (result,) = (var.aval for var in eqn.outvars)
    place = max(range(len(eqn.invars)), key=lambda i: _entries(eqn.invars[i]))
    taken = eqn.invars[place]
    if not (last in (None, taken) and _in_float32(taken.aval) and _in_float32(result)):
        return None
    for other in eqn.invars[:place] + eqn.invars[place + 1 :]:
        axes = axes | {axis for axis, size in enumerate(other.aval.shape) if size != 1}
        if 2 * _entries(other) > result.size or (name == "div" and place == 1):
            return None
    return (place, axes) if len(axes) < 2 and taken.aval.shape == result.shape else None


def _entries(atom):
    return math.prod(atom.aval.shape)


def _in_float32(aval):
    """Whether it is a tensor of floats whose scale and shift fit float32."""
    dtype = getattr(aval, "dtype", np.dtype(int))
    return aval.ndim > 0 and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4

"""Where the entries of an array lie in the parameter that it is, moved about: (taps, in, out).

A *factor* (axis, n, step) runs over n indices of one axis of the parameter, `step` apart. An array
that holds a parameter's entries once each has a list of factors on every axis, the slowest first.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex

from hybrid_jax.core.labels import Arrangement, Factor, Factors, Value, sizes
from hybrid_jax.core.primitives import PRIMITIVES
from hybrid_jax.core.primitives.elementwise import ELEMENTWISE


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A parameter that is the kernel of sites, and how it becomes (taps, in, out).

    Reshaped to `dims` and transposed to `order` it lies as (L, taps, in, out). `sizes` are (L, T,
    C, O): kernels stacked in it (layers of a scan, equal slices), taps, inputs that an output sums
    over (C / groups), outputs; None where its sites differ in theirs, or take unequal parts. `taps`
    are the sizes of the spatial axes; () in a matrix product.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, int, int, int] | None = None
    taps: tuple[int, ...] = ()

    def layers(self, leaf: jax.Array) -> jax.Array:
        """The parameter, or anything of its shape, as (L, T·C·O); (1, entries) without `sizes`."""
        if leaf.shape != self.shape:
            raise ValueError(f"{self.path!r} must have shape {self.shape}, got {leaf.shape}")
        count = self.sizes[0] if self.sizes else 1
        return leaf.reshape(self.dims).transpose(self.order).reshape(count, -1)

    def canonical(self, leaf: jax.Array) -> jax.Array:
        """The parameter, or anything of its shape, as (L, T, C, O), if its sites have one form."""
        return self.layers(leaf).reshape(self.known_sizes())

    def restore(self, moved: jax.Array) -> jax.Array:
        """What `layers` or `canonical` made, in the parameter's layout again."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return (
            moved.reshape([self.dims[i] for i in self.order]).transpose(inverse).reshape(self.shape)
        )

    def known_sizes(self) -> tuple[int, int, int, int]:
        """`sizes`; raises ValueError where there are none."""
        if self.sizes is None:
            raise ValueError(
                f"kernel {self.path!r} must be one matrix (taps, in, out) wherever it is used, or "
                "equal parts of its parameter; got several, so leave it out of the kernels"
            )
        return self.sizes


def find_kernels(
    sites: Sequence[Any], parameters: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, Kernel]:
    """{path: Kernel} of the floating parameters that are kernels of `sites`, in running order."""
    found: dict[str, dict[Any, None]] = {}
    for site in sites:
        if site.arrangement is not None:
            found.setdefault(site.path, {})[site.arrangement] = None
    made = {path: _kernel(path, parameters[path].shape, list(used)) for path, used in found.items()}
    return {path: kernel for path, kernel in made.items() if kernel is not None}


def whole(path: str, shape: Sequence[int]) -> Arrangement:
    """The arrangement of a parameter itself."""
    axes = tuple(((i, n, 1),) if n > 1 else () for i, n in enumerate(shape))
    return Arrangement(path, math.prod(shape), (0,) * len(shape), (), axes)


def scanned(arrangement: Arrangement | None) -> Arrangement | None:
    """What one iteration of a scan over the first axis sees."""
    if arrangement is None:
        return None
    first, *axes = arrangement.axes
    stack = (*arrangement.stack, *first)
    return dataclasses.replace(arrangement, stack=stack, axes=tuple(axes))


def by_role(arrangement: Arrangement, roles: Sequence[Sequence[int]]) -> Arrangement:
    """A kernel's arrangement with axes (taps, in, out), from its axes by role, the stack first."""
    stack, *axes = (tuple(f for axis in role for f in arrangement.axes[axis]) for role in roles)
    stack = (*arrangement.stack, *stack)
    return dataclasses.replace(arrangement, stack=stack, axes=tuple(axes))


def narrowed(
    arrangement: Arrangement | None, before: Sequence[int], after: Sequence[int]
) -> Arrangement | None:
    """The arrangement in a parameter that has lost indices; of an axis in parts it is not known."""
    if arrangement is None or arrangement.axes is None or tuple(before) == tuple(after):
        return arrangement
    factors = [f for own in (arrangement.stack, *arrangement.axes) for f in own]
    parted = any(after[a] != before[a] != n for a, n, _ in factors)

    def cut(own: Factors) -> Factors:
        left = ((a, after[a] if n == before[a] else n, step) for a, n, step in own)
        return tuple(factor for factor in left if factor[1] > 1)

    return dataclasses.replace(
        arrangement,
        count=arrangement.count * math.prod(after) // math.prod(before),
        stack=cut(arrangement.stack),
        axes=None if parted else tuple(map(cut, arrangement.axes)),
    )


def moved(eqn: jex.JaxprEqn, values: Sequence[Value]) -> list[Arrangement | None]:
    """The arrangements of an equation's outputs; element-wise, that of the largest operand."""
    outs = [sizes(v.aval.shape) for v in eqn.outvars]
    if eqn.primitive.name in ELEMENTWISE:
        alike = [v.arrangement for v in values if v.arrangement and v.shape == outs[0]]
        alike.sort(key=lambda a: a.path)
        return [max(alike, key=lambda a: a.count, default=None)]
    known, x = PRIMITIVES.get(eqn.primitive.name), values[0] if values else None
    if known is None or known.arrange is None or x.arrangement is None:
        return [None] * len(outs)
    return known.arrange(x.arrangement, eqn.params, x.shape, outs)


def _kernel(path: str, shape: tuple[int, ...], used: list[Arrangement]) -> Kernel | None:
    """The kernel that arrangements (stack; taps, in, out) make up; None if they leave some out."""
    size = math.prod(shape)
    if sum(a.count for a in used) < size:
        return None
    kind, parts = used[0], _parts([a.start for a in used])
    alike = {(a.stack, a.axes) for a in used} == {(kind.stack, kind.axes)}
    if not alike or parts is None or kind.axes is None:
        return Kernel(path, shape, shape, tuple(range(len(shape))))
    roles = (*parts, *kind.stack), *kind.axes
    placed = [factor for role in roles for factor in role]
    dims = sorted(placed, key=lambda f: (f[0], -f[2]))
    if not _tiles(dims, shape):
        return Kernel(path, shape, shape, tuple(range(len(shape))))
    return Kernel(
        path,
        shape,
        tuple(n for _, n, _ in dims),
        tuple(dims.index(factor) for factor in placed),
        tuple(math.prod(n for _, n, _ in role) for role in roles),
        tuple(n for _, n, _ in kind.axes[0]),
    )


def _parts(starts: list[tuple[int, ...]]) -> Factors | None:
    """The factor over evenly spaced starts; () for a single one, None if there is none."""
    starts = sorted(set(starts))
    moving = [axis for axis in range(len(starts[0])) if len({s[axis] for s in starts}) > 1]
    if not moving:
        return () if not any(starts[0]) else None
    offsets = [s[moving[0]] for s in starts]
    even = offsets == list(range(0, offsets[-1] + 1, max(offsets[1], 1)))
    return ((moving[0], len(offsets), offsets[1]),) if even and len(moving) == 1 else None


def _tiles(dims: list[Factor], shape: tuple[int, ...]) -> bool:
    """Whether factors, in order, run over every index of every axis once."""
    for axis, n in enumerate(shape):
        expected = n
        for _, size, step in (f for f in dims if f[0] == axis):
            if size * step != expected:
                return False
            expected = step
        if expected != 1:
            return False
    return True

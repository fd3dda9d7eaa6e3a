"""Coupled channels: the connected components of the labels, as groups of removable units."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from scipy.sparse import coo_array, csgraph

from hybrid_jax.core import checks, host, paths
from hybrid_jax.core.labels import FIXED, Labels


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter: removing unit u removes the m indices index[u] of int[n, m]."""

    path: str
    axis: int
    index: np.ndarray
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Channels of one kind that can be removed one by one, with all that leaves with each.

    In a residual stage a unit is one channel of the stream: an output of every convolution that is
    added to it, an input of every one that reads it, and its BatchNorm entries. The name is the
    path of the kernel that makes the channels, the first one if there are several; `size` the
    number of units.
    """

    name: str
    size: int
    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """Component of each label, and the reason for each component that is frozen."""

    of: np.ndarray
    reasons: Mapping[int, str]


def components(labels: Labels, extra: Sequence[tuple[np.ndarray, str]] = ()) -> Components:
    """Connected components of the tied labels; `extra` freezes more labels, with reasons.

    Of the axes of a product the one keeps its channels with which most of the parameters can be
    removed, in the smallest units, the last of equals. Products with the least choice decide first,
    so that others do not take it from them.
    """
    labels = labels.copy()
    labels.frozen = [(np.zeros(1, int), FIXED), *labels.frozen, *extra]
    of = _connected(np.arange(labels.count), labels.edges)
    stuck = _stuck(labels, of)
    choices = [sum(not stuck[of[axis]].all() for axis in axes) for _, axes in labels.products]
    for i in np.argsort(choices, stable=True):
        elements, axes = labels.products[i]
        tried = [_decided(labels, of, elements, axes, a) for a in reversed(range(len(axes)))]
        labels, of = max(tried, key=lambda found: _removable(*found))
    owners = np.repeat(np.arange(len(labels.frozen)), [len(own) for own, _ in labels.frozen])
    frozen, first = np.unique(of[_frozen(labels)], return_index=True)
    reasons = [labels.frozen[owner][1] for owner in owners[first]]
    return Components(of, dict(zip(frozen.tolist(), reasons, strict=True)))


def _connected(of: np.ndarray, edges: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The component of each label once these are tied as well."""
    a, b = (of[np.concatenate([e[i] for e in edges] or [np.zeros(0, int)])] for i in (0, 1))
    ties = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(of), len(of)))
    return csgraph.connected_components(ties, directed=False)[1][of]


def _frozen(labels: Labels) -> np.ndarray:
    return np.concatenate([own for own, _ in labels.frozen])


def _stuck(labels: Labels, of: np.ndarray) -> np.ndarray:
    """Which components are frozen."""
    stuck = np.zeros(len(of), bool)
    stuck[of[_frozen(labels)]] = True
    return stuck


def _removable(labels: Labels, of: np.ndarray) -> tuple[int, int]:
    """How many indices of parameters can be removed, and in how many units."""
    own, free = of[: labels.given], ~_stuck(labels, of)
    units = np.zeros(len(of), bool)
    units[own] = True
    return int(free[own].sum()), int((units & free).sum())


def _decided(labels: Labels, of: np.ndarray, elements: np.ndarray, axes, chosen: int):
    """The labels and components if one of the axes of a product keeps its channels."""
    labels = labels.copy()
    for i, axis in enumerate(axes):
        if i == chosen:
            each = np.moveaxis(elements, i, -1)
            labels.tie(np.broadcast_to(axis, each.shape).reshape(-1), each.reshape(-1))
        else:
            labels.freeze(axis, "is reshaped together with another live axis")
    return labels, _connected(of, labels.edges[-1:])


def group_channels(
    found: Components,
    parameters: Mapping[str, Sequence[np.ndarray]],
    order: Sequence[str],
) -> tuple[tuple[Group, ...], tuple[tuple[str, int, str], ...]]:
    """Groups the removable units that touch the same axes of the same parameters.

    `parameters` is {path: labels of each axis}, and groups are named after and sorted by `order`,
    the paths of the kernels in running order. With them come (path, axis, reason) for the axes of
    which some index is frozen.
    """
    stuck = np.zeros(len(found.of), bool)
    stuck[list(found.reasons)] = True
    frozen, axes_of = [], {}
    for path, axes in parameters.items():
        for axis, own in enumerate(axes):
            of = found.of[own]
            if stuck[of].any():
                single = len(own) == 1
                reason = "has a single index" if single else found.reasons[of[stuck[of]].min()]
                frozen.append((path, axis, reason))
            if not stuck[of].all():
                axes_of[path, axis] = _Axis.of(of, ~stuck[of])
    rank = {path: i for i, path in enumerate(order)}
    shapes = {path: tuple(map(len, axes)) for path, axes in parameters.items()}
    groups = []
    for kind, alike in _kinds(axes_of, len(found.of)):
        first = min((key for key, _ in kind), key=lambda key: (rank.get(key[0], len(rank)), key))
        alike = alike[np.argsort(axes_of[first].indices(alike, 1)[:, 0])]
        members = tuple(
            Member(*key, axes_of[key].indices(alike, count), shapes[key[0]]) for key, count in kind
        )
        # Of equal names first the one that touches the first axes: so it is after a removal too.
        place = rank.get(first[0], len(rank)), first[0], kind
        groups.append((place, Group(first[0], len(alike), members)))
    groups.sort(key=lambda pair: pair[0])
    counts: collections.Counter[str] = collections.Counter()
    named = []
    for _, group in groups:
        counts[group.name] += 1
        again = counts[group.name]
        name = group.name if again == 1 else f"{group.name}#{again}"
        named.append(dataclasses.replace(group, name=name))
    return tuple(named), tuple(frozen)


class _Axis(NamedTuple):
    """The indices of an axis that can be removed, by the component they belong to."""

    components: np.ndarray
    counts: np.ndarray
    ordered: np.ndarray

    @classmethod
    def of(cls, components: np.ndarray, free: np.ndarray) -> "_Axis":
        """From the component of each index, and which of them can be removed."""
        indices = np.flatnonzero(free)
        ordered = indices[np.argsort(components[free], stable=True)]
        return cls(*np.unique(components[free], return_counts=True), ordered)

    def indices(self, components: np.ndarray, count: int) -> np.ndarray:
        """int[n, count]: the first `count` indices of each of n components, in order."""
        starts = np.cumsum(self.counts) - self.counts
        place = np.searchsorted(self.components, components)
        return self.ordered[starts[place][:, None] + np.arange(count)]


def _kinds(axes: Mapping[tuple[str, int], _Axis], labels: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields ((axis, count) pairs, the components that have so many indices on just these)."""
    kind_of = np.zeros(labels, int)
    kinds: list[Any] = [()]
    for key in sorted(axes):
        own = axes[key]
        # What was alike before this axis, and has as many indices on it, is alike after it.
        pairs = np.stack([kind_of[own.components], own.counts])
        alike, which = np.unique(pairs, axis=1, return_inverse=True)
        kind_of[own.components] = len(kinds) + which.reshape(-1)
        kinds += [(*kinds[kind], (key, count)) for kind, count in alike.T.tolist()]
    members = np.argsort(kind_of, stable=True)
    ends = np.cumsum(np.bincount(kind_of, minlength=len(kinds)))
    for kind, components in zip(kinds[1:], np.split(members, ends[:-1])[1:], strict=True):
        if len(components):
            yield kind, components


def expand(keep: Mapping[str, Any], groups: Sequence[Group], params: Any) -> Any:
    """Writes which channels are kept as masks over all the parameters they touch.

    `keep` is {group name: bool[n]}, True where kept, maybe traced; groups left out are kept whole.
    `params` are arrays or `jax.ShapeDtypeStruct`, and the result is like them: bool masks of their
    shapes, `optax.MaskedNode()` for a parameter that no group in `keep` touches.
    """
    shapes = {path: np.shape(leaf) for path, leaf in paths.flatten_paths(params).items()}
    stays: dict[str, dict[int, Any]] = collections.defaultdict(dict)
    for member, kept in kept_along(keep, groups):
        if shapes.get(member.path) != member.shape:
            raise ValueError(
                f"params must have shape {member.shape} at {member.path!r}, "
                f"got {shapes.get(member.path, 'no leaf')}"
            )
        own = stays[member.path]
        own[member.axis] = own.get(member.axis, True) & kept

    def mask(path, leaf):
        del leaf
        if path not in stays:
            return optax.MaskedNode()
        whole = np.ones(shapes[path], bool)
        for axis, kept in stays[path].items():
            whole = whole & kept.reshape([-1 if a == axis else 1 for a in range(whole.ndim)])
        return host.on_device(whole)

    return paths.map_with_path(mask, params)


def keep_indices(
    keep: Mapping[str, Any], groups: Sequence[Group], params: Any
) -> dict[str, tuple[np.ndarray, ...]]:
    """{path: for each axis the sorted indices that stay}; `keep` is as for `expand`."""
    stays = {
        path: [np.ones(n, bool) for n in np.shape(leaf)]
        for path, leaf in paths.flatten_paths(params).items()
    }
    for member, kept in kept_along(keep, groups):
        stays[member.path][member.axis] &= kept
    return {path: tuple(np.flatnonzero(axis) for axis in axes) for path, axes in stays.items()}


def kept_along(keep: Mapping[str, Any], groups: Sequence[Group]) -> Iterator[tuple[Member, Any]]:
    """Yields each member of the groups in `keep`, and which indices of its axis are kept."""
    by_name = {group.name: group for group in groups}
    for name, kept in keep.items():
        checks.check_choice("keep", name, by_name)
        group = by_name[name]
        xp = host.namespace(kept)
        kept = xp.asarray(kept)
        if kept.shape != (group.size,) or kept.dtype != bool:
            raise ValueError(
                f"keep[{name!r}] must be bool[{group.size}], "
                f"got {kept.dtype}[{','.join(map(str, kept.shape))}]"
            )
        for member in group.members:
            unit = np.full(member.shape[member.axis], group.size)
            unit[member.index] = np.arange(group.size)[:, None]
            yield member, xp.append(kept, True)[unit]

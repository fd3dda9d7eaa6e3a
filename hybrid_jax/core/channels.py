"""Coupled channels: the connected components of the labels, as groups of removable units."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.sparse import coo_array, csgraph

from hybrid_jax.core import checks, paths
from hybrid_jax.core.labels import Labels


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter in a group.

    Attributes:
      path: The parameter's path.
      axis: The axis.
      index: int[n, m]; removing unit u removes the m indices index[u] of this axis.
      shape: The parameter's shape.
    """

    path: str
    axis: int
    index: np.ndarray
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Channels of one kind that can be removed one by one, with all that leaves with each.

    In a residual stage a unit is one channel of the stream: an output of every convolution that is
    added to it, an input of every one that reads it, and its BatchNorm entries.

    Attributes:
      name: Path of the kernel that makes the channels, the first one if there are several.
      size: Number of units n.
      members: What each unit consists of.
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
    """Connected components of the tied labels; `extra` freezes more labels, with reasons."""
    pairs = [pair for pair in labels.edges if len(pair[0])]
    a, b = (np.concatenate([p[i] for p in pairs] or [np.zeros(0, int)]) for i in (0, 1))
    edges = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(labels.count, labels.count))
    _, of = csgraph.connected_components(edges, directed=False)
    reasons: dict[int, str] = {int(of[0]): "is tied to an axis of the input"}
    for frozen, reason in [*labels.frozen, *extra]:
        for component in np.unique(of[frozen]):
            reasons.setdefault(int(component), reason)
    return Components(of, reasons)


def group_channels(
    labels: Labels,
    parameters: Mapping[str, Sequence[np.ndarray]],
    extra: Sequence[tuple[np.ndarray, str]],
    order: Sequence[str],
) -> tuple[tuple[Group, ...], tuple[tuple[str, int, str], ...]]:
    """Groups the removable units that touch the same axes of the same parameters.

    Args:
      labels: All labels.
      parameters: {path: labels of each axis}.
      extra: Further frozen labels with reasons.
      order: Paths of the kernels in running order; groups are named after and sorted by them.

    Returns:
      The groups; and (path, axis, reason) for the axes of which some index is frozen.
    """
    found = components(labels, extra)
    units: dict[int, dict[tuple[str, int], list[int]]] = collections.defaultdict(dict)
    frozen = []
    for path, axes in parameters.items():
        for axis, own in enumerate(axes):
            of = found.of[own]
            stuck = [int(c) for c in np.unique(of) if int(c) in found.reasons]
            if stuck:
                single = len(own) == 1
                reason = "has a single index" if single else found.reasons[stuck[0]]
                frozen.append((path, axis, reason))
            for index, component in enumerate(of.tolist()):
                if component not in found.reasons:
                    units[component].setdefault((path, axis), []).append(index)
    kinds: dict[Any, list[dict[tuple[str, int], list[int]]]] = collections.defaultdict(list)
    for unit in units.values():
        kinds[tuple((key, len(unit[key])) for key in sorted(unit))].append(unit)
    rank = {path: i for i, path in enumerate(order)}
    shapes = {path: tuple(map(len, axes)) for path, axes in parameters.items()}
    groups = []
    for kind, alike in kinds.items():
        keys = [key for key, _ in kind]
        first = min(keys, key=lambda key: (rank.get(key[0], len(rank)), key))
        alike.sort(key=lambda unit: unit[first])
        members = tuple(
            Member(*key, np.array([unit[key] for unit in alike]), shapes[key[0]]) for key in keys
        )
        # Of equal names first the one that touches the first axes: so it is after a removal too.
        order = rank.get(first[0], len(rank)), first[0], kind
        groups.append((order, Group(first[0], len(alike), members)))
    groups.sort(key=lambda pair: pair[0])
    counts: collections.Counter[str] = collections.Counter()
    named = []
    for _, group in groups:
        counts[group.name] += 1
        again = counts[group.name]
        name = group.name if again == 1 else f"{group.name}#{again}"
        named.append(dataclasses.replace(group, name=name))
    return tuple(named), tuple(frozen)


def expand(keep: Mapping[str, Any], groups: Sequence[Group], params: Any) -> Any:
    """Writes which channels are kept as masks over all the parameters they touch.

    Args:
      keep: {group name: bool[n]}, True where kept, maybe traced; groups left out are kept whole.
      groups: The groups of the graph.
      params: The parameters (arrays or `jax.ShapeDtypeStruct`).

    Returns:
      A pytree like `params` of bool masks of the parameters' shapes; `optax.MaskedNode()` for a
      parameter that no group in `keep` touches.

    Raises:
      ValueError: If a name is none of the groups', an array is not bool[n], or a parameter of a
        group is missing or has another shape.

    Example:
      >>> group = Group('w', 2, (Member('w', 1, np.array([[0], [1]]), (2, 2)),))
      >>> expand({'w': [True, False]}, [group], {'w': np.ones((2, 2))})['w'].tolist()
      [[True, False], [True, False]]
    """
    shapes = {path: np.shape(leaf) for path, leaf in paths.flatten_paths(params).items()}
    masks: dict[str, Any] = {}
    for member, kept in kept_along(keep, groups):
        if shapes.get(member.path) != member.shape:
            raise ValueError(
                f"params must have shape {member.shape} at {member.path!r}, "
                f"got {shapes.get(member.path, 'no leaf')}"
            )
        xp = jnp if isinstance(kept, jax.core.Tracer) else np
        others = [axis for axis in range(len(member.shape)) if axis != member.axis]
        mask = masks.get(member.path, np.ones(member.shape, bool))
        masks[member.path] = mask & xp.expand_dims(kept, others)
    return paths.map_with_path(
        lambda path, leaf: jnp.asarray(masks[path]) if path in masks else optax.MaskedNode(),
        params,
    )


def keep_indices(
    keep: Mapping[str, Any], groups: Sequence[Group], params: Any
) -> dict[str, tuple[np.ndarray, ...]]:
    """Writes which channels are kept as the indices that stay, for `narrow` and `slice_tree`.

    Args:
      keep: {group name: bool[n]}, True where kept; groups left out are kept whole.
      groups: The groups of the graph.
      params: The parameters (arrays or `jax.ShapeDtypeStruct`).

    Returns:
      {path: for each axis of the parameter the indices that stay, sorted}.

    Raises:
      ValueError: If a name is none of the groups', or an array is not bool[n].

    Example:
      >>> group = Group('w', 2, (Member('w', 1, np.array([[0], [1]]), (2, 2)),))
      >>> keep_indices({'w': [True, False]}, [group], {'w': np.ones((2, 2))})
      {'w': (array([0, 1]), array([0]))}
    """
    stays = {
        path: [np.ones(n, bool) for n in np.shape(leaf)]
        for path, leaf in paths.flatten_paths(params).items()
    }
    for member, kept in kept_along(keep, groups):
        stays[member.path][member.axis] &= kept
    return {path: tuple(np.flatnonzero(axis) for axis in axes) for path, axes in stays.items()}


def kept_along(keep: Mapping[str, Any], groups: Sequence[Group]) -> Iterator[tuple[Member, Any]]:
    """Yields each member of the groups in `keep`, and which indices of its axis are kept.

    Raises:
      ValueError: If a name is none of the groups', or an array is not bool[n].
    """
    by_name = {group.name: group for group in groups}
    for name, kept in keep.items():
        checks.check_choice("keep", name, by_name)
        group = by_name[name]
        # Concrete masks are made on the host: on the device every shape is compiled anew.
        xp = jnp if isinstance(kept, jax.core.Tracer) else np
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

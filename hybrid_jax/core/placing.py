"""How leaves lie on a mesh of devices, by rules on their paths, and how they come back."""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from hybrid_jax.core.host import is_traced
from hybrid_jax.core.paths import flatten_paths, is_masked_node, map_with_path, match_rules

Tree = TypeVar("Tree")


def place(tree: Tree, mesh: Mesh, rules: Iterable[tuple[str, PartitionSpec]]) -> Tree:
    """Puts each leaf on a mesh as the first rule says that matches its path; its own to donate.

    `rules` are (pattern, how the axes of the leaf are divided), see `match_rules`, and cover all
    leaves. Of several processes each gives the same values.

    Example:
      >>> mesh = jax.make_mesh((1,), ('batch',), devices=jax.devices()[:1])
      >>> tree = {'head': {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)}}
      >>> rules = [('.*/kernel', PartitionSpec('batch')), ('.*', PartitionSpec())]
      >>> place(tree, mesh, rules)['head']['kernel'].sharding.spec == PartitionSpec('batch')
      True
    """
    specs = match_rules(rules, flatten_paths(tree))
    tree = copy(tree)  # a device that has a leaf already would not copy it

    def one(path: str, leaf: Any) -> Any:
        return leaf if is_masked_node(leaf) else put(leaf, NamedSharding(mesh, specs[path]))

    return map_with_path(one, tree)


def copy(tree: Tree) -> Tree:
    """Copies every leaf to an array of its own, to donate, with the dtype and sharding it has."""
    leaves, structure = jax.tree.flatten(tree)
    # One program for all that are free to move; one for each shape would take longer to compile.
    free = [is_traced(leaf) or getattr(leaf, "committed", None) is False for leaf in leaves]
    copies = iter(_copies([leaf for leaf, own in zip(leaves, free) if own]))
    return structure.unflatten(
        next(copies) if own else jnp.copy(leaf) if isinstance(leaf, jax.Array) else jnp.array(leaf)
        for leaf, own in zip(leaves, free)
    )


@jax.jit
def _copies(leaves):
    return [jnp.copy(leaf) for leaf in leaves]


def put(leaf: Any, sharding: Sharding) -> jax.Array:
    """Puts an array, or a typed key, where a sharding says, in all its processes."""
    if is_key(leaf):
        data = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(leaf, sharding)


def whole(tree: Any) -> Any:
    """The values of all leaves as NumPy arrays, wherever they lie; of typed keys their data.

    Of what other processes hold a part of, all processes must ask together.
    """

    def one(leaf: Any) -> Any:
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return leaf

    return jax.device_get(jax.tree.map(one, tree))


def gathered(tree: Tree) -> Tree:
    """Brings leaves that lie on several devices back to one, free to move; others stay."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
            return leaf
        values = jnp.asarray(whole(leaf))
        if is_key(leaf):
            return jax.random.wrap_key_data(values, impl=jax.random.key_impl(leaf))
        return values

    return jax.tree.map(one, tree)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed key, of `jax.random.key`."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

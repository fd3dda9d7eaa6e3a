"""Data parallel training: the state on every device, the batch divided among them.

A stack of experts is divided by `experts.shard_stack`, on a mesh that has the axis 'batch' too.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.training.state import copy

Tree = TypeVar("Tree")
_AXIS = "batch"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, 'batch', over `devices`; over all there are if None."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (_AXIS,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a whole copy of each leaf on every device, its own to donate."""
    return jax.device_put(copy(tree), NamedSharding(mesh, PartitionSpec()))


def shard_batch(
    batch: Mapping[str, Any], mesh: Mesh, per_expert: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Divides a batch among the devices: a jitted step on it is then data parallel.

    Means over the batch, those of BatchNorm included, are over all devices. The batch has arrays
    (B, …), and (E, B, …) under the names in `per_expert`, which are divided by expert as the stack.
    `mesh` is of `data_mesh`, or of `experts.expert_mesh`; B is a multiple of its devices along
    'batch'.
    """
    by_expert = "expert" if "expert" in mesh.axis_names else None

    def place(name: str, leaf: Any) -> jax.Array:
        before = [by_expert] if name in per_expert else []
        examples, devices = leaf.shape[len(before)], mesh.shape[_AXIS]
        if examples % devices:
            raise ValueError(
                f"batch[{name!r}] must divide evenly among {devices} devices, "
                f"got {examples} examples"
            )
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*before, _AXIS)))

    return {name: place(name, leaf) for name, leaf in batch.items()}

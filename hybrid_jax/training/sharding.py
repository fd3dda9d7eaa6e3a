"""Data parallel training: the state on every device, the batch divided among them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.training.state import copy

Tree = TypeVar("Tree")
_AXIS = "batch"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, 'batch', over `devices`; over all there are if None.

    Example:
      >>> data_mesh().axis_names
      ('batch',)
    """
    return Mesh(np.array(jax.devices() if devices is None else devices), (_AXIS,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a whole copy of each leaf on every device, its own to donate.

    Example:
      >>> replicate({'w': np.ones(3)}, data_mesh())['w'].is_fully_replicated
      True
    """
    return jax.device_put(copy(tree), NamedSharding(mesh, PartitionSpec()))


def shard_batch(
    batch: Mapping[str, Any], mesh: Mesh, per_expert: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Divides a batch among the devices: a jitted step on it is then data parallel.

    The step needs no change: means over the batch, those of BatchNorm included, are over all
    devices.

    Args:
      batch: Arrays (B, …).
      mesh: Of `data_mesh`, with D devices.
      per_expert: Names of the entries that are (E, B, …) instead.

    Raises:
      ValueError: If B is not a multiple of D.

    Example:
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> shard_batch({'image': np.ones((8, 2))}, mesh)['image'].sharding.is_fully_addressable
      True
    """

    def place(name: str, leaf: Any) -> jax.Array:
        axis = 1 if name in per_expert else 0
        if leaf.shape[axis] % mesh.size:
            raise ValueError(
                f"batch[{name!r}] must divide evenly among {mesh.size} devices, "
                f"got {leaf.shape[axis]} examples"
            )
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[None] * axis, _AXIS)))

    return {name: place(name, leaf) for name, leaf in batch.items()}

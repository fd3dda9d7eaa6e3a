"""Data parallel training: the state on every device, the batch divided among them.

    mesh = training.fitting_mesh(64, 4)  # of 8 devices: 4 along 'expert', 2 along 'batch'
    states = training.place_state(states, mesh)  # of 4 experts
    batch = training.shard_batch(batch, mesh)
    states, metrics = step(states, batch)

Nothing else changes, neither a step nor a loop.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax import core, experts

Tree = TypeVar("Tree")
_AXIS, _EXPERT = "batch", "expert"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, 'batch', over `devices`; over all there are if None."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (_AXIS,))


def fitting_mesh(
    batch_size: int, count: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """A mesh of the most devices among which B images, and a stack of `count` experts, divide.

    Along 'expert' are as many as divide the stack, and along 'batch' as many of the others as
    divide the batch; of one network it is a `data_mesh`. None where that is one device.

    Example:
      >>> devices = [jax.devices()[0]] * 8
      >>> dict(fitting_mesh(64, 4, devices).shape), dict(fitting_mesh(20, 1, devices).shape)
      ({'expert': 4, 'batch': 2}, {'batch': 4})
    """
    devices = jax.devices() if devices is None else devices
    along = math.gcd(count, len(devices))
    used = devices[: along * math.gcd(batch_size, len(devices) // along)]
    if len(used) == 1:
        return None
    return data_mesh(used) if along == 1 else experts.expert_mesh(along, used)


def place_state(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a state on a mesh: a stack divided by expert where it has that axis, else whole copies.

    What is on it is its own to donate.
    """
    if _EXPERT in mesh.axis_names:
        return experts.shard_stack(tree, mesh)
    return replicate(tree, mesh)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a whole copy of each leaf on every device, its own to donate."""
    return core.place(tree, mesh, [(".*", PartitionSpec())])


def own_rows(mesh: Mesh | None, batch_size: int) -> np.ndarray:
    """Which examples of a batch the devices of this process hold, (n,): all, of one process.

    Those are what it has to read.
    """
    if mesh is None:
        return np.arange(batch_size)
    held = NamedSharding(mesh, PartitionSpec(_AXIS)).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in held.values()]))


def shard_batch(
    batch: Mapping[str, Any],
    mesh: Mesh,
    per_expert: Collection[str] = (),
    batch_size: int | None = None,
) -> dict[str, jax.Array]:
    """Divides a batch among the devices: a jitted step on it is then data parallel.

    Means over the batch, those of BatchNorm included, are over all devices. The batch has arrays
    (B, …), and (E, B, …) under the names in `per_expert`, which are divided by expert as the stack.
    `mesh` is of `data_mesh`, or of `experts.expert_mesh`; B is a multiple of its devices along
    'batch'. Of several processes each hands in its `own_rows` of B = `batch_size` examples.
    """
    by_expert = _EXPERT if _EXPERT in mesh.axis_names else None

    def put(name: str, leaf: Any) -> jax.Array:
        before = [by_expert] if name in per_expert else []
        shape, devices = list(leaf.shape), mesh.shape[_AXIS]
        shape[len(before)] = examples = batch_size or shape[len(before)]
        if examples % devices:
            raise ValueError(
                f"batch[{name!r}] must divide evenly among {devices} devices, "
                f"got {examples} examples"
            )
        sharding = NamedSharding(mesh, PartitionSpec(*before, _AXIS))
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), tuple(shape))

    return {name: put(name, leaf) for name, leaf in batch.items()}

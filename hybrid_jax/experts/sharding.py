"""The expert axis over devices, beside data parallelism: each device runs its own experts.

    mesh = experts.expert_mesh(4)  # of 8 devices: 4 along 'expert', 2 along 'batch'
    stack = experts.shard_stack(stack, mesh)  # or the stacked states of a training step
    batch = training.shard_batch(batch, mesh)

`map_experts`, and with it `mixture` and `training.make_stacked_step`, sees from the type of a stack
that it lies on such a mesh; nothing else changes.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from hybrid_jax import core
from hybrid_jax.experts.stacking import count

Tree = TypeVar("Tree")
_EXPERT, _BATCH = "expert", "batch"


def expert_mesh(experts: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of axes 'expert' and 'batch': `experts` by D / `experts`, of D devices or all."""
    devices = jax.devices() if devices is None else devices
    core.check_integer("experts", experts, 1)
    if len(devices) % experts:
        raise ValueError(f"experts must divide the {len(devices)} devices, got {experts}")
    shape = (experts, len(devices) // experts)
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, (_EXPERT, _BATCH), axis_types, devices=devices)


def shard_stack(stack: Tree, mesh: Mesh) -> Tree:
    """Divides a stack among the devices by expert; the copies made are the result's own to donate.

    `stack` has leaves (E, …): parameters, or the states of `training.stack_states`.
    """
    if _EXPERT not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis 'expert', got {mesh.axis_names}")
    _check_divides(count(stack), mesh)
    return core.place(stack, mesh, [(".*", PartitionSpec(_EXPERT))])


def share(axes: Sequence[int | None], args: Sequence[Any]) -> list[Any]:
    """The shapes of `args` as one device of their mesh sees them: E / devices experts."""
    mesh = _mesh_of(axes, args)
    parts = 1 if mesh is None else mesh.shape[_EXPERT]

    def own(leaf):
        return jax.ShapeDtypeStruct((leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)

    return [
        jax.tree.map(own, arg) if axis == 0 and parts > 1 else arg
        for axis, arg in zip(axes, args, strict=True)
    ]


def on_each_device(
    mapped: Callable[..., Any], axes: Sequence[int | None], args: Sequence[Any]
) -> Callable[..., Any]:
    """`mapped` over the experts that each device of the mesh of `args` holds.

    Left to the partitioner, unrolled experts would run on every device, all of them.
    """
    mesh = _mesh_of(axes, args)
    if mesh is None:
        return mapped
    sharded = PartitionSpec(_EXPERT)
    on_each = jax.shard_map(
        mapped,
        mesh=mesh,
        in_specs=tuple(sharded if axis == 0 else PartitionSpec() for axis in axes),
        out_specs=sharded,
        axis_names={_EXPERT},  # the batch is left to the partitioner, as in any data parallel step
        check_vma=False,  # functions of users hold loops whose first carry is the same everywhere
    )
    compiled = jax.jit(on_each)

    def run(*args: Any) -> Any:
        # Eager, it could not leave an axis to the partitioner: also where jit is turned off.
        with jax.disable_jit(False):
            return compiled(*args)

    return run


def _mesh_of(axes, args):
    """The mesh that a stack among `args` lies on, if it has an expert axis to divide by."""
    for axis, arg in zip(axes, args, strict=True):
        for leaf in jax.tree.leaves(arg) if axis == 0 else ():
            mesh = jax.typeof(leaf).sharding.mesh if isinstance(leaf, jax.Array) else None
            if mesh and dict(zip(mesh.axis_names, mesh.axis_types)).get(_EXPERT) in (
                AxisType.Auto,
                AxisType.Explicit,
            ):
                _check_divides(leaf.shape[0], mesh)
                return mesh
    return None


def _check_divides(size, mesh):
    if size % mesh.shape[_EXPERT]:
        raise ValueError(
            f"stack must hold a multiple of {mesh.shape[_EXPERT]} experts (the mesh's axis "
            f"'expert'), got {size}"
        )

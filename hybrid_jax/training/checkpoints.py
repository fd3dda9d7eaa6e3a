"""Checkpoints of any pytree of arrays, through Orbax: atomic, by step, restored bit-equal."""

import functools
import os
import pathlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from hybrid_jax import core

Tree = TypeVar("Tree")


class Checkpoints:
    """The checkpoints of one run, in one directory.

    On disk a checkpoint is {path: array}, whatever classes the pytree is made of. It appears under
    its step only when it is complete: a process killed while it writes leaves the ones before as
    they were. `directory` is made by the first `save`; the newest `keep` are kept.

    Example:
      >>> import tempfile
      >>> directory = tempfile.TemporaryDirectory()
      >>> checkpoints = Checkpoints(directory.name)
      >>> checkpoints.save(10, {'w': np.ones(2), 'key': jax.random.key(0)})
      >>> checkpoints.latest()
      10
      >>> like = {'w': np.zeros(2), 'key': jax.random.key(1)}
      >>> checkpoints.restore(10, like)['w'].tolist()
      [1.0, 1.0]
      >>> directory.cleanup()
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        self.directory = pathlib.Path(directory).absolute()
        self._keep = core.check_integer("keep", keep, 1)

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Synchronous: the step that follows may donate the buffers being written.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=False, create=True
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, tree: Any) -> None:
        """Writes `tree`, then drops the oldest beyond `keep`; the step is later than the latest."""
        step = core.check_integer("step", step, 0)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"step must be later than the latest checkpoint {latest}, got {step}")
        self._manager.save(step, args=ocp.args.StandardSave(_arrays(tree)))

    def latest(self) -> int | None:
        """The newest step with a complete checkpoint, or None."""
        if not self.directory.is_dir():
            return None
        return self._manager.latest_step()

    def restore(self, step: int, like: Tree) -> Tree:
        """Reads a checkpoint into the structure, and placed as, `like`, arrays or their shapes."""
        steps = self._manager.all_steps() if self.directory.is_dir() else []
        if step not in steps:
            raise FileNotFoundError(
                f"step must be one of {sorted(steps)} in {self.directory}, got {step}"
            )
        stored = self._manager.restore(step, args=ocp.args.StandardRestore())
        core.check_same_structure(f"checkpoint {self.directory / str(step)}", _specs(like), stored)
        return core.map_with_path(lambda path, leaf: _restored(leaf, stored.get(path)), like)


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by path, as NumPy; those of size 0 hold nothing, and Orbax stores none."""
    return {
        path: np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for path, leaf in core.flatten_paths(tree).items()
        if not core.is_masked_node(leaf) and np.size(leaf)
    }


def _specs(like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What `_arrays(like)` would hold, without its values."""
    return {
        path: jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        for path, leaf in core.flatten_paths(like).items()
        if not core.is_masked_node(leaf) and np.size(leaf)
    }


def _restored(leaf: Any, value: np.ndarray | None) -> Any:
    if core.is_masked_node(leaf):
        return leaf
    if value is None:
        value = np.zeros(leaf.shape, leaf.dtype)
    array = jnp.asarray(value)
    if _is_key(leaf):
        array = jax.random.wrap_key_data(array, impl=leaf.dtype._impl)
    # A committed array was placed on purpose; others stay free to move, as they were.
    placed = isinstance(leaf, jax.Array) and leaf.committed
    return jax.device_put(array, leaf.sharding) if placed else array


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)

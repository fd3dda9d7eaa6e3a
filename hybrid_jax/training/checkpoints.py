"""Checkpoints of any pytree of arrays, through Orbax: atomic, by step, restored bit-equal."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from hybrid_jax import core

Tree = TypeVar("Tree")


class Checkpoints:
    """The checkpoints of one run, in one directory.

    On disk a checkpoint is {path: array}, whatever classes the pytree is made of, with a digest of
    each. It appears under its step only when it is complete: a process killed while it writes
    leaves the ones before as they were. In a `with` block, which waits for it at its end, it is
    written while what follows goes on. `directory` is made by the
    first `save`; the newest `keep` are kept. `whose` says whose they are: those of another run are
    taken for damaged.

    Example:
      >>> import tempfile
      >>> directory = tempfile.TemporaryDirectory()
      >>> checkpoints = Checkpoints(directory.name)
      >>> checkpoints.save(10, {'w': np.ones(2), 'key': jax.random.key(0)}, note={'loss': 0.5})
      >>> checkpoints.latest()
      10
      >>> like = {'w': np.zeros(2), 'key': jax.random.key(1)}
      >>> tree, note = checkpoints.newest(like)
      >>> tree['w'].tolist(), note
      ([1.0, 1.0], {'loss': 0.5})
      >>> directory.cleanup()
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, whose: str = ""):
        directory = core.as_path(directory)
        self.directory = directory if core.in_bucket(directory) else directory.absolute()
        self._keep = core.check_integer("keep", keep, 1)
        self._whose = whose
        self._beside = False

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self):
        self._beside = True
        return self

    def __exit__(self, *error):
        """Waits, as `wait` does, and ends the threads that write."""
        self._beside = False
        if manager := vars(self).pop("_manager", None):
            manager.close()

    def save(self, step: int, tree: Any, note: Any = None) -> None:
        """Writes `tree`, which may be donated at once, and `note`, which is JSON.

        Then the oldest beyond `keep` are dropped. The step is later than the latest.
        """
        step = core.check_integer("step", step, 0)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"step must be later than the latest checkpoint {latest}, got {step}")
        arrays = _arrays(tree)
        digests = {path: core.digest(array) for path, array in arrays.items()}
        facts = core.seal({"whose": self._whose, "digests": digests, "note": note})
        items = {"arrays": ocp.args.StandardSave(arrays), "facts": ocp.args.JsonSave(facts)}
        self._manager.save(step, args=ocp.args.Composite(**items))
        if not self._beside:
            self.wait()

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises what failed."""
        if "_manager" in vars(self):
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest step with a complete checkpoint, or None."""
        return max(self._steps(), default=None)

    def restore(self, step: int, like: Tree) -> Tree:
        """Reads a checkpoint into the structure, and placed as, `like`, arrays or their shapes.

        Raises:
          FileNotFoundError: If there is no such step.
          core.Damaged: If it is not as it was written.
          ValueError: If it is whole, and of another structure.
        """
        return self._read(step, like)[0]

    def newest(self, like: Tree) -> tuple[Tree, Any] | None:
        """As `restore` of the newest that is whole, and its note; None where none is.

        Those that are damaged are told on stderr, and lie beside the others as STEP.damaged.
        """
        while (step := self.latest()) is not None:
            try:
                return self._read(step, like)
            except core.Damaged as error:
                name = f"{step}.damaged"
                core.of_first(functools.partial(self._put_aside, step, name))
                self._manager.reload()
                before = self.latest()
                on = "begins anew" if before is None else f"goes on from step {before}"
                core.say(f"{error}; it is now {name}, and training {on}")
        return None

    def _put_aside(self, step: int, name: str) -> None:
        directory = epath.Path(self.directory)
        (directory / name).rmtree(missing_ok=True)
        (directory / str(step)).rename(directory / name)  # in a bucket file by file

    def _steps(self) -> list[int]:
        return list(self._manager.all_steps()) if self.directory.is_dir() else []

    def _read(self, step, like):
        self.wait()
        if step not in self._steps():
            raise FileNotFoundError(
                f"step must be one of {sorted(self._steps())} in {self.directory}, got {step}"
            )
        name = f"checkpoint {self.directory / str(step)}"
        items = {"arrays": ocp.args.StandardRestore(), "facts": ocp.args.JsonRestore()}
        try:
            with _hushed():
                read = self._manager.restore(step, args=ocp.args.Composite(**items))
            facts, stored = core.unseal(read["facts"]), dict(read["arrays"])
            found = {path: core.digest(array) for path, array in stored.items()}
        except Exception as error:  # whatever the reader of the damaged part raises
            said = " ".join(str(error).split())
            raise core.Damaged(f"{name} is damaged: {type(error).__name__}: {said:.160}") from None
        if facts["digests"] != found:
            raise core.Damaged(f"{name} is damaged: its arrays are not as they were written")
        if facts["whose"] != self._whose:
            raise core.Damaged(f"{name} is of another run, or of another stage of it")
        core.check_same_structure(name, _specs(like), stored)
        tree = core.map_with_path(lambda path, leaf: _restored(leaf, stored.get(path)), like)
        return tree, facts["note"]


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Where one array cannot be read, Orbax closes its loop while others are still under way.

    Python prints a traceback for each of these: they are told of in one line already.
    """
    before = getattr(sys.unraisablehook, "before", sys.unraisablehook)

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    hook.before = before
    sys.unraisablehook = hook
    yield
    sys.unraisablehook = before  # where it failed, the others are still to come


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """Copies of the leaves by path; those of size 0 hold nothing, and Orbax stores none."""
    return {
        path: np.array(core.whole(leaf))
        for path, leaf in core.flatten_paths(tree).items()
        if not core.is_masked_node(leaf) and np.size(leaf)
    }


def _specs(like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What `_arrays(like)` would hold, without its values."""
    return {
        path: jax.eval_shape(jax.random.key_data, leaf) if core.is_key(leaf) else leaf
        for path, leaf in core.flatten_paths(like).items()
        if not core.is_masked_node(leaf) and np.size(leaf)
    }


def _restored(leaf: Any, value: np.ndarray | None) -> Any:
    if core.is_masked_node(leaf):
        return leaf
    if value is None:
        value = np.zeros(leaf.shape, leaf.dtype)
    array = jnp.asarray(value)
    if core.is_key(leaf):
        array = jax.random.wrap_key_data(array, impl=leaf.dtype._impl)
    # A committed array was placed on purpose; others stay free to move, as they were.
    placed = isinstance(leaf, jax.Array) and leaf.committed
    return core.put(array, leaf.sharding) if placed else array

"""Weights out of files, checked leaf by leaf: of JAX by their paths, of PyTorch by its names."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from safetensors.numpy import load_file

from hybrid_jax import core
from hybrid_jax.models import tables
from hybrid_jax.models.given import one_line
from hybrid_jax.models.network import Network
from hybrid_jax.models.registry import create

Names = Mapping[str, Any] | str | None

_PYTORCH = (".pth", ".pt", ".bin", ".ckpt")


def restore(network: Network | Any, path: str | os.PathLike, names: Names = None) -> Any:
    """Reads the parameters of a network (or its variables) from a file: all of them, and no others.

    `path` is a safetensors or npz file of {path of a leaf: array}, a Flax msgpack file, an orbax
    directory, or a safetensors file of a PyTorch state dict; a `.pth` file, which may run code, is
    not read. `names` is None where the file's paths are the network's; for a state dict {our path:
    their name}, whose kernels (out, in, …) become (…, in, out); an entry (names, …, function) is
    made by the function of those arrays instead; or a name of the registry that has a table of
    names.

    Example:
      >>> import tempfile
      >>> variables = {'dense': {'kernel': jnp.zeros((1, 2))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(f'{folder}/state.npz', **{'fc.weight': np.array([[3.0], [4.0]])})
      ...     new = restore(variables, f'{folder}/state.npz', {'dense/kernel': 'fc.weight'})
      >>> new['dense']['kernel'].tolist()
      [[3.0, 4.0]]
    """
    variables = network.params if isinstance(network, Network) else network
    return _placed(variables, _read(pathlib.Path(path)), path, names)


def load(name: str, path: str | os.PathLike, **overrides: Any) -> tuple[nn.Module, Any]:
    """(module, variables) of the registry, with PyTorch's weights of any number of classes."""
    last = tables.head(name)
    state = _read(pathlib.Path(path))
    model = create(name, max(np.size(state.get(last, 0)), 1), **overrides)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return model, _placed(variables, state, path, name)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """{name: array} of a file of any of the formats."""
    if path.suffix in _PYTORCH:
        new = path.with_suffix(".safetensors")
        raise ValueError(
            f"path must not be a pickle, which may run code, got {path}; PyTorch converts it by\n"
            f"  import torch, safetensors.torch; state = torch.load({str(path)!r}, 'cpu')\n"
            "  safetensors.torch.save_file({k: v.clone() for k, v in state.get('state_dict', "
            f"state).items()}}, {str(new)!r})"
        )
    if not path.exists():
        raise ValueError(f"path must be a file of weights, got {path}, which does not exist")
    reader = _orbax if path.is_dir() else _READERS.get(path.suffix)
    if reader is None:
        formats = ", ".join(_READERS)
        raise ValueError(f"path must be an orbax directory or end in {formats}, got {path}")
    try:
        state = core.flatten_paths(reader(path))
    except Exception as error:
        raise ValueError(f"path must be readable, got {path}: {one_line(error)}") from error
    # As DataParallel and DistributedDataParallel save it.
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _npz(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _orbax(path):
    """Of a checkpoint, or of a step that a manager saved, of `training.Checkpoints` or another."""
    steps = (path / "arrays", path / "default", path)
    # A path must be absolute. As NumPy: the devices that saved it need not be here.
    folder = next(step for step in steps if step.is_dir()).resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        options = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, restore_args=options)


_READERS: dict[str, Callable[[pathlib.Path], Any]] = {
    ".safetensors": load_file,
    ".npz": _npz,
    ".msgpack": lambda path: serialization.msgpack_restore(path.read_bytes()),
}
"""Endings of files -> what reads them."""


def _placed(variables: Any, state: dict[str, Any], path: Any, names: Names) -> Any:
    """`variables` with the arrays of a file; the error has a line for each that does not fit."""
    leaves = core.flatten_paths(variables)
    entries = _entries(leaves, state, names)
    wanted = dict.fromkeys(name for *theirs, _ in entries.values() for name in theirs)
    faults = [f"has no entry of names for {ours!r}" for ours in leaves if ours not in entries]
    faults += [f"has an entry of names for {ours!r} over" for ours in entries if ours not in leaves]
    faults += [f"lacks {name!r}" for name in wanted if name not in state]
    faults += [
        f"has {name!r} over"
        for name in state
        if name not in wanted and name.rpartition(".")[2] != "num_batches_tracked"
    ]
    arrays = {}
    for ours, (*theirs, convert) in entries.items():
        if ours not in leaves or any(name not in state for name in theirs):
            continue
        array, leaf = convert(*(np.asarray(state[name]) for name in theirs)), leaves[ours]
        arrays[ours] = array
        if array.shape != leaf.shape:
            shapes = f"in shape {array.shape}, not {leaf.shape}"
            faults.append(f"has {theirs[0]!r} {shapes}, for {ours!r}")
        elif _is_float(array) != _is_float(leaf):
            faults.append(f"has {theirs[0]!r} in {array.dtype}, not {leaf.dtype}, for {ours!r}")
    if faults:
        lines = "\n  ".join(faults)
        raise ValueError(f"path must hold the network's weights, got {path}, which\n  {lines}")
    core.check_finite(f"the weights in {path}", arrays)
    return core.map_with_path(
        lambda ours, leaf: core.on_device(np.asarray(arrays[ours], leaf.dtype)), variables
    )


def _entries(leaves, state, names) -> dict[str, tuple[Any, ...]]:
    """{path of ours: (names of theirs, …, function of their arrays)}."""
    if names is None or (isinstance(names, str) and not leaves.keys().isdisjoint(state)):
        return {ours: (ours, lambda array: array) for ours in leaves}
    names = tables.table(names, leaves) if isinstance(names, str) else names
    return {
        ours: (theirs, _as_in_flax) if isinstance(theirs, str) else tuple(theirs)
        for ours, theirs in names.items()
    }


def _as_in_flax(array: np.ndarray) -> np.ndarray:
    """(out, in, …) as (…, in, out)."""
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)

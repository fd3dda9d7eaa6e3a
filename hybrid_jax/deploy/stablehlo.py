"""StableHLO: a function with its parameters as one file, for any XLA device, without this package.

Who receives the file needs `jax` alone: `jax.export.deserialize(data).call(x)`. A top-1 mixture of
functions is exported as `experts.one_of`, which runs the gate and one expert for each image.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact
from hybrid_jax.program import kernel_bits

PLATFORMS = ("cpu", "cuda", "tpu")

KIND = "stablehlo"

_BATCH = "b"
_ALLOWED_CALLS = {"shape_assertion"}  # the check of a symbolic batch; no code of a backend


def export(
    path: str | os.PathLike,
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    platforms: Sequence[str] = PLATFORMS,
    symbolic_batch: bool = True,
) -> dict[str, Any]:
    """Writes `fn` with `params` as constants to a StableHLO file and a manifest beside it.

    `fn(params, *inputs)` makes array(s), of arrays or `jax.ShapeDtypeStruct`s with a leading batch
    axis, which is left open (any size of at least 1) if `symbolic_batch`. Integers of `params` stay
    integers. One file serves all `platforms`, of 'cpu', 'cuda', 'rocm' and 'tpu'. On any failure
    what was there stays.

    Returns:
      The manifest: kind, jax version, calling_convention_version, platforms, inputs and outputs
      (lists of shape and dtype, an open batch written 'b'), bytes and sha256.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     manifest = export(f'{folder}/f', lambda w, x: x @ w, jnp.eye(2), jnp.ones((1, 2)))
      >>> manifest['inputs'], manifest['platforms']
      ([{'shape': ['b', 2], 'dtype': 'float32'}], ['cpu', 'cuda', 'tpu'])
    """
    return _write(path, fn, params, inputs, platforms, symbolic_batch, {})


def _write(path, fn, params, inputs, platforms, symbolic_batch, facts):
    if not platforms:
        raise ValueError(f"platforms must hold at least one of {', '.join(PLATFORMS)}, got none")
    for platform in platforms:
        core.check_choice("platforms", platform, [*PLATFORMS, "rocm"])
    specs = _specs(inputs, symbolic_batch)
    params = jax.tree.map(jnp.asarray, params)

    def inference(*args):
        return fn(params, *args)

    with _without_tracebacks():
        exported = jax.export.export(jax.jit(inference), platforms=tuple(platforms))(*specs)
    calls = set(re.findall(r"custom_call @([\w.$]+)", exported.mlir_module())) - _ALLOWED_CALLS
    if calls:
        raise ValueError(
            f"fn must lower to plain StableHLO for {', '.join(platforms)}, "
            f"got custom calls: {', '.join(sorted(calls))}"
        )
    facts |= {
        "kind": KIND,
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "inputs": [artifact.described(aval.shape, aval.dtype) for aval in exported.in_avals],
        "outputs": [artifact.described(aval.shape, aval.dtype) for aval in exported.out_avals],
    }
    return artifact.write(path, bytes(exported.serialize()), facts)


def export_program(
    path: str | os.PathLike,
    program: p.Program | p.Choice,
    *,
    platforms: Sequence[str] = PLATFORMS,
    symbolic_batch: bool = True,
    forms: p.Forms | None = None,
    simulated: bool = False,
) -> dict[str, Any]:
    """Writes an inference graph to a StableHLO file, as `export` does; int8 weights take a byte.

    A choice runs for each image what that needs. Without `symbolic_batch` the file takes
    one image; `forms` are for `run`; `simulated` computes in floats what `simulate` does. The
    manifest has kernel_bits too.
    """
    fn = (p.simulate if simulated else p.run)(program, forms)
    first = program.parts[0]
    given = [first.tensors[name] for name in first.inputs]
    inputs = [jax.ShapeDtypeStruct((1, *own.shape), own.dtype) for own in given]
    facts = {"kernel_bits": kernel_bits(program)}
    return _write(path, lambda _, *x: fn(*x), (), inputs, platforms, symbolic_batch, facts)


def load(path: str | os.PathLike) -> Callable[..., Any]:
    """An exported file, checked against its manifest, as a jitted function of the inputs."""
    data, manifest = artifact.read(path, KIND, ["jax"])
    try:
        newer = _version(manifest["jax"]) > _version(jax.__version__)
        loaded = None if newer else _function(data)
    except Exception as error:  # a stranger's file may fail in any way
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} must be a file of export, got: {said:.300}") from None
    if newer:
        raise ValueError(
            f"{path} must be made by jax {jax.__version__} or older, got {manifest['jax']}"
        )
    return loaded


@functools.lru_cache(maxsize=4)
def _function(data):
    """Kept, so that a file that is opened again is not compiled again."""
    return jax.jit(jax.export.deserialize(bytearray(data)).call)


def _version(text):
    return tuple(int(number) for number in text.split(".")[:2])


@contextlib.contextmanager
def _without_tracebacks():
    """The lines of Python behind each operation are no part of a model, and 5 % of its file."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _specs(inputs, symbolic_batch):
    # All inputs share one scope, and so one batch size.
    scope = jax.export.SymbolicScope()
    specs = []
    for i, x in enumerate(inputs):
        if not x.shape:
            raise ValueError(f"inputs[{i}] must have a leading batch axis, got a scalar")
        batch = jax.export.symbolic_shape(_BATCH, scope=scope) if symbolic_batch else x.shape[:1]
        specs.append(jax.ShapeDtypeStruct((*batch, *x.shape[1:]), x.dtype))
    return specs

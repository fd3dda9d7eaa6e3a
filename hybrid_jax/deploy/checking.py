"""Checking an export: its answers, its size and its speed, beside those of the dense model."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.deploy import artifact
from hybrid_jax.deploy.targets import TARGETS
from hybrid_jax.deploy.timing import Latency, latency


class Check(NamedTuple):
    """How an exported file compares with its model, and with the dense one in the same runtime."""

    target: str  # of `TARGETS`
    bytes: int  # of the file; of C what its constants take, as the file is text
    dense_bytes: int  # of the dense model's, alike
    max_difference: float  # largest absolute difference of an output from those expected
    agreement: float  # share of inputs with the same top-1 class, in [0, 1]; NaN names no class
    count: int  # number of inputs compared
    # {batch size: times, in seconds, and their ratio to the dense model's}
    latencies: Mapping[int, Latency]
    outputs: np.ndarray  # (n, …), those of the file


def export_to(
    target: str, path: str | os.PathLike, program: p.Program | p.Choice, **options: Any
) -> dict[str, Any]:
    """Writes a program for one target.

    `target` is one of `TARGETS`, and `options` are those of its writer. A manifest is written
    beside the file, and returned. On any failure what was there stays.

    Raises:
      ValueError: If the target cannot express the program.
      ImportError: If what the target needs is not installed; names the extra.
    """
    core.check_choice("target", target, TARGETS)
    if not isinstance(program, p.Program | p.Choice):
        kind = type(program).__name__
        raise ValueError(
            f"program must be a Program, as lower makes one, or a choice of some, got {kind}"
        )
    return TARGETS[target].export(path, program, **options)


def check(
    target: str,
    path: str | os.PathLike,
    dense_path: str | os.PathLike,
    x: np.ndarray,
    expected: np.ndarray,
    *,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    pairs: int = 30,
    parts: int = 1,
) -> Check:
    """Runs an exported file in its target's runtime, beside the dense float model's.

    It is opened as a user opens it: no option is set that the file does not carry, but for the
    number of `threads` where times are taken (XLA's are those of the process). `path` and
    `dense_path` are what `export_to` wrote of the model and of the dense float one, `x` (n, …) real
    inputs and `expected` (n, …) the outputs of the model for them. `pairs` are timed at each of the
    batch sizes, each over `parts` different batches: more than one for a mixture or a cascade, in
    which an image may take more time than another.
    """
    core.check_choice("target", target, TARGETS)
    x, expected = np.asarray(x), np.asarray(expected)
    for batch in batches:
        core.check_integer("batches", batch, 1, len(x))
    open_session = TARGETS[target].session
    largest = max(batches, default=1)
    run = open_session(path, batch=largest, threads=None)
    whole = len(x) - len(x) % largest
    ran = [run(x[i : i + largest]) for i in range(0, whole, largest)]
    if whole < len(x):
        one = open_session(path, batch=1, threads=None)
        ran += [one(x[i : i + 1]) for i in range(whole, len(x))]
    outputs = np.concatenate([np.asarray(part) for part in ran])
    if outputs.shape != expected.shape:
        raise ValueError(f"expected must have shape {outputs.shape}, got {expected.shape}")
    named, wanted = (np.asarray(core.top_class(logits)) for logits in (outputs, expected))
    latencies = {}
    for batch in batches:
        ours, dense = (
            open_session(file, batch=batch, threads=threads) for file in (path, dense_path)
        )
        count = min(parts, len(x) // batch)
        latencies[batch] = latency(ours, dense, x[: batch * count], pairs=pairs, parts=count)
    return Check(
        target,
        *(_stored_bytes(file) for file in (path, dense_path)),
        float(np.abs(outputs - expected).max()),
        float(((named == wanted) & (named >= 0)).mean()),
        len(x),
        latencies,
        outputs,
    )


def _stored_bytes(path):
    _, manifest = artifact.read(path)
    return manifest.get("flash", manifest["bytes"])

"""Argument checks: an error names the argument, what it got and what it expected."""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from hybrid_jax.core import paths, placing


def batch_size(inputs: Any) -> int:
    """How many examples a batch holds: the leading axis of the first array that has one."""
    shapes = (np.shape(leaf) for leaf in jax.tree.leaves(inputs))
    return next((shape[0] for shape in shapes if shape), 1)


def check_batches(batches: Iterable[tuple[Any, ...]], alike: bool = False) -> Iterator[Any]:
    """Yields the batches, each a tuple that holds an example; `alike`, all as the first."""
    count, first = 0, None
    for count, batch in enumerate(batches, 1):
        if not isinstance(batch, tuple):
            raise TypeError(f"batches must yield tuples of inputs, got {type(batch).__name__}")
        if alike:
            first = batch if count == 1 else first
            check_same_structure("every batch", first, batch)
        if not batch_size(batch):
            raise ValueError(f"every batch must hold an example, got none in batch {count}")
        yield batch
    if not count:
        raise ValueError("batches must hold at least one batch, got none")


def check_fraction(name: str, value: float) -> float:
    """Returns `value`, a concrete real number, as a float if it lies in [0, 1]."""
    if not _is_real(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Returns `value` as a float if it is finite and above zero."""
    if not _is_real(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def check_integer(name: str, value: int, low: int | None = None, high: int | None = None) -> int:
    """Returns `value` as an int if it is an integer of Python or NumPy in [`low`, `high`]."""
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    above = number is not None and (low is None or low <= number)
    if above and (high is None or number <= high):
        return number
    bounds = {(True, False): f" of at least {low}", (False, True): f" of at most {high}"}
    bounds |= {(True, True): f" in [{low}, {high}]", (False, False): ""}
    expected = bounds[low is not None, high is not None]
    raise ValueError(f"{name} must be an integer{expected}, got {value!r}")


def check_choice(name: str, value: str, options: Iterable[str]) -> str:
    """Returns `value` if it is one of `options`; the error names the nearest of them."""
    options = list(options)
    if value not in options:
        close = difflib.get_close_matches(str(value), options, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}{hint}")
    return value


def check_same_structure(name: str, expected: Any, got: Any) -> None:
    """Raises unless both pytrees have the same paths, and leaves of equal shape and dtype."""
    left, right = paths.flatten_paths(expected), paths.flatten_paths(got)
    for path in [*left, *right]:
        a = _describe(left[path]) if path in left else "no leaf"
        b = _describe(right[path]) if path in right else "no leaf"
        if a != b:
            raise ValueError(f"{name} must have {a} at {path!r}, got {b}")
    if jax.tree.structure(expected) != jax.tree.structure(got):
        raise ValueError(
            f"{name} must have structure {jax.tree.structure(expected)}, "
            f"got {jax.tree.structure(got)}"
        )


def check_same_paths(name: str, tree: Any, like_name: str, like: Any) -> None:
    """Raises unless both pytrees have the same paths, `optax.MaskedNode()` counting as a leaf."""
    ours, theirs = paths.flatten_paths(tree), paths.flatten_paths(like)
    for path in [*theirs, *ours]:
        if path not in ours or path not in theirs:
            raise ValueError(
                f"{name} must have the structure of {like_name}, got {path!r} in one of them only"
            )


def check_masks(params: Any, masks: Any) -> None:
    """Raises unless every mask is bool and of its parameter's path and shape, or `MaskedNode`."""
    check_same_paths("masks", masks, "params", params)
    leaves = paths.flatten_paths(params)
    for path, mask in paths.flatten_paths(masks).items():
        if paths.is_masked_node(mask):
            continue
        expected = _describe(jax.ShapeDtypeStruct(np.shape(leaves[path]), np.bool_))
        if _describe(mask) != expected:
            raise ValueError(f"masks must have {expected} at {path!r}, got {_describe(mask)}")


def check_arrays(
    ends: Sequence[tuple[str, Sequence[int], Any]], arrays: Sequence[Any], multiple: int = 0
) -> None:
    """Raises unless arrays are (B, *shape) of the `ends` (name, shape, dtype), bytes only as bytes.

    With a `multiple` B is one, above 0.
    """
    if len(arrays) != len(ends):
        raise ValueError(f"inputs must be {len(ends)} arrays, got {len(arrays)}")
    for (name, shape, dtype), x in zip(ends, arrays, strict=True):
        size, *own = np.shape(x) or (0, None)
        if own != list(shape) or (multiple and (not size or size % multiple)):
            wanted = f"({', '.join(map(str, ('B', *shape)))})"
            wanted += f" with B = {multiple}, {2 * multiple}, …" if multiple else ""
            raise ValueError(f"{name} must have shape {wanted}, got {np.shape(x)}")
        got = jax.numpy.result_type(x)
        if (np.dtype(dtype) == np.uint8) != (got == np.uint8):
            raise ValueError(f"{name} must be of dtype {np.dtype(dtype)}, got {got}")


def check_finite(name: str, tree: Any) -> None:
    """Raises if a leaf of a concrete pytree holds NaN or infinity; names the first path."""
    for path, leaf in paths.flatten_paths(tree).items():
        if paths.is_masked_node(leaf) or not jax.numpy.issubdtype(leaf.dtype, np.inexact):
            continue
        bad = int(np.size(leaf) - np.isfinite(placing.whole(leaf)).sum())
        if bad:
            values = "value" if bad == 1 else "values"
            raise ValueError(
                f"{name} must be finite, got {bad} NaN or infinite {values} "
                f"of {np.size(leaf)} at {path!r}"
            )


def _is_real(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    return isinstance(value, numbers.Real) or (
        hasattr(value, "dtype") and np.ndim(value) == 0 and np.isrealobj(value)
    )


def _describe(leaf: Any) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return type(leaf).__name__

"""Pytree paths as strings, and the one rule engine that works on them."""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import optax

REQUIRED = object()
"""Default of `match_rules`: a path that no rule covers is an error."""


def path_string(key_path: Sequence[Any]) -> str:
    """Writes a JAX key path with slashes, as 'params/Conv_0/kernel'."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def is_masked_node(leaf: Any) -> bool:
    """Whether `leaf` is the `optax.MaskedNode()` that stands where nothing is pruned."""
    return isinstance(leaf, optax.MaskedNode)


def flatten_paths(tree: Any) -> dict[str, Any]:
    """Flattens a pytree to {path: leaf}, in tree order; `MaskedNode` counts as a leaf.

    Two leaves of one path, as with keys that hold a slash, are an error.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked_node)
    flat = {path_string(path): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        names = [path_string(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tree must have distinct paths, got {twice!r} more than once")
    return flat


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `f(path, leaf, *leaves of rest)` over `tree`; `MaskedNode` counts as a leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(path_string(path), *leaves), tree, *rest, is_leaf=is_masked_node
    )


def map_masked(f: Callable[..., Any], masks: Any, tree: Any, *rest: Any) -> Any:
    """Maps `f(mask, leaf, *leaves of rest)`; where the mask is a `MaskedNode` the leaf stays."""

    def one(path, mask, leaf, *others):
        return leaf if is_masked_node(mask) else f(mask, leaf, *others)

    return map_with_path(one, masks, tree, *rest)


def map_state(
    tx: optax.GradientTransformation,
    f: Callable[..., Any],
    state: Any,
    *rest: Any,
    others: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """Maps `f(entry, *leaves of rest)` over what an optimizer's state holds for each parameter.

    `MaskedNode` counts as a leaf. `rest` are pytrees like the parameters, and `others` maps what
    belongs to no parameter (counts, rates). `tx.init` has to take any pytree.
    """
    try:
        calls = optax.tree_map_params(
            tx,
            lambda *leaves: functools.partial(f, *leaves),
            state,
            *rest,
            transform_non_params=lambda leaf: functools.partial(others, leaf),
            is_leaf=is_masked_node,
        )
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason"])[0]
        raise ValueError(
            "the optimizer must have an init that takes any pytree, as optax.tree_map_params asks, "
            f"and the state be its own, got {type(error).__name__}: {reason}"
        ) from error
    # Called out here, so that an error of `f` is told as it is.
    return jax.tree.map(lambda call: call(), calls)


def match_rules(
    rules: Iterable[tuple[str, Any]], paths: Iterable[str], default: Any = REQUIRED
) -> dict[str, Any]:
    """Gives each path the value of the first rule (pattern, value) whose pattern matches all of it.

    A path that no rule matches has the `default`; without one, it is an error, as is a rule that
    matches nothing.

    Example:
      >>> match_rules([('.*/kernel', 4)], ['a/kernel', 'a/bias'], default=32)
      {'a/kernel': 4, 'a/bias': 32}
    """
    paths = list(paths)
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise ValueError(
                f"rule {pattern!r} must be a regular expression, got: {error}"
            ) from error
    for pattern, _ in compiled:
        if not any(pattern.fullmatch(path) for path in paths):
            raise ValueError(
                f"rule {pattern.pattern!r} must match at least one path, "
                f"got none of: {', '.join(paths)}"
            )
    values = {
        path: next((value for pattern, value in compiled if pattern.fullmatch(path)), default)
        for path in paths
    }
    uncovered = [path for path, value in values.items() if value is REQUIRED]
    if uncovered:
        raise ValueError(f"rules must cover every path, got none for: {', '.join(uncovered)}")
    return values

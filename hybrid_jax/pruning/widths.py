"""Widths of coupled groups: the best channels of a width, and what narrowing one group costs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.masking import apply_masks
from hybrid_jax.pruning.selection import keep_best


def keep_widths(scores: Mapping[str, jax.Array], widths: Mapping[str, int]) -> dict[str, jax.Array]:
    """Keeps so many channels of each group: the highest scores, of equal ones the lower index.

    Args:
      scores: {group name: (n,) scores}, of `group_scores`.
      widths: {group name: channels kept}, from 1 to n; groups left out keep all.

    Returns:
      {group name: (n,) bool}, True where kept.

    Raises:
      ValueError: If a group of `widths` has no scores, or a width is not from 1 to n.

    Example:
      >>> import jax.numpy as jnp
      >>> keep = keep_widths({'a': jnp.array([1.0, 3.0, 2.0]), 'b': jnp.ones(2)}, {'a': 2})
      >>> {name: kept.tolist() for name, kept in keep.items()}
      {'a': [False, True, True], 'b': [True, True]}
    """
    for name, width in widths.items():
        core.check_choice("group of widths", name, scores)
        core.check_integer(f"width of {name!r}", width, 1, len(scores[name]))
    return {name: keep_best(s, widths.get(name, len(s))) for name, s in scores.items()}


def width_sensitivity(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    groups: Sequence[core.Group],
    scores: Mapping[str, jax.Array],
    widths: Mapping[str, Iterable[int]],
    damage: Callable[[Any, Any], jax.Array],
) -> dict[str, dict[int, float]]:
    """Measures the damage of narrowing one group, for each group and each of several widths.

    All other groups keep their channels. What is left is not trained. The channels are masked, so
    that all widths are one compilation.

    Args:
      fn: fn(params, *inputs) -> outputs, in evaluation mode; or -> loss.
      params: Its parameters.
      batches: Yields tuples of inputs; the damage is the mean over batches.
      groups: The coupled groups, `core.trace(...).groups`.
      scores: {group name: (n,) scores}, of `group_scores`.
      widths: {group name: widths to try}.
      damage: (outputs, outputs of the whole model) -> float32 ().

    Returns:
      {group name: {width: damage}}.

    Raises:
      ValueError: If there is no batch, a group has no scores or no widths, a width is not from 1
        to n, or a damage is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> params = {'a': jnp.array([[3.0, 1.0]]), 'b': jnp.ones((2, 1))}
      >>> groups = core.trace(fn, params, jnp.ones((1, 1))).groups
      >>> lost = lambda y, reference: jnp.sum(reference - y)
      >>> scores = {'a': jnp.array([3.0, 1.0])}
      >>> width_sensitivity(fn, params, [(jnp.ones((1, 1)),)], groups, scores, {'a': (1, 2)}, lost)
      {'a': {1: 1.0, 2: 0.0}}
    """
    tried = {(name, width): [] for name, each in widths.items() for width in each}
    for name in widths:
        if not any(group == name for group, _ in tried):
            raise ValueError(f"widths must hold some for {name!r}, got none")

    whole = jax.jit(fn)
    compared = jax.jit(lambda params, inputs, outputs: damage(fn(params, *inputs), outputs))
    for batch in batches:
        outputs = whole(params, *batch)
        for (name, width), values in tried.items():
            masks = core.expand(keep_widths(scores, {name: width}), groups, params)
            values.append(compared(apply_masks(params, masks), batch, outputs))
    if not all(tried.values()):
        raise ValueError("batches must hold at least one batch, got none")
    result: dict[str, dict[int, float]] = {name: {} for name in widths}
    for (name, width), values in tried.items():
        result[name][width] = float(np.mean(np.array(values, np.float64)))
    core.check_finite("damage", jax.tree.map(np.asarray, result))
    return result

"""Pruning in rounds, each of which removes channels for good and trains on with what is left.

Right after a removal the plain criteria leave a network at chance. Training on is part of the
method, and so is the re-estimation of BatchNorm's statistics (`training.reestimate_batchnorm`),
which brings back most of what a removal takes before the first step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.coupling import keep_channels

Fns = Sequence[Callable[..., Any]]
Scores = Mapping[str, Any]


def prune_in_rounds(
    fns: Fns,
    params: Any,
    tree: Any,
    graph: core.Graph,
    sparsities: Sequence[float],
    score: Callable[[Fns, Any, core.Graph], Scores],
    train: Callable[[Fns, Any], Any],
    choose: Callable[[Scores, float], Mapping[str, Any]] = keep_channels,
    cut: Callable[[Any, Mapping[str, Any]], Any] = core.slice_tree,
) -> tuple[list[Callable[..., Any]], Any, dict[str, np.ndarray]]:
    """Alternates score → remove → train, once for each of `sparsities`: (small_fns, tree, keep).

    A removal narrows `fns`, fn(params, *inputs) for inference and for training, and slices
    everything in `tree` (the parameters, or a train state), so that training goes on at once.
    Sparsities, not falling, are fractions of the first widths, and met exactly; a schedule gives
    them: `[float(cubic(0.5, 0, n)(r)) for r in range(1, n + 1)]`. `keep` are channels of the first
    widths.

    `graph` is of the first of `fns` and of `params`, or their shapes. score(fns, tree, graph) ->
    {group name: (n,) scores} is of the network as it is now; train(fns, tree) -> tree;
    choose(scores, sparsity) -> {group name: (n,) bool}, with scores at the first widths, lowest
    where removed; cut(tree, kept) is `core.slice_tree` of what has the parameters' paths, and
    `core.slice_state` of an optimizer's state.

    Example:
      >>> import jax
      >>> from hybrid_jax.pruning import group_scores, magnitude
      >>> fn = lambda params, x: jax.nn.relu(x @ params['a']) @ params['b']
      >>> params = {'a': jnp.arange(24.0).reshape(3, 8), 'b': jnp.ones((8, 2))}
      >>> (small_fn,), small, keep = prune_in_rounds(
      ...     [fn], params, params, core.trace(fn, params, jnp.ones((1, 3))), (0.25, 0.5),
      ...     score=lambda fns, params, graph: group_scores(
      ...         magnitude(graph.kernels, params), graph.groups),
      ...     train=lambda fns, params: params)
      >>> small['a'].shape, keep['a'].tolist()
      ((3, 4), [False, False, False, False, True, True, True, True])
    """
    if not len(sparsities):
        raise ValueError("sparsities must hold the sparsity of a round, got none")
    keep = {group.name: np.ones(group.size, bool) for group in graph.groups}
    kept = core.keep_indices(keep, graph.groups, params)
    small = list(fns)
    for sparsity in sparsities:
        scores = score(small, tree, core.narrow_graph(graph, keep))
        keep = _chosen(choose(_at_first_widths(scores, keep), sparsity), keep)
        before, kept = kept, core.keep_indices(keep, graph.groups, params)
        tree = cut(tree, _relative(kept, before))
        small = [core.narrow(fn, params, kept) for fn in fns]
        tree = train(small, tree)
    return small, tree, keep


def _at_first_widths(scores: Scores, keep: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Scores of the network as it is now at its first widths, what is removed below all others."""
    now = {name: np.asarray(s, np.float32) for name, s in scores.items()}
    core.check_finite("scores", now)
    everything = np.concatenate([*now.values(), np.zeros(1, np.float32)])
    lowest = everything.min() - np.abs(everything).max() - 1

    def widen(name, own):
        core.check_choice("group of scores", name, keep)
        left = int(keep[name].sum())
        if own.shape != (left,):
            raise ValueError(
                f"scores of group {name!r} must have {left} channels, got shape {own.shape}"
            )
        full = np.full(keep[name].shape, lowest, np.float32)
        full[keep[name]] = own
        return jnp.asarray(full)

    return {name: widen(name, own) for name, own in now.items()}


def _chosen(new: Mapping[str, Any], old: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    chosen = old | {name: np.asarray(kept) for name, kept in new.items()}
    for name, kept in old.items():
        if (chosen[name] & ~kept).any():
            raise ValueError(
                f"sparsities must not fall, got more channels of group {name!r} than the "
                f"{kept.sum()} that are left"
            )
    return chosen


def _relative(kept: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Where the indices that stay are among those that were left before."""
    return {
        path: tuple(np.searchsorted(b, k) for b, k in zip(before[path], kept[path], strict=True))
        for path in kept
    }

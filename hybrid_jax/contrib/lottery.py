"""Lottery tickets: prune what was trained, rewind what is left, train again."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.pruning.allocation import Allocation
from hybrid_jax.pruning.granularity import Granularity
from hybrid_jax.pruning.masking import apply_masks
from hybrid_jax.pruning.schedules import iterative
from hybrid_jax.pruning.scoring import Scoring

Train = Callable[[Any, Any, jax.Array], Any]


class Ticket(NamedTuple):
    """A sparse network: the fraction removed, its masks, its parameters after training on them."""

    sparsity: jax.Array
    masks: Any
    trained: Any


def lottery_tickets(
    train: Train,
    params: Any,
    criterion: Callable[[Any], Any],
    key: jax.Array,
    rounds: int,
    fraction: float | jax.Array = 0.2,
    granularity: Granularity | None = None,
    allocation: Allocation | None = None,
    *,
    exempt: Sequence[str] = (),
) -> list[Ticket]:
    """Iterative pruning with rewinding: train, prune, rewind, and so on for some rounds.

    Every training starts from `params`: the initialization in J. Frankle and M. Carbin, The Lottery
    Ticket Hypothesis (arXiv 1803.03635), or what a few steps of dense training make of it in J.
    Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis (arXiv 1912.05671).
    Ticket k of the `rounds` + 1, the first one dense, has sparsity 1 − (1 − `fraction`)^k; K seeds
    are one `jax.vmap`. `train(params, masks, key) -> trained` holds what `masks` remove at zero (as
    by `hold_masks`); `criterion(trained)` gives scores. The others are as for `masks`.

    Example:
      >>> import functools
      >>> from hybrid_jax.pruning import magnitude
      >>> train = lambda params, masks, key: {'w': 10 * params['w']}
      >>> params = {'w': jnp.array([[1.0, -2.0, 3.0, -4.0]])}
      >>> graph = core.trace(lambda params, x: x @ params['w'], params, jnp.ones((1, 1)))
      >>> score = functools.partial(magnitude, graph.kernels)
      >>> for ticket in lottery_tickets(train, params, score, jax.random.key(0), 2, fraction=0.5):
      ...     print(ticket.sparsity, ticket.trained['w'])
      0.0 [[ 10. -20.  30. -40.]]
      0.5 [[  0.   0.  30. -40.]]
      0.75 [[  0.   0.   0. -40.]]
    """
    core.check_integer("rounds", rounds, 0)
    schedule = iterative(fraction, every=1, rounds=max(rounds, 1))
    scoring = Scoring(criterion, schedule, granularity, allocation, 1, tuple(exempt), (), None)
    masks, trained, tickets = scoring.nothing_removed(params), params, []
    for k, round_key in enumerate(jax.random.split(key, rounds + 1)):
        sparsity = schedule(k)
        masks = scoring.masks(trained, [], sparsity, masks)
        trained = train(apply_masks(params, masks), masks, round_key)
        core.check_same_structure("the result of train", params, trained)
        tickets.append(Ticket(sparsity, masks, trained))
    return tickets


def instability(
    train: Train,
    error: Callable[[Any], jax.Array],
    params: Any,
    masks: Any,
    key: jax.Array,
    points: int = 30,
) -> jax.Array:
    """The error barrier between two trainings of a ticket that differ in their key alone.

    It is how far the largest error exceeds the mean of the two ends, of `points` networks evenly
    spaced on the line between them. Below 0.02, with `error(params) -> ()` the fraction
    misclassified, the ticket is called stable. J. Frankle et al., Linear Mode Connectivity and the
    Lottery Ticket Hypothesis (arXiv 1912.05671).
    """
    core.check_integer("points", points, 2)
    start = apply_masks(params, masks)
    one, other = (train(start, masks, k) for k in jax.random.split(key))
    path = jnp.linspace(0.0, 1.0, points)
    errors = jax.lax.map(lambda t: error(_between(one, other, t)), path)
    return jnp.max(errors) - (errors[0] + errors[-1]) / 2


def _between(one: Any, other: Any, t: jax.Array) -> Any:
    """(1 − t) `one` + t `other`; leaves that are not floating are those of `one`."""

    def leaf(a, b):
        if not jnp.issubdtype(jnp.result_type(a), jnp.floating):
            return a
        share = jnp.asarray(t, a.dtype)
        return (1 - share) * a + share * b

    return jax.tree.map(leaf, one, other)

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

    Every training starts from `params`: from the initialization in J. Frankle and M. Carbin, The
    Lottery Ticket Hypothesis (arXiv 1803.03635), or from the parameters after a few steps of
    dense training, which larger networks need, in J. Frankle et al., Linear Mode Connectivity and
    the Lottery Ticket Hypothesis (arXiv 1912.05671).

    K seeds are one `jax.vmap` over `params` and `key`, where `train` allows it; that works with a
    stack of networks and with a loop on the host alike. Compile `train`, and the rounds share it.

    Ticket k of the `rounds` + 1, the first one dense, has sparsity 1 − (1 − `fraction`)^k; its own
    parameters are `apply_masks(params, ticket.masks)`.

    Args:
      train: `train(params, masks, key) -> trained`, from where `params` were taken to the end,
        with what `masks` remove held at zero (as by `hold_masks`); `key` for the data order.
      params: Pytree of parameters to rewind to.
      criterion: `criterion(trained) -> scores`, such as `functools.partial(magnitude, kernels)`.
      key: A key of `jax.random.key`; every training has its own.
      rounds: How many times to prune, from 0.
      fraction: Removed of what remains in each round.
      granularity: As for `masks`.
      allocation: As for `masks`. The papers' is `global_()` except for small networks.
      exempt: As for `masks`.

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

    Below 0.02, with `error` the fraction misclassified, the ticket is called stable. J. Frankle
    et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis (arXiv 1912.05671).

    `error(params) -> ()` is of the data to judge on, and `points` are those of `errors_between`.
    """
    start = apply_masks(params, masks)
    one, other = (train(start, masks, k) for k in jax.random.split(key))
    return barrier(errors_between(error, one, other, points))


def errors_between(
    error: Callable[[Any], jax.Array], one: Any, other: Any, points: int = 30
) -> jax.Array:
    """(points,) errors of networks evenly spaced on the line from `one` to `other`, both included.

    One network is in memory at a time. `error(params) -> ()`.

    Example:
      >>> errors_between(lambda w: jnp.abs(w), jnp.float32(-1.0), jnp.float32(3.0), points=5)
      Array([1., 0., 1., 2., 3.], dtype=float32)
    """
    core.check_integer("points", points, 2)
    core.check_same_structure("other", one, other)
    return jax.lax.map(lambda t: error(interpolate(one, other, t)), jnp.linspace(0.0, 1.0, points))


def interpolate(one: Any, other: Any, t: float | jax.Array) -> Any:
    """(1 − t) `one` + t `other`, leaf by leaf; leaves that are not floating are those of `one`.

    What both masks remove stays exactly zero.
    """

    def between(a, b):
        if not jnp.issubdtype(jnp.result_type(a), jnp.floating):
            return a
        share = jnp.asarray(t, a.dtype)
        return (1 - share) * a + share * b

    return jax.tree.map(between, one, other)


def barrier(errors: jax.Array) -> jax.Array:
    """How far the largest of errors (..., points) on a path exceeds the mean of its two ends.

    Never negative; on a path that rises all the way it is half the difference of the ends. J.
    Frankle et al. (arXiv 1912.05671) call it linear interpolation instability.

    Example:
      >>> float(barrier(jnp.array([0.25, 0.75, 0.5, 0.25])))
      0.5
    """
    return jnp.max(errors, axis=-1) - (errors[..., 0] + errors[..., -1]) / 2

"""A cascade: the cheap expert answers where it is sure, and else the next one runs."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import experts
from hybrid_jax.recipes.controls import cost_of
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.state import State
from hybrid_jax.recipes.task import Task

CHOICES = 64
"""Thresholds tried for each expert: quantiles of its confidence on the validation images."""


class Chosen(NamedTuple):
    """When the experts of a cascade hand on, and what that gives on the images that chose it.

    Attributes:
      thresholds: (E - 1,) as of `experts.cascade`.
      share: As of `experts.cascade`.
      score: Mean of the answers.
      cost: Mean over images, in the unit of the costs.
      went_on: (E - 1,) share of images that each expert but the last handed on.
    """

    thresholds: tuple[float, ...]
    share: float
    score: float
    cost: float
    went_on: tuple[float, ...]


def decided(task: Task, state: State, shares: Sequence[float], most: float | None = None) -> State:
    """Returns the state with its experts as a cascade, the one of fewest MACs first.

    Where there is a gate, that stays instead if it keeps `most` MACs on average and is at least as
    good on the validation images; the cascade may then cost no more than it does.
    """
    costs = [cost_of(model).macs for model in state.experts]
    gated = state.gate and _gated(task, state, costs)
    within = gated and (most is None or gated[1] <= most)
    made = tuple(state.experts[e] for e in np.argsort(costs, kind="stable"))
    found = choose(task, made, sorted(costs), shares, gated[1] if within else most)
    facts = {**state.facts, "cascade": found._asdict()}
    if within and gated[0] >= found.score:
        return state._replace(facts=facts)
    return state._replace(
        experts=made,
        before=(),
        gate=None,
        thresholds=found.thresholds,
        share=found.share,
        facts=facts,
    )


def _gated(task, state, costs) -> tuple[float, float]:
    """Score and mean MACs of the mixture behind its gate, on the validation images."""
    images = task.splits.validation
    logits = task.outputs(state.gate.fn, state.gate.params, images)
    weights = experts.top_k(1)(jnp.asarray(logits)).weights
    scores = task.scores(state.experts, images)
    used = np.asarray(weights).mean(0)
    score = (scores.T * np.asarray(weights)).sum(-1).mean()
    return float(score), float(used @ np.array(costs)) + cost_of(state.gate).macs


def choose(
    task: Task,
    made: Sequence[Model],
    costs: Sequence[float],
    shares: Sequence[float] = (0.0,),
    most: float | None = None,
) -> Chosen:
    """Returns the thresholds and the share that are best on validation images.

    Of all that cost at most `most` on average over images, those of the highest score; of equals
    the cheapest. Where none does, the cheapest of all.

    `made` are the cheapest first, `costs` (E,) those of each, as its MACs; `most` is in their unit,
    None for no limit.
    """
    validation, spent, found = task.splits.validation, np.cumsum(costs), []
    outputs = np.stack([task.outputs(model.fn, model.params, validation) for model in made])
    for share in shares:
        answers = np.asarray(jax.jit(experts.opinions)(outputs, share))
        scores = np.stack([task.score(own, validation) for own in answers])
        sure = np.asarray(jax.jit(experts.max_probability)(answers[:-1]))
        quantiles = [np.unique(np.quantile(own, np.linspace(0, 1, CHOICES))) for own in sure]
        for thresholds in itertools.product(*(np.append(np.float32(0), own) for own in quantiles)):
            stage = np.cumprod(sure < np.array(thresholds)[:, None], 0).sum(0)
            score = np.take_along_axis(scores, stage[None], 0).mean()
            went_on = [float((stage > e).mean()) for e in range(len(made) - 1)]
            cost = float(spent[stage].mean())
            found.append(
                Chosen(tuple(map(float, thresholds)), share, float(score), cost, tuple(went_on))
            )
    fitting = [own for own in found if most is None or own.cost <= most]
    if not fitting:
        return min(found, key=lambda own: own.cost)
    return max(fitting, key=lambda own: (own.score, -own.cost))

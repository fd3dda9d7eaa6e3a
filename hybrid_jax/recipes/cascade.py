"""A cascade: the cheap expert answers where it is sure, and else the next one runs."""

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import experts, training
from hybrid_jax import program as p
from hybrid_jax.recipes.controls import cost_of
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.schema import MEANS
from hybrid_jax.recipes.state import State
from hybrid_jax.recipes.task import Task

CHOICES = 64
"""Thresholds tried for each expert: quantiles of its confidence on the validation images."""
SPENT = 0.95
"""Part of a limit from which on it counts as spent."""


def confidence(task: Task) -> p.Program | None:
    """Returns how sure an answer of the task is, as a program of it.

    None is the largest probability of a class, on which every target decides alike to the bit;
    any other function is lowered.

    Raises:
      ValueError: If there is none, or it is not in [0, 1].
    """
    own, network = task.objective.confidence, task.network
    if own is None:
        raise ValueError(
            "confidence must be given for a cascade where outputs are no classes, confidence("
            "outputs) in [0, 1], got None; mixture.kind 'gate' needs none"
        )
    shape = jax.eval_shape(network.predict, network.params, task.images[:8]).shape
    if own is training.class_probability and len(shape) == 2:
        return None
    outputs = jax.jit(network.predict)(network.params, task.images[:8])
    sure = np.asarray(own(outputs))
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(f"confidence must be in [0, 1], got {sure.min()} to {sure.max()}")
    try:
        return p.lower(lambda _, y: own(y), {}, outputs)
    except ValueError as error:
        raise ValueError(f"confidence must be one that is lowered: {error}") from error


class Chosen(NamedTuple):
    """When the experts of a cascade hand on, and what that gives on the images that chose it.

    Attributes:
      thresholds: (E - 1,) as of `experts.cascade`.
      share: As of `experts.cascade`.
      score: Mean of the answers.
      cost: {name: mean over images}, as of the costs.
      went_on: (E - 1,) share of images that each expert but the last handed on.
    """

    thresholds: tuple[float, ...]
    share: float
    score: float
    cost: dict[str, float]
    went_on: tuple[float, ...]


def decided(task: Task, state: State, shares: Sequence[float], most: Mapping[str, float]) -> State:
    """Returns the state with its experts as a cascade, the one of fewest MACs first.

    Where there is a gate, that stays instead if it keeps `most` on average and is at least as good
    on the validation images; the cascade may then cost no more MACs than it does.
    """
    prices = [cost_of(model) for model in state.experts]
    order = np.argsort([price.macs for price in prices], kind="stable")
    costs = {name: np.array([getattr(price, name) for price in prices]) for name in MEANS}
    gated = state.gate and _gated(task, state, costs)
    within = gated and _keeps(gated[1], most)
    made = tuple(state.experts[e] for e in order)
    limits = {**most, "macs": gated[1]["macs"]} if within else most
    found = choose(task, made, {name: own[order] for name, own in costs.items()}, shares, limits)
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


def _keeps(cost: Mapping[str, float], most: Mapping[str, float]) -> bool:
    return all(own <= most.get(name, np.inf) for name, own in cost.items())


def _spends(cost: Mapping[str, float], most: Mapping[str, float]) -> bool:
    return any(own >= SPENT * most.get(name, np.inf) for name, own in cost.items())


def _gated(task, state, costs) -> tuple[float, dict[str, float]]:
    """Score and mean costs of the mixture behind its gate, on the validation images."""
    images, price = task.splits.validation, cost_of(state.gate)
    logits = task.outputs(state.gate.fn, state.gate.params, images)
    weights = experts.top_k(1)(jnp.asarray(logits)).weights
    scores = task.scores(state.experts, images)
    used = np.asarray(weights).mean(0)
    score = (scores.T * np.asarray(weights)).sum(-1).mean()
    spent = {name: float(used @ own) + getattr(price, name) for name, own in costs.items()}
    return float(score), spent


def choose(
    task: Task,
    made: Sequence[Model],
    costs: Mapping[str, np.ndarray],
    shares: Sequence[float] = (0.0,),
    most: Mapping[str, float] = MappingProxyType({}),
) -> Chosen:
    """Returns the thresholds and the share that are best on validation images.

    Of all that cost at most `most` on average over images, those of the highest score; of equals
    the cheapest. Where none does, the cheapest of all. But those that spend a limit up to `SPENT`
    come first where they are within a standard error of it: what dearer experts see more of is
    seldom answered worse, which few images cannot tell.

    `made` are the cheapest first, `costs` {name: (E,)} those of each, such as its MACs; `most` may
    limit some of them.
    """
    validation, found, sure_of = task.splits.validation, [], task.objective.confidence
    stages = jax.jit(jax.vmap(experts.stages, (None, 0)))
    total = {name: np.cumsum(own) for name, own in costs.items()}
    first = next(iter(costs))
    outputs = np.stack([task.outputs(model.fn, model.params, validation) for model in made])
    for share in shares:
        answers = np.asarray(jax.jit(experts.opinions)(outputs, share))
        scores = np.stack([task.score(own, validation) for own in answers])
        sure = np.asarray(jax.jit(experts.confidences, static_argnums=1)(answers, sure_of))
        quantiles = [np.unique(np.quantile(own, np.linspace(0, 1, CHOICES))) for own in sure]
        *before, last = [np.append(0, own).astype(np.float32) for own in quantiles]
        for some in itertools.product(*before):
            tried = np.array([(*some, own) for own in last])
            for thresholds, stage in zip(tried, np.asarray(stages(sure, tried)), strict=True):
                taken = np.take_along_axis(scores, stage[None], 0)
                went_on = tuple(float((stage > e).mean()) for e in range(len(some) + 1))
                cost = {name: float(own[stage].mean()) for name, own in total.items()}
                chosen = Chosen(
                    tuple(thresholds.tolist()), share, float(taken.mean()), cost, went_on
                )
                found.append((chosen, float(taken.std()) / taken.size**0.5))
    fitting = [own for own in found if _keeps(own[0].cost, most)]
    if not fitting:
        return min(found, key=lambda own: own[0].cost[first])[0]

    def rank(own):
        return own[0].score, -own[0].cost[first]

    best, error = max(fitting, key=rank)
    spent = [
        own for own in fitting if own[0].score >= best.score - error and _spends(own[0].cost, most)
    ]
    return max(spent or fitting, key=rank)[0]

"""A cascade: the cheap expert answers where it is sure, and else the next one runs."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from hybrid_jax import experts
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.task import Task

CHOICES = 64
"""Thresholds tried for each expert: quantiles of its confidence on the validation images."""


def thresholds(
    task: Task, made: Sequence[Model], costs: Sequence[float], most: float | None = None
) -> tuple[tuple[float, ...], dict]:
    """Returns how sure each expert but the last must be to answer, chosen on validation images.

    Of all that cost at most `most` on average over images, those of the highest score; of equals
    the cheapest. Where none does, the cheapest of all.

    `made` are the cheapest first, `costs` (E,) those of each, as its MACs; `most` is in their unit,
    None for no limit.

    Returns:
      (E - 1,) thresholds as of `experts.cascade`, and what they gave: {'score', 'mean cost', 'went
      on': share of images that each expert but the last handed on}.
    """
    validation = task.splits.validation
    outputs = [task.outputs(model.fn, model.params, validation) for model in made]
    scores = np.stack([task.score(own, validation) for own in outputs])
    confidence = jax.jit(experts.max_probability)
    sure = np.stack([np.asarray(confidence(own)) for own in outputs[:-1]])
    tried = [np.unique(np.quantile(own, np.linspace(0, 1, CHOICES))) for own in sure]
    tried = [np.append(np.float32(0), own) for own in tried]
    spent = np.cumsum(costs)
    best = None
    for chosen in itertools.product(*tried):
        stage = np.cumprod(sure < np.array(chosen)[:, None], 0).sum(0)
        cost = spent[stage].mean()
        fits = most is None or cost <= most
        score = np.take_along_axis(scores, stage[None], 0).mean()
        rank = (fits, score if fits else 0.0, -cost)
        if best is None or rank > best[0]:
            went_on = [float((stage > e).mean()) for e in range(len(made) - 1)]
            found = {"score": float(score), "mean cost": float(cost), "went on": went_on}
            best = rank, tuple(map(float, chosen)), found
    return best[1:]

"""When a cascade hands on: the cheap expert is wrong on the image that it is least sure of."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import data
from hybrid_jax.recipes import cascade

CHEAP = np.array([[6.0, 0], [0, 4.0], [1.0, 0], [0.5, 0]], np.float32)
DEAR = np.array([[3.0, 0], [0, 3.0], [0, 3.0], [0, 3.0]], np.float32)
LABELS = np.array([0, 1, 0, 1], np.int32)
COSTS = {"macs": np.array([10.0, 30.0]), "bops": np.array([1.0, 9.0])}


@pytest.fixture
def task():
    images = data.Arrays(np.zeros((4, 1, 1, 1), np.uint8), LABELS)
    return types.SimpleNamespace(
        splits=types.SimpleNamespace(validation=images),
        outputs=lambda fn, params, arrays: params,
        score=lambda outputs, arrays: np.asarray(outputs.argmax(-1) == arrays.labels, float),
    )


MADE = [types.SimpleNamespace(fn=None, params=own) for own in (CHEAP, DEAR)]


def test_without_a_budget_it_hands_on_where_that_is_right(task):
    found = cascade.choose(task, MADE, COSTS)
    assert (found.score, found.went_on) == (1.0, (0.25,))
    assert found.cost == {"macs": 10 + 30 / 4, "bops": 1 + 9 / 4}
    (threshold,) = found.thresholds
    sure = np.exp(CHEAP).max(-1) / np.exp(CHEAP).sum(-1)
    assert sure[3] < threshold <= sure[2]


@pytest.mark.parametrize(
    ("most", "went_on"),
    [({"macs": 17.5}, 0.25), ({"macs": 17.4}, 0), ({"bops": 3.25}, 0.25), ({"bops": 3.2}, 0)],
)
def test_the_mean_keeps_the_budget(task, most, went_on):
    found = cascade.choose(task, MADE, COSTS, most=most)
    assert found.went_on == (went_on,)
    assert all(found.cost[name] <= limit for name, limit in most.items())


def test_what_nothing_keeps_gives_the_cheapest(task):
    assert cascade.choose(task, MADE, COSTS, most={"macs": 1.0}).cost["macs"] == 10


def test_a_share_of_the_first_answer_is_chosen_where_it_helps(task):
    # Where the second is wrong and hardly sure, the first one's opinion is to stay.
    dear = np.array([[3.0, 0], [0, 3.0], [0, 0.2], [0, 3.0]], np.float32)
    made = [MADE[0], types.SimpleNamespace(fn=None, params=jnp.asarray(dear))]
    cheap = np.array([[6.0, 0], [0, 4.0], [0.5, 0], [1.0, 0]], np.float32)
    made[0] = types.SimpleNamespace(fn=None, params=cheap)
    found = cascade.choose(task, made, COSTS, shares=(0.0, 0.5))
    assert (found.score, found.share) == (1.0, 0.5)

"""When a cascade hands on: the cheap expert is wrong on the image that it is least sure of."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import data, models, training
from hybrid_jax import program as p
from hybrid_jax.recipes import cascade, state

CHEAP = np.array([[6.0, 0], [0, 4.0], [1.0, 0], [0.5, 0]], np.float32)
DEAR = np.array([[3.0, 0], [0, 3.0], [0, 3.0], [0, 3.0]], np.float32)
LABELS = np.array([0, 1, 0, 1], np.int32)
COSTS = {"macs": np.array([10.0, 30.0]), "bops": np.array([1.0, 9.0])}


@pytest.fixture
def task():
    images = data.Arrays(np.zeros((4, 1, 1, 1), np.uint8), LABELS)
    return types.SimpleNamespace(
        splits=types.SimpleNamespace(validation=images),
        objective=training.classification(),
        outputs=lambda fn, params, arrays: params,
        score=lambda outputs, arrays: np.asarray(outputs.argmax(-1) == arrays.labels, float),
        scores=lambda made, arrays: np.stack(
            [np.asarray(own.params.argmax(-1) == arrays.labels, float) for own in made]
        ),
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


def test_a_limit_is_spent_where_that_is_no_worse(task):
    right = np.array([[3.0, 0], [0, 3.0], [3.0, 0], [0, 3.0]], np.float32)
    made = [MADE[0], types.SimpleNamespace(fn=None, params=right)]
    assert cascade.choose(task, made, COSTS).went_on == (0.25,)
    found = cascade.choose(task, made, COSTS, most={"macs": 25.0})
    assert (found.score, found.went_on, found.cost["macs"]) == (1.0, (0.5,), 25.0)
    # More than half a limit is left: as without one.
    assert cascade.choose(task, made, COSTS, most={"macs": 90.0}).went_on == (0.25,)
    assert cascade.choose(task, MADE, COSTS, most={"macs": 25.0}).went_on == (0.25,)


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


def test_a_confidence_that_is_no_probability_of_a_class_is_lowered():
    """That of pixels as it is, one of the user's own too; what cannot be is told."""

    def found(own, *shape):
        x = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
        network = models.Network(lambda params, images: images * params, None, np.float32(1))
        objective = training.classification()._replace(confidence=own)
        task = types.SimpleNamespace(objective=objective, network=network, images=jnp.asarray(x))
        return cascade.confidence(task), x

    assert found(training.class_probability, 3)[0] is None
    for own, shape in (
        (training.class_probability, (4, 4, 3)),
        (lambda y: jnp.exp(-jnp.abs(y[:, 1])), (2,)),
    ):
        program, x = found(own, *shape)
        np.testing.assert_allclose(p.run(program)(x), own(x), rtol=1e-6)
    for own, message in (
        (None, "confidence must be given for a cascade"),
        (lambda y: y[:, 0] - 9, r"confidence must be in \[0, 1\], got -1"),
        (lambda y: jnp.ones(len(y)), "confidence must be one that is lowered: .* got a constant"),
    ):
        with pytest.raises(ValueError, match=message):
            found(own, 2)


GATES = {"right": [1, 1, 1, 0], "dear": [0, 0, 0, 0], "cheap": [1, 1, 1, 1]}
"""Which of (dear, cheap) a gate picks for each image: the cheap one is wrong on the last alone, the
dear one on the third. They cost 17, 31 and 11 MACs on average, that of the gate included."""


@pytest.mark.parametrize(
    ("picks", "most", "stays", "score", "cost"),
    [
        # For no more than the gate's 16 the cascade hands on nothing.
        ("right", {}, True, 0.75, 10),
        ("right", {"macs": 16.0}, True, 0.75, 10),
        ("right", {"macs": 15.9}, False, 0.75, 10),  # the better gate is above the budget
        ("right", {"bops": 3.9}, False, 1.0, 17.5),  # it has 1 + 3 · 1/4 + 9 · 1/4 of them
        ("dear", {}, False, 1.0, 17.5),
        ("dear", {"macs": 17.4}, False, 0.75, 10),
        ("cheap", {}, True, 0.75, 10),  # of equals the gate
    ],
)
def test_a_gate_stays_where_validation_does_not_prefer_the_cascade(
    task, monkeypatch, picks, most, stays, score, cost
):
    prices = {id(DEAR): (30.0, 9.0), id(CHEAP): (10.0, 1.0), "gate": (1.0, 1.0)}

    def price(model):
        own = prices.get(id(model.params), prices["gate"])
        return types.SimpleNamespace(macs=own[0], bops=own[1])

    monkeypatch.setattr(cascade, "cost_of", price)
    chosen = types.SimpleNamespace(fn=None, params=jnp.eye(2)[jnp.array(GATES[picks])])
    start = state.State(None, tuple(MADE[::-1]), (), chosen)
    made = cascade.decided(task, start, (0.0,), most)
    found = made.facts["cascade"]
    assert (found["score"], found["cost"]["macs"]) == (score, cost)
    assert (made.gate is chosen) == stays
    if stays:
        assert made.experts == start.experts
        assert made.thresholds == ()
    else:
        assert made.experts == tuple(MADE)
        assert (made.thresholds, made.share) == (found["thresholds"], 0.0)

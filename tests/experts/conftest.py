"""Every routing that we ship, for what all of them must do."""

from typing import Any, NamedTuple

import pytest

from hybrid_jax import experts

COSTS = [1.0, 2.0, 3.0, 4.0]


class Case(NamedTuple):
    """A routing of four experts.

    `most`: how many experts an input has at most; `alone`: the like routing of one expert; `make`:
    the factory, of k, if it has one; `sums`: whether the weights of an input sum to 'one', 'at most
    one' or 'one or zero'; `chooser`: whether each 'input' chooses its experts, each 'expert' its
    inputs, or 'chance'.
    """

    routing: Any
    most: int
    alone: Any
    make: Any = None
    sums: str = "one"
    chooser: str = "input"


def _top_of_all(k):
    return experts.top_k(k, normalize=False)


def _choice_of_all(k):
    return experts.expert_choice(k, normalize=False)


def _cost_aware(k, costs=COSTS):
    return experts.cost_aware(experts.top_k(k), costs, 0.5)


soft, switch, random = experts.soft(), experts.switch(), experts.random()
top_k, noisy, choice = experts.top_k, experts.noisy_top_k, experts.expert_choice
straight = experts.straight_through(top_k(1))
ROUTINGS = {
    "soft": Case(soft, 4, soft),
    "top_1": Case(top_k(1), 1, top_k(1), top_k),
    "top_2": Case(top_k(2), 2, top_k(1), top_k),
    "top_2_of_all": Case(_top_of_all(2), 2, _top_of_all(1), _top_of_all, "at most one"),
    "switch": Case(switch, 1, switch, None, "at most one"),
    "noisy": Case(noisy(2), 2, noisy(1), noisy),
    "straight": Case(straight, 1, straight),
    "random": Case(random, 1, random, chooser="chance"),
    "choice": Case(choice(2), 4, choice(1), choice, "one or zero", "expert"),
    "choice_of_all": Case(
        _choice_of_all(1), 4, _choice_of_all(1), _choice_of_all, "at most one", "expert"
    ),
    "cost_aware": Case(_cost_aware(1), 1, _cost_aware(1, COSTS[:1]), _cost_aware),
}


@pytest.fixture(scope="session", params=ROUTINGS)
def case(request):
    return ROUTINGS[request.param]

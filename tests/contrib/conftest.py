"""Every routing that can be dispatched, those of contrib among them."""

import pytest
from routings import ROUTINGS, Case

from hybrid_jax.contrib import expert_choice


def choice_of_all(k):
    return expert_choice(k, normalize=False)


CHOICES = {
    "choice": Case(expert_choice(2), 4, expert_choice(1), expert_choice, "one or zero", "expert"),
    "choice_of_all": Case(
        choice_of_all(1), 4, choice_of_all(1), choice_of_all, "at most one", "expert"
    ),
}


@pytest.fixture(params=CHOICES)
def choice(request):
    return CHOICES[request.param]


@pytest.fixture(params=ROUTINGS | CHOICES)
def case(request):
    return (ROUTINGS | CHOICES)[request.param]

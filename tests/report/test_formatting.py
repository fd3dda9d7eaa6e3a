import math

import pytest

from hybrid_jax.report import formatting
from hybrid_jax.report.rows import Mean


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, "fast", True])
@pytest.mark.parametrize(
    "write",
    [
        formatting.percent,
        lambda value: formatting.change("accuracy", value),
        lambda value: formatting.score("R²", value),
        formatting.si,
        formatting.times,
        formatting.p_value,
        formatting.duration,
        formatting.milliseconds,
    ],
)
def test_what_is_no_finite_number_is_a_dash(write, missing):
    assert write(missing) == "–"


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1.00 kB"),
        (312_000, "B", "312 kB"),
        (999_499, "B", "999 kB"),
        (999_500, "B", "1.00 MB"),
        (41_234_567, "MACs", "41.2 M MACs"),
        (3_276_800_000, "BOPs", "3.28 G BOPs"),
    ],
)
def test_si_has_three_digits_and_the_prefix_that_fits(value, unit, expected):
    assert formatting.si(value, unit) == expected


def test_points_that_round_to_zero_have_no_sign():
    assert formatting.change("accuracy", -0.00001) == "0.00"


def test_a_spread_of_zero_is_shown_for_accuracy_and_left_out_for_costs():
    assert formatting.percent(Mean((0.5, 0.5))) == "50.00 ± 0.00 %"
    assert formatting.si(Mean((1000, 1000)), "B") == "1.00 kB"
    assert formatting.times(Mean((0.5, 0.7))) == "0.60 ± 0.14×"


def test_another_metric_than_accuracy_is_a_plain_number():
    assert formatting.score("R²", -0.5) == "−0.5"
    assert formatting.change("R²", 0.0123) == "+0.0123"
    assert formatting.change("R²", 0.0) == "0"

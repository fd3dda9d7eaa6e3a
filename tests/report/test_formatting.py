import math

import pytest

from hybrid_jax.report import formatting


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, "fast", True])
@pytest.mark.parametrize(
    "write",
    [
        formatting.percent,
        formatting.points,
        formatting.si,
        formatting.times,
        formatting.p_value,
        formatting.duration,
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
    assert formatting.points(-0.00001) == "0.00"


def test_a_spread_of_zero_is_shown_for_accuracy_and_left_out_for_costs():
    assert formatting.percent(0.5, 0.0) == "50.00 ± 0.00 %"
    assert formatting.si(1000, "B", 0.0) == "1.00 kB"

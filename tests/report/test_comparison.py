import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import report
from hybrid_jax.report import comparison


def test_mcnemar_equals_the_hand_computed_value():
    # 8 examples: a alone right on 5, b alone on 1, both on 1, neither on 1.
    # P(at most 1 of 6 fair coins) = (1 + 6) / 64; two-sided 14 / 64 = 0.21875.
    a = [1, 1, 1, 1, 1, 0, 1, 0]
    b = [0, 0, 0, 0, 0, 1, 1, 0]
    test = report.mcnemar(a, b)
    assert (test.only_a, test.only_b) == (5, 1)
    assert test.p_value == pytest.approx(0.21875, abs=1e-12)


def test_mcnemar_of_equal_models_has_no_evidence():
    assert report.mcnemar([1, 0, 1], [1, 0, 1]).p_value == 1.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_binomial_tail_and_symmetric(pairs):
    a, b = zip(*pairs, strict=True)
    test, swapped = report.mcnemar(a, b), report.mcnemar(b, a)
    n, least = test.only_a + test.only_b, min(test.only_a, test.only_b)
    tail = 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    assert test.p_value == pytest.approx(min(1.0, tail))
    assert swapped == (test.only_b, test.only_a, test.p_value)


def test_mcnemar_refuses_other_examples():
    with pytest.raises(ValueError, match=r"correct_b .* got shapes \(2,\) and \(3,\)"):
        report.mcnemar([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match=r"got shapes \(1, 1, 1\) and \(1, 1, 1\)"):
        report.mcnemar([[[1]]], [[[1]]])


def test_mcnemar_of_several_runs_counts_each_example_once():
    # Of three runs a is right more often on the first six, b on the seventh; on the eighth each is
    # right once, on the ninth both always. 6 of 7 fair coins: 2 · (1 + 7) / 2^7 = 0.125, where
    # the discordant pairs of all runs, 13 to 3, taken as independent would give 0.021.
    a = [[1] * 6 + [0, 1, 1], [1] * 6 + [0, 0, 1], [0] * 6 + [0, 0, 1]]
    b = [[0] * 6 + [1, 0, 1], [0] * 6 + [1, 1, 1], [0] * 6 + [0, 0, 1]]
    test = report.mcnemar(a, b)
    assert (test.only_a, test.only_b) == (6, 1)
    assert test.p_value == pytest.approx(0.125)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_the_same_run_repeated_is_no_more_evidence(pairs):
    a, b = zip(*pairs, strict=True)
    assert report.mcnemar([a] * 3, [b] * 3) == report.mcnemar(a, b)


def test_rivals_are_dense_the_controls_and_the_best_expert_but_not_the_oracle(make_results):
    found = {c.rival: c for c in report.compare(make_results())}
    assert set(found) == {
        "dense",
        "average of all experts",
        "random gate",
        "equal-bytes net",
        "equal-BOPs net",
        "best single expert",
    }
    # The mixture is right on 352 of 360, the best expert (expert 2) on 351.
    assert found["best single expert"].difference == pytest.approx(1 / 360)
    assert found["equal-bytes net"].verdict == "equal"


def _result(mixture, rival):
    accuracy = lambda correct: sum(correct) / len(correct)  # noqa: E731
    return {
        "rows": [
            {"name": "net", "kind": "control", "accuracy": accuracy(rival), "correct": rival},
            {"name": "moe", "kind": "mixture", "accuracy": accuracy(mixture), "correct": mixture},
        ]
    }


def test_a_control_is_beaten_only_beyond_chance():
    # 6 to 0: p = 2 / 64 = 0.031. 5 to 0: p = 2 / 32 = 0.0625.
    (beaten,) = report.compare(_result([1] * 10, [0] * 6 + [1] * 4))
    (chance,) = report.compare(_result([1] * 10, [0] * 5 + [1] * 5))
    assert (beaten.verdict, beaten.beaten) == ("beaten", True)
    assert (chance.verdict, chance.beaten) == ("ahead, within chance", False)
    assert comparison.summary(_result([1] * 10, [0] * 6 + [1] * 4))[1] == (
        "It beats net (+60.00 points, p = 0.031)."
    )
    assert comparison.summary(_result([0] * 6 + [1] * 4, [1] * 10))[1] == (
        "It does NOT beat net (−60.00 points, p = 0.031): significantly behind."
    )
    assert comparison.summary(_result([1] * 10, [0] * 5 + [1] * 5))[1] == (
        "It does NOT beat net (+50.00 points, p = 0.062): within chance."
    )


def test_a_test_that_points_to_the_other_side_is_no_evidence():
    for difference, verdict in ((0.01, "beaten"), (-0.01, "behind, within chance")):
        test = comparison.McNemar(9, 0, 2 / 2**9)
        assert comparison.Comparison("net", 0.9, difference, test).verdict == verdict


def test_without_correctness_nothing_is_claimed(make_results):
    results = make_results()
    for row in results["rows"]:
        row["correct"] = None
    assert not any(c.beaten for c in report.compare(results))
    assert "equal-BOPs net (+0.56 points): not tested." in " ".join(comparison.summary(results))


def test_summary_states_costs_and_the_gates_skill(make_results):
    text = " ".join(comparison.summary(make_results()))
    # 352 / 360 = 97.78 %; 352 − 354 = −2 of 360 = −0.56; 312000 / 57900 = 5.39.
    assert "“mixture top-1” classifies 97.78 %" in text
    assert "−0.56 points against the dense parent" in text
    assert "5.39× fewer bytes" in text
    # (352 − 347) / (360 − 347) = 38 %.
    assert "covers 38 % of that distance" in text


def test_warnings_name_what_is_slow_and_the_oracle_gap(make_results):
    assert comparison.warnings(make_results()) == [
        "expert 3 is slower than dense: 1.08× its latency",
        "mixture top-2 is slower than dense: 1.31× its latency",
        "Oracle gap: the gate leaves 2.22 points to a gate that is always right",
    ]


def _change(make_results, **changes):
    """Warnings that appear when top-level entries are replaced, or `row.field` values."""
    before, results = comparison.warnings(make_results()), make_results()
    for key, value in changes.items():
        if key in results:
            results[key] = value
        else:
            row = next(r for r in results["rows"] if r["name"] == "mixture top-1")
            row[key] = value
    return [text for text in comparison.warnings(results) if text not in before]


def test_a_mixture_larger_than_dense_is_warned_of(make_results):
    found = _change(make_results, bytes=624_000)
    assert "mixture top-1 is larger than dense: 2.00× its bytes" in found
    # 58100 / 624000: the control no longer has the mixture's size.
    assert "equal-bytes net is not equal: 0.09× the mixture's bytes" in found


def test_a_collapsed_gate_is_warned_of(make_results):
    found = _change(make_results, gate={"usage": [[0.0, 1.0, 0.0, 0.0]] * 10})
    assert found == ["The gate collapsed: expert 1 gets 100.00 % of the images"]
    found = _change(make_results, gate={"usage": [[0.5, 0.5, 0.0, 0.0]] * 10})
    assert found == [
        "The gate hardly ever uses expert 2 and 3 (less than a tenth of an even share)"
    ]
    # The share of all images goes before the mean over classes.
    found = _change(make_results, gate={"usage": [[0.25] * 4] * 10, "share": [0.0, 0.0, 1.0, 0.0]})
    assert found == ["The gate collapsed: expert 2 gets 100.00 % of the images"]


def test_experts_that_agree_are_warned_of(make_results):
    (found,) = _change(make_results, disagreement=[[0.0, 0.001], [0.001, 0.0]])
    assert found.startswith("The experts are alike: no two disagree on more than 0.10 %")


def test_a_gain_beyond_what_ensembles_reach_is_warned_of(make_results):
    (found,) = _change(make_results, accuracy=1.0, correct=[1] * 360)
    assert found.startswith("The gain of 2.50 points over the best expert")


def test_a_deployed_model_that_differs_is_warned_of(make_results):
    (record,) = make_results()["exports"]
    (found,) = _change(make_results, exports=[record | {"agreement": 0.99}])
    assert found == (
        "The packed file of the mixture agrees with the model on only 99.00 % of the test images"
    )


def test_effective_experts():
    # exp(−(¾ ln ¾ + ¼ ln ¼)) = exp(0.56234) = 1.7548; a class without images does not count.
    share = comparison.usage_share({"usage": [[0.75, 0.25], [0.75, 0.25], [math.nan, math.nan]]})
    assert comparison.effective_experts(share) == pytest.approx(1.7548, abs=1e-4)
    assert comparison.effective_experts([0.0, 1.0]) == 1.0

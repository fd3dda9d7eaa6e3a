import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import report
from hybrid_jax.report import Results, Row, comparison, warnings


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


def test_mcnemar_of_scores_is_the_sign_test():
    # Better on three of four, worse on one: 2 · (1 + 4) / 16 = 0.625.
    test = report.mcnemar([-0.1, -0.2, -0.3, -0.9], [-0.2, -0.3, -0.4, -0.1])
    assert test == (3, 1, pytest.approx(0.625))


def test_rivals_are_the_parents_the_controls_and_the_best_expert_but_not_the_oracle(make_results):
    found = {c.rival: c for c in report.compare(Results.from_json(make_results()))}
    assert set(found) == {
        "dense",
        "dense int8",
        "average",
        "random gate",
        "equal-size net",
        "equal-cost net",
        "expert 2",
    }
    # The mixture is right on 352 of 360, the best expert (expert 2) on 351.
    assert found["expert 2"].difference == pytest.approx(1 / 360)
    assert found["equal-size net"].verdict == "equal"


def test_an_expert_that_was_named_is_the_rival_instead_of_the_best_one(make_results):
    results = make_results()
    results["rows"][3]["rival"] = True
    rivals = {c.rival for c in report.compare(Results.from_json(results))}
    assert "expert 1" in rivals
    assert "expert 2" not in rivals


def test_no_word_of_a_name_is_a_role(make_results):
    results, renamed = make_results(), make_results()
    for i, row in enumerate(renamed["rows"]):
        row["name"] = f"best equal bytes oracle {i}"
    before, after = (comparison.compare(Results.from_json(r)) for r in (results, renamed))
    assert [c[1:] for c in before] == [c[1:] for c in after]
    before, after = (warnings.of(Results.from_json(r)) for r in (results, renamed))
    assert len(before) == len(after)


def _result(mixture, rival):
    accuracy = lambda correct: sum(correct) / len(correct)  # noqa: E731
    return Results(
        (
            Row("net", "control", accuracy(rival), rival, rival=True),
            Row("moe", "mixture", accuracy(mixture), mixture),
        )
    )


def test_a_control_is_beaten_only_beyond_chance():
    # 6 to 0: p = 2 / 64 = 0.031. 5 to 0: p = 2 / 32 = 0.0625.
    (beaten,) = report.compare(_result([1] * 10, [0] * 6 + [1] * 4))
    (chance,) = report.compare(_result([1] * 10, [0] * 5 + [1] * 5))
    assert (beaten.verdict, chance.verdict) == ("beaten", "ahead, within chance")
    (behind,) = report.compare(_result([0] * 6 + [1] * 4, [1] * 10))
    assert (behind.verdict, behind.difference) == ("behind", -0.6)


def test_a_test_that_points_to_the_other_side_is_no_evidence():
    for difference, verdict in ((0.01, "beaten"), (-0.01, "behind, within chance")):
        test = comparison.McNemar(9, 0, 2 / 2**9)
        assert comparison.Comparison("net", 0.9, difference, test).verdict == verdict


def test_without_correctness_nothing_is_claimed(make_results):
    results = make_results()
    for row in results["rows"]:
        row["correct"] = None
    results = Results.from_json(results)
    assert not any(c.significant for c in report.compare(results))
    verdicts = {c.rival: c.verdict for c in report.compare(results)}
    assert verdicts["equal-cost net"] == "ahead, not tested"


def test_the_gates_skill_is_its_place_between_the_bounds(make_results):
    # (352 − 347) / (360 − 347) = 38 %.
    results = Results.from_json(make_results())
    assert comparison.gate_skill(results) == (
        "The bounds are 96.39 % (random gate) and 100.00 % (oracle gate): the gate covers 38 % of "
        "that distance."
    )
    assert comparison.gate_skill(Results((Row("net", "single", 0.9),))) == ""


SLOW = "The onnx file of the expert 3 is slower than the parent's: 1.08× (1.03–1.12) its time"


def test_warnings_name_what_is_slow_beyond_the_noise(make_results):
    results = make_results()
    assert warnings.of(Results.from_json(results)) == [SLOW]
    results["rows"][5]["files"]["onnx"]["ratio_quartiles"] = [0.99, 1.12]
    assert warnings.of(Results.from_json(results)) == []


def _change(make_results, file=None, mixture=None, **changes):
    """Warnings that appear when entries of the results, the mixture or its file are replaced."""
    results = make_results()
    row = next(row for row in results["rows"] if row["role"] == "mixture")
    row.update(mixture or {})
    row["files"]["onnx"].update(file or {})
    found = warnings.of(Results.from_json(results | changes))
    return [text for text in found if text != SLOW]


def test_a_mixture_that_is_larger_than_the_parent_is_warned_of(make_results):
    found = _change(make_results, file={"bytes": 624_000})
    assert "The onnx file of the mixture is larger than the parent's: 2.00× its bytes" in found
    # 58100 / 624000: the control no longer has the mixture's size.
    assert "equal-size net is not equal: 0.09× the mixture's 624 kB" in found
    (found,) = _change(make_results, mixture={"bops": 27.7e6})
    # 830 k · 16.6 / 27.7 M = 0.50
    assert found == "equal-cost net is not equal: 0.50× the mixture's 27.7 M BOPs"


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
    (found,) = _change(make_results, mixture={"accuracy": 1.0, "correct": [1] * 360})
    assert found.startswith("The gain of 2.50 points over the best expert")


def test_a_file_that_differs_or_is_missing_is_warned_of(make_results):
    assert _change(make_results, file={"agreement": 0.99}) == [
        "The onnx file of the mixture agrees with the model on only 99.00 % of the test images"
    ]
    assert _change(make_results, file={"error": "no such operation"}) == [
        "There is no onnx file of the mixture: no such operation"
    ]


def test_effective_experts():
    # exp(−(¾ ln ¾ + ¼ ln ¼)) = exp(0.56234) = 1.7548; a class without images does not count.
    share = comparison.usage_share({"usage": [[0.75, 0.25], [0.75, 0.25], [math.nan, math.nan]]})
    assert comparison.effective_experts(share) == pytest.approx(1.7548, abs=1e-4)
    assert comparison.effective_experts([0.0, 1.0]) == 1.0

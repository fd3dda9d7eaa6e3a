"""What the mixture, or the single network, gains over each rival, and whether by chance."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from hybrid_jax.report.formatting import percent
from hybrid_jax.report.rows import Mean, Number, Results, Row, difference

SIGNIFICANCE = 0.05


class McNemar(NamedTuple):
    """Outcome of McNemar's test between models a and b on the same examples."""

    only_a: int  # examples that a alone, or in more of the runs, classifies correctly
    only_b: int
    p_value: float


class Comparison(NamedTuple):
    """The mixture, or the single network, against one rival; differences are its minus the rival's.

    Over several runs `accuracy` and `difference` are means, and `p_values` those of each run.
    """

    rival: str
    accuracy: Number
    difference: Number
    test: McNemar | None
    p_values: tuple[float, ...] = ()

    @property
    def significant(self) -> bool:
        """Whether the test was made and rejects equality at the 5 % level, on this side."""
        if self.test is None or self.test.p_value >= SIGNIFICANCE:
            return False
        # Pooled over runs, few large leads and many small ones can point to different sides.
        return (self.test.only_a - self.test.only_b) * self.difference > 0

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.difference == 0:
            return "equal"
        if self.significant:
            return "beaten" if self.difference > 0 else "behind"
        side = "ahead" if self.difference > 0 else "behind"
        return f"{side}, {'not tested' if self.test is None else 'within chance'}"

    @property
    def ahead(self) -> str:
        """In how many of several runs it is ahead; empty of one run."""
        if not isinstance(self.difference, Mean):
            return ""
        values = self.difference.values
        return f"{sum(value > 0 for value in values)} of {len(values)}"


def mcnemar(correct_a, correct_b) -> McNemar:
    """McNemar's exact two-sided test that two classifiers err equally often.

    Only examples on which the two differ carry evidence; under equality each of them is a fair
    coin toss, so the count is Binomial(only_a + only_b, 1/2). Q. McNemar, "Note on the sampling
    error of the difference between correlated proportions or percentages", Psychometrika 1947. Of
    scores instead of zeros and ones it is the sign test: on which example is which one better.

    Several runs on the same examples are pooled by example: each counts once, for the one that is
    right on it in more of the runs. Its outcomes in several runs are no independent tosses.

    Both are (n,) or (runs, n): whether a and b are right on each of the same examples, or how well
    they do, higher is better, in the same order. The p-value is 1.0 where the two never differ.

    Example:
        >>> mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1])
        McNemar(only_a=5, only_b=1, p_value=0.21875)
        >>> mcnemar([[1, 1], [1, 0]], [[0, 1], [0, 1]])  # two runs
        McNemar(only_a=1, only_b=1, p_value=1.0)
    """
    a, b = np.asarray(correct_a, float), np.asarray(correct_b, float)
    if a.ndim not in (1, 2) or a.shape != b.shape:
        raise ValueError(
            f"correct_b must be of the shape (n,) or (runs, n) of correct_a, "
            f"got shapes {a.shape} and {b.shape}"
        )
    lead = np.atleast_2d(a).sum(0) - np.atleast_2d(b).sum(0)
    only_a, only_b = int(np.sum(lead > 0)), int(np.sum(lead < 0))
    tosses = only_a + only_b
    p = float(stats.binomtest(only_a, tosses, 0.5).pvalue) if tosses else 1.0
    return McNemar(only_a, only_b, p)


def paired(a: Row, b: Row) -> McNemar | None:
    """The test between two rows; None unless both say which images are right."""
    return None if a.correct is None or b.correct is None else mcnemar(a.correct, b.correct)


def subject(results: Results) -> Row | None:
    """The row that is compared with the controls: the first mixture, or the first single one."""
    return results.first("mixture") or results.first("single")


def rivals(results: Results) -> list[Row]:
    """What the subject has to beat: the parents, every row that says so, and the best expert.

    The best expert is taken on the test images, which favours it, unless one is a rival itself.
    """
    own = subject(results)
    found = [
        row
        for row in results.rows
        if (row.rival or row.role in ("parent", "parent_int8")) and row.accuracy is not None
    ]
    single = results.of("expert") if own and own.role == "mixture" else []
    if single and not any(row.rival for row in single):
        found.append(max(single, key=lambda row: row.accuracy))
    return [row for row in found if row is not own]


def compare(results: Results) -> list[Comparison]:
    """The subject against every rival; tested where both rows carry `correct`."""
    own = subject(results)
    if own is None:
        return []
    return [
        Comparison(
            row.name,
            row.accuracy,
            difference(own.accuracy, row.accuracy),
            (test := paired(own, row)),
            _p_values(own, row) if test else (),
        )
        for row in rivals(results)
    ]


def gate_skill(results: Results) -> str:
    """How far the gate comes from the worse bound to the better, in words; empty without bounds."""
    own, bounds = results.first("mixture"), results.of("bound")
    low, high = (pick(bounds, key=lambda r: r.accuracy, default=None) for pick in (min, max))
    if own is None or low is high or high.accuracy == low.accuracy:
        return ""
    skill = (own.accuracy - low.accuracy) / (high.accuracy - low.accuracy)
    return (
        f"The bounds are {percent(low.accuracy)} ({low.name}) and {percent(high.accuracy)} "
        f"({high.name}): the gate covers {100 * skill:.0f} % of that distance."
    ).replace("-", "−")


def usage_share(gate) -> np.ndarray | None:
    """The share of images that each expert gets, (E,): as recorded, or the mean over classes."""
    if gate.get("share"):
        return np.asarray(gate["share"], float)
    usage = gate.get("usage")
    return np.nanmean(np.asarray(usage, float), axis=0) if usage else None


def effective_experts(share) -> float:
    """How many experts a gate uses: exp of the entropy of its usage.

    `share` is (E,). The result is from 1 (all images to one expert) to E (all experts alike).

    Example:
        >>> effective_experts([0.5, 0.5])
        2.0
    """
    share = np.asarray(share, float)
    share = share[share > 0] / np.sum(share)
    return round(float(np.exp(-np.sum(share * np.log(share)))), 12)


def _p_values(a, b):
    if np.ndim(a.correct) < 2:
        return ()
    return tuple(mcnemar(x, y).p_value for x, y in zip(a.correct, b.correct, strict=True))

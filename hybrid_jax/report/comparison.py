"""What the mixture gains over each control, what it does not beat, and what looks wrong."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from hybrid_jax import experts
from hybrid_jax.report import exports, formatting

SIGNIFICANCE = 0.05
# Four independent networks gain 0.6 to 1.0 points over one on CIFAR-10 (WRN-28-10, ResNet-32x4),
# so a routed mixture that gains more should be checked.
SUSPICIOUS_GAIN = 0.01
ORACLE_GAP = 0.01
ALIKE = 0.005
UNEQUAL = 0.05


class McNemar(NamedTuple):
    """Outcome of McNemar's test between models a and b on the same examples."""

    only_a: int  # examples that a alone, or in more of the runs, classifies correctly
    only_b: int
    p_value: float


class Comparison(NamedTuple):
    """The mixture against one rival; differences are mixture minus rival, as fractions."""

    rival: str
    accuracy: float
    difference: float
    test: McNemar | None

    @property
    def significant(self) -> bool:
        """Whether the test was made and rejects equality at the 5 % level, on this side."""
        if self.test is None or self.test.p_value >= SIGNIFICANCE:
            return False
        # Pooled over runs, few large leads and many small ones can point to different sides.
        return (self.test.only_a - self.test.only_b) * self.difference > 0

    @property
    def beaten(self) -> bool:
        """Whether the mixture is ahead by more than chance explains."""
        return self.significant and self.difference > 0

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.difference == 0:
            return "equal"
        side = "ahead" if self.difference > 0 else "behind"
        if self.test is None:
            return f"{side}, not tested"
        if not self.significant:
            return f"{side}, within chance"
        return "beaten" if self.difference > 0 else "behind"


def mcnemar(correct_a, correct_b) -> McNemar:
    """McNemar's exact two-sided test that two classifiers err equally often.

    Only examples on which the two differ carry evidence; under equality each of them is a fair
    coin toss, so the count is Binomial(only_a + only_b, 1/2). Q. McNemar, "Note on the sampling
    error of the difference between correlated proportions or percentages", Psychometrika 1947.

    Several runs on the same examples are pooled by example: each counts once, for the one that is
    right on it in more of the runs. Its outcomes in several runs are no independent tosses.

    Both are (n,) or (runs, n) booleans, or zeros and ones: whether a and b are right on each of the
    same examples, in the same order. The p-value is 1.0 where the two never differ.

    Example:
        >>> mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1])
        McNemar(only_a=5, only_b=1, p_value=0.21875)
        >>> mcnemar([[1, 1], [1, 0]], [[0, 1], [0, 1]])  # two runs
        McNemar(only_a=1, only_b=1, p_value=1.0)
    """
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    if a.ndim not in (1, 2) or a.shape != b.shape:
        raise ValueError(
            f"correct_b must be of the shape (n,) or (runs, n) of correct_a, "
            f"got shapes {a.shape} and {b.shape}"
        )
    lead = np.atleast_2d(a).sum(0, dtype=int) - np.atleast_2d(b).sum(0, dtype=int)
    only_a, only_b = int(np.sum(lead > 0)), int(np.sum(lead < 0))
    tosses = only_a + only_b
    p = float(stats.binomtest(only_a, tosses, 0.5).pvalue) if tosses else 1.0
    return McNemar(only_a, only_b, p)


def of_kind(results: dict, kind: str) -> list[dict]:
    """Rows of one kind that have an accuracy, in their order."""
    return [
        row
        for row in results.get("rows", ())
        if row.get("kind") == kind and formatting.finite(row.get("accuracy")) is not None
    ]


def headline(results: dict) -> dict | None:
    """The mixture that the report speaks of: the first row of that kind."""
    return next(iter(of_kind(results, "mixture")), None)


def is_oracle(row: dict) -> bool:
    """Whether the row knows the answer: it bounds what a gate can reach and rivals nobody."""
    return "oracle" in row["name"].lower()


def rivals(results: dict) -> dict[str, dict]:
    """The rows that the mixture has to beat, by name: dense, the best expert, every control.

    The best expert is taken on the test set, which favours it, unless a control row names it.
    """
    dense, single = of_kind(results, "dense")[:1], of_kind(results, "expert")
    controls = [row for row in of_kind(results, "control") if not is_oracle(row)]
    named = {row["name"]: row for row in dense}
    if single and not _named(controls, "best"):
        named["best single expert"] = max(single, key=lambda row: row["accuracy"])
    return named | {row["name"]: row for row in controls}


def compare(results: dict) -> list[Comparison]:
    """The headline mixture against every rival; tested where both rows carry `correct`."""
    mixture = headline(results)
    if mixture is None:
        return []
    return [
        Comparison(
            name, row["accuracy"], mixture["accuracy"] - row["accuracy"], _test(mixture, row)
        )
        for name, row in rivals(results).items()
    ]


def summary(results: dict) -> list[str]:
    """What came out, in plain sentences computed from the rows."""
    mixture = headline(results)
    if mixture is None:
        return ["This run has no mixture row: there is nothing to compare."]
    comparisons = compare(results)
    dense_name = next((row["name"] for row in of_kind(results, "dense")), None)
    against_dense = [c for c in comparisons if c.rival == dense_name]
    others = [c for c in comparisons if c.rival != dense_name]
    sentences = [_headline_sentence(results, mixture, against_dense)]
    sentences += outcomes(others, _gain)
    if gap := _gate_skill(results, mixture):
        sentences.append(gap)
    return sentences


def outcomes(comparisons: list[Comparison], describe) -> list[str]:
    """Which rivals the mixture beats and which it does not, in plain sentences.

    `describe` puts the rival of a comparison in words.
    """
    sentences = []
    for start, end, chosen in (
        ("It beats", "", [c for c in comparisons if c.beaten]),
        ("It does NOT beat", ": not tested", [c for c in comparisons if c.test is None]),
        (
            "It does NOT beat",
            ": within chance",
            [c for c in comparisons if c.test is not None and not c.significant],
        ),
        (
            "It does NOT beat",
            ": significantly behind",
            [c for c in comparisons if c.significant and not c.beaten],
        ),
    ):
        if chosen:
            sentences.append(f"{start} {formatting.listing(list(map(describe, chosen)))}{end}.")
    return sentences


def warnings(results: dict) -> list[str]:
    """Everything that a reader should not overlook; empty where nothing looks wrong."""
    return [
        *_dearer_than_dense(results),
        *_unequal_controls(results),
        *_gate_warnings(results),
        *_expert_warnings(results),
        *exports.warnings(results.get("exports") or ()),
    ]


def usage_share(gate: dict) -> np.ndarray | None:
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


def _named(rows, *words) -> dict | None:
    return next((r for r in rows if all(word in r["name"].lower() for word in words)), None)


def _test(a: dict, b: dict) -> McNemar | None:
    if a.get("correct") is None or b.get("correct") is None:
        return None
    return mcnemar(a["correct"], b["correct"])


def _gain(comparison: Comparison) -> str:
    evidence = f", {formatting.p_value(comparison.test.p_value)}" if comparison.test else ""
    return f"{comparison.rival} ({formatting.points(comparison.difference)} points{evidence})"


def _headline_sentence(results, mixture, against_dense) -> str:
    text = f"“{mixture['name']}” classifies {formatting.percent(mixture['accuracy'])}"
    text += " of the test images correctly"
    if against_dense:
        (comparison,) = against_dense
        difference = formatting.points(comparison.difference)
        text += f", {difference} points against the dense parent ({comparison.verdict})"
    dense = next(iter(of_kind(results, "dense")), {})
    costs = []
    for field, name in (("bytes", "bytes"), ("macs", "active MACs"), ("bops", "active BOPs")):
        if ratio := _ratio(mixture.get(field), dense.get(field)):
            side = "fewer" if ratio < 1 else "as many"
            costs.append(f"{formatting.times(max(ratio, 1 / ratio))} {side} {name}")
    return f"{text}, with {formatting.listing(costs)}." if costs else f"{text}."


def _gate_skill(results, mixture) -> str | None:
    controls = of_kind(results, "control")
    random, oracle = _named(controls, "random"), _named(controls, "oracle")
    if not random or not oracle or oracle["accuracy"] <= random["accuracy"]:
        return None
    skill = (mixture["accuracy"] - random["accuracy"]) / (oracle["accuracy"] - random["accuracy"])
    return (
        f"A gate that always chose a right expert would reach "
        f"{formatting.percent(oracle['accuracy'])}, one that chooses at random "
        f"{formatting.percent(random['accuracy'])}: the gate covers "
        f"{100 * skill:.0f} % of that distance.".replace("-", "−")
    )


def _ratio(value, reference) -> float | None:
    value, reference = formatting.finite(value), formatting.finite(reference)
    return value / reference if value is not None and reference else None


def _dearer_than_dense(results):
    dense = next(iter(of_kind(results, "dense")), {})
    for row in results.get("rows", ()):
        if row.get("kind") not in ("expert", "mixture"):
            continue
        latency = formatting.finite(row.get("latency_ratio"))
        if latency is not None and latency > 1:
            yield f"{row['name']} is slower than dense: {formatting.times(latency)} its latency"
        for field, word, name in (
            ("bytes", "larger", "bytes"),
            ("macs", "dearer", "MACs"),
            ("bops", "dearer", "BOPs"),
        ):
            ratio = _ratio(row.get(field), dense.get(field))
            if ratio is not None and ratio > 1:
                yield f"{row['name']} is {word} than dense: {formatting.times(ratio)} its {name}"


def _unequal_controls(results):
    mixture = headline(results) or {}
    controls = [row for row in of_kind(results, "control") if "equal" in row["name"].lower()]
    for word, field, name in (("byte", "bytes", "bytes"), ("bop", "bops", "BOPs")):
        control = _named(controls, word)
        ratio = _ratio(control and control.get(field), mixture.get(field))
        if ratio is not None and abs(ratio - 1) > UNEQUAL:
            yield f"{control['name']} is not equal: {formatting.times(ratio)} the mixture's {name}"


def _gate_warnings(results):
    share = usage_share(results.get("gate") or {})
    if share is not None:
        idle = [str(e) for e in np.flatnonzero(experts.unused(share))]
        if experts.collapsed(share):
            yield (
                f"The gate collapsed: expert {share.argmax()} gets "
                f"{formatting.percent(share.max())} of the images"
            )
        elif idle:
            yield (
                f"The gate hardly ever uses expert {formatting.listing(idle)} "
                "(less than a tenth of an even share)"
            )
    mixture, oracle = headline(results), _named(of_kind(results, "control"), "oracle")
    if mixture and oracle and oracle["accuracy"] - mixture["accuracy"] > ORACLE_GAP:
        gap = 100 * (oracle["accuracy"] - mixture["accuracy"])
        yield f"Oracle gap: the gate leaves {gap:.2f} points to a gate that is always right"


def _expert_warnings(results):
    disagreement = np.asarray(results.get("disagreement") or [], float)
    if disagreement.size > 1 and np.nanmax(disagreement) < ALIKE:
        yield (
            "The experts are alike: no two disagree on more than "
            f"{formatting.percent(np.nanmax(disagreement))} of the images, "
            "so the gate has nothing to choose from"
        )
    mixture, single = headline(results), of_kind(results, "expert")
    if mixture and single:
        best = max(single, key=lambda row: row["accuracy"])
        gain, test = mixture["accuracy"] - best["accuracy"], _test(mixture, best)
        if gain > SUSPICIOUS_GAIN and (test is None or test.p_value < SIGNIFICANCE):
            yield (
                f"The gain of {100 * gain:.2f} points over the best expert is more than ensembles "
                "of independent networks usually reach: check it"
            )

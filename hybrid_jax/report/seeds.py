"""Several runs that differ in nothing but their seed, as one table."""

import json
import pathlib

import numpy as np

from hybrid_jax import core
from hybrid_jax.report import comparison
from hybrid_jax.report.document import Document, Section, Table, publish
from hybrid_jax.report.formatting import MISSING, finite, listing, p_value, percent, points
from hybrid_jax.report.single import GLOSSARY, results_table, title, tradeoff_plots

FIELDS = (
    "accuracy", "delta", "parameters_total", "parameters_active", "bytes", "macs", "bops",
    "latency_ratio",
)  # fmt: skip


def read(workdir) -> dict:
    """The results of a run.

    Raises:
        FileNotFoundError: If the directory has no results.json.
        ValueError: If it is not a JSON object that holds rows.
    """
    path = pathlib.Path(workdir) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"workdir must hold the results.json of a finished run, got {str(workdir)!r} without"
        )
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(results, dict) or not results.get("rows"):
        raise ValueError(f"{path} must be an object that holds a non-empty list 'rows'")
    return results


def aggregate(results: list[dict]) -> dict:
    """Mean and standard deviation over runs that differ in nothing but their seed.

    Returns:
        A dictionary: `runs`, `seeds`, `rows` (one per model, in the first run's order, each
        number as a mean with its sample standard deviation (ddof = 1) next to it under
        `<field>_std`; both None where a run lacks it, the deviation also for a single run) and
        `comparisons` (the mixture minus each rival, paired by run: `difference`,
        `difference_std`, `ahead` and `beaten` as numbers of runs; McNemar's test of each run as
        `p_values`, and of all runs pooled by image as `only_mixture`, `only_rival` and `p_value`,
        see `mcnemar`; None where a run does not say which images are right; `verdict` in words).

    Example:
        >>> run = lambda seed, accuracy: {"config": {"seed": seed}, "rows": [
        ...     {"name": "dense", "kind": "dense", "accuracy": accuracy}]}
        >>> row = aggregate([run(0, 0.90), run(1, 0.92)])["rows"][0]
        >>> round(row["accuracy"], 4), round(row["accuracy_std"], 4)
        (0.91, 0.0141)
    """
    if not results:
        raise ValueError("results must hold at least one run, got none")
    _check_same_but_seed([run.get("config") or {} for run in results])
    names = [[row["name"] for row in run["rows"]] for run in results]
    for number, other in enumerate(names):
        if other != names[0]:
            odd = sorted(set(other) ^ set(names[0])) or other
            raise ValueError(f"runs must hold the same rows, got run {number} differing in {odd}")
    return {
        "runs": len(results),
        "seeds": [(run.get("config") or {}).get("seed") for run in results],
        "rows": [_mean_row(rows) for rows in zip(*(run["rows"] for run in results), strict=True)],
        "comparisons": _mean_comparisons(results),
    }


def write_aggregate(results: list[dict], directory) -> pathlib.Path:
    """Write the report over seeds: report.md, report.html, plots and aggregate.json.

    `results` are as for `aggregate`; the directory is made. Returns the path of report.html.
    """
    table = aggregate(results)
    path = publish(_describe(results, table), directory)
    core.write_json(path.with_name("aggregate.json"), table)
    return path


def _describe(results, table) -> Document:
    runs = table["runs"]
    text = (
        f"Mean ± sample standard deviation over {_runs(runs)}; a cost that is the same in every "
        f"run stands alone. {GLOSSARY}"
    )
    rows = table["rows"]
    sections = [Section("Results", text, results_table(rows), tradeoff_plots(rows))]
    if table["comparisons"]:
        sections.append(_comparison_section(table))
    if any(run.get("gate") for run in results):
        sections.append(_gate_section(results, table["seeds"]))
    return Document(
        title=f"{title(results[0])}, {_runs(runs)}",
        summary=_summary(table),
        warnings=_warnings(results, table),
        sections=sections,
    )


def _comparison_section(table) -> Section:
    runs = table["runs"]
    rows = [
        (
            c["rival"],
            points(c["difference"], c["difference_std"]),
            f"{c['ahead']} of {runs}",
            f"{c['beaten']} of {runs}" if None not in c["p_values"] else MISSING,
            ", ".join(map(_probability, c["p_values"])),
            MISSING if c["only_mixture"] is None else str(c["only_mixture"]),
            MISSING if c["only_rival"] is None else str(c["only_rival"]),
            p_value(c["p_value"]),
            c["verdict"],
        )
        for c in table["comparisons"]
    ]
    seeds = ", ".join(map(str, table["seeds"]))
    header = (
        "rival", "difference", "ahead in", "beaten in", f"p of seeds {seeds}", "more often mixture",
        "more often rival", "pooled", "verdict",
    )  # fmt: skip
    text = (
        "Mixture minus rival in percentage points, paired by seed; p is McNemar's exact two-sided "
        "test in each run, and beaten counts the runs in which the mixture is ahead with p < 0.05. "
        "Pooled over the runs each test image counts once, for the one that is right on it in more "
        "of them; the verdict is that of the pooled test. No p is corrected for the number of "
        "rivals."
    )
    return Section("The mixture against each control", text, Table(header, rows))


def _gate_section(results, seeds) -> Section:
    rows = []
    for seed, run in zip(seeds, results, strict=True):
        share = comparison.usage_share(run.get("gate") or {})
        matrix = np.asarray(run.get("disagreement") or [[0.0]], float)
        pairs = matrix[~np.eye(len(matrix), dtype=bool)]
        rows.append(
            (
                str(seed),
                MISSING if share is None else f"{comparison.effective_experts(share):.2f}",
                MISSING if share is None else percent(share.max()),
                percent(pairs.min()) if pairs.size else MISSING,
                percent(pairs.max()) if pairs.size else MISSING,
            )
        )
    header = ("seed", "experts used", "largest share", "least disagreement", "most disagreement")
    text = (
        "Experts used is exp of the usage entropy. Disagreement is the share of test images that "
        "two experts classify differently: of the two that differ least, and most."
    )
    return Section("The gate and its experts", text, Table(header, rows))


def _summary(table) -> list[str]:
    runs, mixture = table["runs"], comparison.headline(table)
    if mixture is None:
        return ["These runs have no mixture row: there is nothing to compare."]
    accuracy = percent(mixture["accuracy"], mixture["accuracy_std"])
    sentences = [f"Over {_runs(runs)} “{mixture['name']}” reaches {accuracy}."]
    by_rival = {c["rival"]: c for c in table["comparisons"]}

    def describe(pooled):
        c = by_rival[pooled.rival]
        evidence = f", pooled {p_value(c['p_value'])}" if pooled.test else ""
        difference = points(c["difference"], c["difference_std"])
        return f"{c['rival']} ({difference} points, ahead in {c['ahead']} of {runs}{evidence})"

    return sentences + comparison.outcomes(list(map(_pooled, by_rival.values())), describe)


def _pooled(c) -> comparison.Comparison:
    """The entry of `comparisons` as the comparison of one run, with the pooled test."""
    test = None
    if c["p_value"] is not None:
        test = comparison.McNemar(c["only_mixture"], c["only_rival"], c["p_value"])
    return comparison.Comparison(c["rival"], c["accuracy"], c["difference"], test)


def _probability(value) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _warnings(results, table) -> list[str]:
    """Warnings about the means, then what only a single run can show, its seed in front."""
    return comparison.warnings(table) + [
        f"Seed {seed}: {text}"
        for seed, run in zip(table["seeds"], results, strict=True)
        for text in comparison.warnings({**run, "rows": []})
    ]


def _mean_row(rows) -> dict:
    mean = {"name": rows[0]["name"], "kind": rows[0]["kind"]}
    for field in FIELDS:
        mean[field], mean[f"{field}_std"] = _mean_std([finite(row.get(field)) for row in rows])
    return mean


def _mean_comparisons(results) -> list[dict]:
    runs = [comparison.compare(run) for run in results]
    common = [c.rival for c in runs[0] if all(c.rival in {o.rival for o in run} for run in runs)]
    merged = []
    for rival in common:
        paired = [next(c for c in run if c.rival == rival) for run in runs]
        difference, std = _mean_std([c.difference for c in paired])
        pooled = _pooled_test(results, rival)
        entry = {
            "rival": rival,
            "accuracy": _mean_std([c.accuracy for c in paired])[0],
            "difference": difference,
            "difference_std": std,
            "ahead": sum(c.difference > 0 for c in paired),
            "beaten": sum(c.beaten for c in paired),
            "p_values": [None if c.test is None else c.test.p_value for c in paired],
            "only_mixture": pooled and pooled.only_a,
            "only_rival": pooled and pooled.only_b,
            "p_value": pooled and pooled.p_value,
        }
        merged.append(entry | {"verdict": _pooled(entry).verdict})
    return merged


def _pooled_test(results, rival) -> comparison.McNemar | None:
    """McNemar's test over all runs; None unless all say which of equally many images are right."""
    pairs = [(comparison.headline(run), comparison.rivals(run)[rival]) for run in results]
    correct = [row.get("correct") for pair in pairs for row in pair]
    if any(c is None for c in correct) or len({len(c) for c in correct}) > 1:
        return None
    return comparison.mcnemar(correct[::2], correct[1::2])


def _mean_std(values) -> tuple[float | None, float | None]:
    if None in values:
        return None, None
    if len(set(values)) == 1:  # exact where rounding of the mean would leave 1e-17
        return values[0], 0.0 if len(values) > 1 else None
    return float(np.mean(values)), float(np.std(values, ddof=1))


def _check_same_but_seed(configs) -> None:
    flat = [_flatten(config) for config in configs]
    for number, other in enumerate(flat):
        keys = {
            key
            for key in flat[0].keys() | other.keys()
            if key.rpartition(".")[2] != "seed"
            and flat[0].get(key, MISSING) != other.get(key, MISSING)
        }
        if keys:
            first = sorted(keys)[0]
            raise ValueError(
                f"configs must differ in nothing but the seed, got run {number} differing from "
                f"run 0 in {listing(sorted(keys))} "
                f"({first}: {flat[0].get(first)!r} and {other.get(first)!r})"
            )
        if other in flat[:number] and other:
            raise ValueError(
                f"runs must have different seeds, got run {number} with the seed of "
                f"run {flat.index(other)}"
            )


def _flatten(config, prefix="") -> dict:
    if not isinstance(config, dict):
        return {prefix: config}
    parts = [_flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in config.items()]
    return {key: value for part in parts for key, value in part.items()}


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"

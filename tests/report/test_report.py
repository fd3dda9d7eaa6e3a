import json
import math
import re

import pytest

from hybrid_jax import report
from launch import report as command

PLOTS = {
    "accuracy_bytes.png",
    "accuracy_macs.png",
    "accuracy_bops.png",
    "gate_usage.png",
    "gate_entropy.png",
    "layers.png",
    "training_loss.png",
    "training_accuracy.png",
}


def test_a_run_gives_tables_plots_and_warnings(make_results, tmp_path):
    assert report.write(make_results(), tmp_path) == tmp_path / "report.html"
    assert {p.name for p in tmp_path.iterdir()} == PLOTS | {"report.md", "report.html"}
    for name in PLOTS:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    text = (tmp_path / "report.md").read_text()
    assert "# Compression report: digits" in text
    # 352 / 360 = 97.78 %, −2 / 360 = −0.56 points.
    assert (
        "| **mixture top-1** | mixture | 97.78 % | −0.56 | 84.9 k | 22.0 k | 57.9 kB | 821 k "
        "| 13.9 M | 0.70× |"
    ) in text
    assert "| oracle gate | control | 100.00 % | +1.67 |" in text
    assert "- **Warning: mixture top-2 is slower than dense: 1.31× its latency.**" in text
    # 57.9 / 312 = 0.186; of batch 32 there is nothing.
    assert (
        "| packed | mixture | 100.00 % | 3.1e-06 | 4, 8 | 57.9 kB | 0.19× | 0.1 ms | 0.2 ms "
        "| 0.70× | – | – |  |"
    ) in text
    assert (
        "float32 images, (pixel / 255 − mean) / deviation, with mean 0.25 and deviation 0.5."
        in text
    )
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == PLOTS
    page = (tmp_path / "report.html").read_text()
    assert "<td>97.78 %</td><td>−0.56</td>" in page
    assert (
        "<strong>Warning: mixture top-2 is slower than dense: 1.31× its latency.</strong>" in page
    )


def test_markdown_tables_are_rectangular(make_results, tmp_path):
    report.write(make_results(), tmp_path)
    blocks = re.findall(r"(?:^\|.*\n)+", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert len(blocks) == 5  # results, controls, disagreement, exports, this run
    for block in blocks:
        header, rule, *rows = block.splitlines()
        assert rows
        assert set(rule) == set("|:-")
        assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}


def test_html_is_one_file(make_results, tmp_path):
    report.write(make_results(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["'](.*?)["']""", page)
    assert len(sources) == len(PLOTS)
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)


def test_the_same_results_give_the_same_bytes(make_results, tmp_path):
    report.write(make_results(), tmp_path / "a")
    report.write(make_results(), tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_missing_and_non_finite_numbers_are_dashes(tmp_path):
    nothing = {"accuracy": math.nan, "delta": None, "bytes": math.inf, "latency_ratio": None}
    rows = [
        {"name": "dense", "kind": "dense", "accuracy": 0.9, "bytes": 1000},
        {"name": "mix", "kind": "mixture", **nothing},
    ]
    results = {
        "rows": rows, "gate": None, "layers": None, "exports": None, "history": None,
        "disagreement": None, "environment": None, "dataset": None, "seconds": None,
    }  # fmt: skip
    report.write(json.loads(json.dumps(results)), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "report.md", "report.html", "accuracy_bytes.png",
    }  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert "| **mix** | mixture | – | – | – | – | – | – | – | – |" in text
    assert not re.search(r"\b(nan|inf|None)\b", text + (tmp_path / "report.html").read_text())


def test_names_are_escaped(tmp_path):
    rows = [{"name": "<b>a|b", "kind": "dense", "accuracy": 0.9}]
    report.write({"rows": rows}, tmp_path)
    assert "| <b>a\\|b |" in (tmp_path / "report.md").read_text()
    assert '<td class="words">&lt;b&gt;a|b</td>' in (tmp_path / "report.html").read_text()


def test_notes_get_a_column_where_there_is_one(make_results, tmp_path):
    results = make_results()
    results["rows"][0]["note"] = "trained here"
    report.write(results, tmp_path)
    assert "| 3.28 G | 1.00× | trained here |" in (tmp_path / "report.md").read_text()


def test_a_report_replaces_the_old_one_and_leaves_other_files(make_results, tmp_path):
    (tmp_path / "report.md").write_text("obsolete")
    (tmp_path / "notes.txt").write_text("mine")
    report.write(make_results(), tmp_path)
    assert "obsolete" not in (tmp_path / "report.md").read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_results_without_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"non-empty list 'rows', got keys \['config'\]"):
        report.write({"config": {}}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _runs(make_results, *accuracies):
    """Runs whose first mixture has these accuracies; the equal-bytes net has 0.92 in each."""
    runs = []
    for seed, accuracy in enumerate(accuracies):
        run = make_results(seed)
        for row in run["rows"]:
            row["correct"] = None
            if row["name"] == "mixture top-1":
                row["accuracy"] = accuracy
            if row["name"] == "equal-bytes net":
                row["accuracy"] = 0.92
        runs.append(run)
    return runs


def test_aggregate_equals_the_hand_computed_values(make_results):
    table = report.aggregate(_runs(make_results, 0.90, 0.92, 0.97))
    assert (table["runs"], table["seeds"]) == (3, [0, 1, 2])
    row = next(row for row in table["rows"] if row["name"] == "mixture top-1")
    # Mean 0.93; deviations −0.03, −0.01, 0.04: √((9 + 1 + 16)e-4 / 2) = 0.0360555.
    assert row["accuracy"] == pytest.approx(0.93)
    assert row["accuracy_std"] == pytest.approx(0.0360555, abs=1e-7)
    assert (row["bytes"], row["bytes_std"]) == (57_900, 0.0)
    against = next(c for c in table["comparisons"] if c["rival"] == "equal-bytes net")
    # Differences −0.02, 0, 0.05: mean 0.01, the same deviations; ahead in one run.
    assert against["difference"] == pytest.approx(0.01)
    assert against["difference_std"] == pytest.approx(0.0360555, abs=1e-7)
    assert (against["ahead"], against["beaten"], against["p_values"]) == (1, 0, [None] * 3)
    assert (against["only_mixture"], against["p_value"]) == (None, None)
    assert against["verdict"] == "ahead, not tested"


def test_aggregate_without_a_number_in_one_run_has_none(make_results):
    runs = _runs(make_results, 0.9, 0.92)
    runs[1]["rows"][0]["latency_ratio"] = math.nan
    row = report.aggregate(runs)["rows"][0]
    assert (row["latency_ratio"], row["latency_ratio_std"]) == (None, None)


def test_one_run_has_no_deviation(make_results):
    row = report.aggregate(_runs(make_results, 0.9))["rows"][-2]
    assert (row["accuracy"], row["accuracy_std"]) == (0.9, None)


def test_the_report_over_seeds_shows_mean_and_deviation(make_results, tmp_path):
    report.write_aggregate(_runs(make_results, 0.90, 0.92, 0.97), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "# Compression report: digits, 3 runs" in text
    assert "| **mixture top-1** | mixture | 93.00 ± 3.61 % |" in text
    assert (
        "| equal-bytes net | +1.00 ± 3.61 | 1 of 3 | – | –, –, – | – | – | – | ahead, not tested |"
    ) in text
    assert "It does NOT beat dense (" in text
    assert "equal-bytes net (+1.00 ± 3.61 points, ahead in 1 of 3)" in text
    assert "93.00 ± 3.61 %" in (tmp_path / "report.html").read_text()
    saved = json.loads((tmp_path / "aggregate.json").read_text())
    assert saved == report.aggregate(_runs(make_results, 0.90, 0.92, 0.97))


def _tested(make_results, *wins):
    """A run for each number of images, of 10, that only the mixture gets right."""
    runs = [make_results(seed) for seed in range(len(wins))]
    for run, count in zip(runs, wins, strict=True):
        for row in run["rows"]:
            row["correct"] = [1] * 10
            if row["name"] == "equal-bytes net":
                row["correct"] = [0] * count + [1] * (10 - count)
            row["accuracy"] = sum(row["correct"]) / 10
    return runs


def test_mcnemar_by_seed_and_pooled(make_results, tmp_path):
    # 5, 6 and 8 tosses that all fall alike: 2 / 32, 2 / 64 and 2 / 256. Pooled, the mixture is
    # ahead on 8 images: in three runs on 5 of them, in two on the sixth, in one on the others.
    runs = _tested(make_results, 5, 6, 8)
    against = {c["rival"]: c for c in report.aggregate(runs)["comparisons"]}
    net = against["equal-bytes net"]
    assert net["p_values"] == pytest.approx([2 / 32, 2 / 64, 2 / 256])
    assert (net["ahead"], net["beaten"]) == (3, 2)
    assert (net["only_mixture"], net["only_rival"]) == (8, 0)
    assert net["p_value"] == pytest.approx(2 / 256)
    assert (net["verdict"], against["dense"]["verdict"]) == ("beaten", "equal")
    report.write_aggregate(runs, tmp_path)
    text = (tmp_path / "report.md").read_text()
    # Differences 0.5, 0.6 and 0.8: mean 0.6333, deviation √(0.01778 + 0.00111 + 0.02778) / 2.
    assert (
        "It beats equal-bytes net (+63.33 ± 15.28 points, ahead in 3 of 3, pooled p = 0.008)."
    ) in text
    assert (
        "| equal-bytes net | +63.33 ± 15.28 | 3 of 3 | 2 of 3 | 0.062, 0.031, 0.008 | 8 | 0 "
        "| p = 0.008 | beaten |"
    ) in text
    assert "random gate (0.00 ± 0.00 points, ahead in 0 of 3, pooled p = 1.000)" in text
    assert "| seed | experts used | largest share | least disagreement | most" in text


def test_runs_on_other_test_images_are_not_pooled(make_results):
    runs = _tested(make_results, 5, 6)
    for row in runs[1]["rows"]:
        row["correct"] = row["correct"][:9]
    net = next(c for c in report.aggregate(runs)["comparisons"] if c["rival"] == "equal-bytes net")
    assert net["p_values"] == pytest.approx([2 / 32, 2 / 64])
    assert (net["p_value"], net["verdict"]) == (None, "ahead, not tested")


def test_a_gate_that_collapsed_in_one_run_is_named_with_its_seed(make_results, tmp_path):
    runs = _runs(make_results, 0.9, 0.92)
    runs[1]["gate"]["usage"] = [[1.0, 0.0, 0.0, 0.0]] * 10
    report.write_aggregate(runs, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "- **Warning: Seed 1: The gate collapsed: expert 0 gets 100.00 % of the images.**" in text
    )


def test_runs_that_do_not_belong_together_are_refused(make_results):
    runs = _runs(make_results, 0.9, 0.92)
    with pytest.raises(ValueError, match="at least one run"):
        report.aggregate([])
    with pytest.raises(ValueError, match="run 1 with the seed of run 0"):
        report.aggregate([runs[0], runs[0]])
    runs[1]["config"]["experts"]["count"] = 3
    with pytest.raises(ValueError, match=r"run 1 .* in experts.count \(experts.count: 4 and 3\)"):
        report.aggregate(runs)
    runs[1]["config"]["experts"]["count"] = 4
    del runs[1]["rows"][4]
    with pytest.raises(ValueError, match=r"run 1 differing in \['expert 3'\]"):
        report.aggregate(runs)


def _workdirs(runs, tmp_path):
    paths = [tmp_path / f"run{i}" for i in range(len(runs))]
    for path, run in zip(paths, runs, strict=True):
        path.mkdir()
        (path / "results.json").write_text(json.dumps(run))
    return paths


def test_command_reports_one_run_and_several(make_results, tmp_path, capsys):
    a, b = _workdirs(_runs(make_results, 0.9, 0.92), tmp_path)
    assert command.cli(["report", f"--workdirs={a}", f"--output={tmp_path / 'one'}"]) == 0
    assert command.cli(["report", f"--workdirs={a},{b}", f"--output={tmp_path / 'both'}"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"report: {tmp_path / 'both/report.html'}"
    assert "# Compression report: digits\n" in (tmp_path / "one/report.md").read_text()
    # Mean of 0.90 and 0.92; √(2 · 0.01²) = 0.01414.
    assert "91.00 ± 1.41 %" in (tmp_path / "both/report.md").read_text()


def test_command_ends_bad_input_with_one_line(make_results, tmp_path, capsys):
    a, b = _workdirs(_runs(make_results, 0.9, 0.92), tmp_path)
    (b / "results.json").write_text("{")
    out = f"--output={tmp_path / 'out'}"
    for arguments, message in (
        ([f"--workdirs={tmp_path / 'none'}", out], "results.json of a finished run, got"),
        ([f"--workdirs={a},{b}", out], "must be JSON"),
        ([f"--workdirs={a},{a}", out], "run 1 with the seed of run 0"),
        ([out], "--workdirs must be given"),
        ([f"--workdirs={a}"], "--output must be given"),
        ([f"--workdirs={a}", out, str(b)], "arguments must be flags"),
        ([f"--workdir={a}", out], "workdir"),
    ):
        assert command.cli(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

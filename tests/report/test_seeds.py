"""Several runs that differ in their seed, and the command that reports them."""

import pytest

from hybrid_jax import core, report
from hybrid_jax.report import Results, warnings
from launch import report as command


def _runs(make_results, *accuracies):
    """Runs whose mixture has these accuracies; the equal-size net has 0.92 in each."""
    runs = []
    for seed, accuracy in enumerate(accuracies):
        run = make_results(seed) | {"layers": [], "history": {}}
        for row in run["rows"]:
            row["correct"] = None
            if row["role"] == "mixture":
                row["accuracy"] = row["files"]["onnx"]["accuracy"] = accuracy
            if row["name"] == "equal-size net":
                row["accuracy"] = 0.92
        runs.append(run)
    return runs


def _typed(runs):
    return [Results.from_json(run) for run in runs]


def _against(results, rival):
    return next(c for c in report.compare(results) if c.rival == rival)


def test_an_average_equals_the_hand_computed_values(make_results):
    found = report.average(_typed(_runs(make_results, 0.90, 0.92, 0.97)))
    row = found.first("mixture")
    # Mean 0.93; deviations −0.03, −0.01, 0.04: √((9 + 1 + 16)e-4 / 2) = 0.0360555.
    for own in (row, row.files["onnx"]):
        assert own.accuracy == pytest.approx(0.93)
        assert own.accuracy.std == pytest.approx(0.0360555, abs=1e-7)
    assert (row.files["onnx"].bytes, row.files["onnx"].bytes.std) == (57_900, 0.0)
    assert row.files["onnx"].ratio_quartiles == (0.33, 0.38)
    against = _against(found, "equal-size net")
    # Differences −0.02, 0, 0.05: mean 0.01, the same deviations; ahead in one run.
    assert against.difference == pytest.approx(0.01)
    assert against.difference.std == pytest.approx(0.0360555, abs=1e-7)
    assert (against.ahead, against.test, against.verdict) == ("1 of 3", None, "ahead, not tested")
    # 7 images of each class and run are mistaken in the same way.
    assert found.confusion["expert 2"][0][:4] == [105, 0, 0, 3]


def test_an_average_of_a_number_that_one_run_lacks_is_none(make_results):
    runs = _runs(make_results, 0.9, 0.92)
    runs[1]["rows"][0]["macs"] = None
    del runs[1]["rows"][0]["files"]["onnx"]
    row = report.average(_typed(runs)).rows[0]
    assert (row.macs, row.files) == (None, {})


def test_one_run_has_no_deviation(make_results):
    row = report.average(_typed(_runs(make_results, 0.9))).first("mixture")
    assert (row.accuracy, row.accuracy.std) == (0.9, None)


def test_the_report_over_seeds_shows_mean_and_deviation(make_results, tmp_path):
    report.write_average(_typed(_runs(make_results, 0.90, 0.92, 0.97)), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "# Compression report: digits, 3 runs" in text
    assert "Mean ± sample standard deviation over 3 runs" in text
    assert "| **mixture** | mixture | 93.00 ± 3.61 % |" in text
    assert "| mixture | onnx | 93.00 ± 3.61 % |" in text
    assert "| equal-size net | 92.00 ± 0.00 % | +1.00 ± 3.61 | 1 of 3 | ahead, not tested |" in text
    assert "93.00 ± 3.61 %" in (tmp_path / "report.html").read_text()


def _tested(make_results, *wins):
    """A run for each number of images, of 10, that only the mixture gets right."""
    runs = [make_results(seed) for seed in range(len(wins))]
    for run, count in zip(runs, wins, strict=True):
        for row in run["rows"]:
            row["correct"] = [1] * 10
            if row["name"] == "equal-size net":
                row["correct"] = [0] * count + [1] * (10 - count)
            row["accuracy"] = sum(row["correct"]) / 10
    return runs


def test_mcnemar_by_seed_and_pooled(make_results, tmp_path):
    # 5, 6 and 8 tosses that all fall alike: 2 / 32, 2 / 64 and 2 / 256. Pooled, the mixture is
    # ahead on 8 images: in three runs on 5 of them, in two on the sixth, in one on the others.
    runs = _typed(_tested(make_results, 5, 6, 8))
    found = report.average(runs)
    net = _against(found, "equal-size net")
    assert net.p_values == pytest.approx([2 / 32, 2 / 64, 2 / 256])
    assert net.ahead == "3 of 3"
    assert net.test == (8, 0, pytest.approx(2 / 256))
    assert (net.verdict, _against(found, "dense").verdict) == ("beaten", "equal")
    report.write_average(runs, tmp_path)
    text = (tmp_path / "report.md").read_text()
    # Differences 0.5, 0.6 and 0.8: mean 0.6333, deviation √(0.01778 + 0.00111 + 0.02778) / 2.
    assert (
        "| equal-size net | 36.67 ± 15.28 % | +63.33 ± 15.28 | 3 of 3 | 0.062, 0.031, 0.008 | 8 "
        "| 0 | p = 0.008 | beaten |"
    ) in text
    assert "| seed | experts used | largest share | least disagreement | most" in text


def test_runs_on_other_test_images_are_not_pooled(make_results):
    runs = _tested(make_results, 5, 6)
    for row in runs[1]["rows"]:
        row["correct"] = row["correct"][:9]
    net = _against(report.average(_typed(runs)), "equal-size net")
    assert (net.test, net.verdict) == (None, "ahead, not tested")


def test_a_gate_that_collapsed_in_one_run_is_named_with_its_seed(make_results, tmp_path):
    runs = _runs(make_results, 0.9, 0.92)
    runs[1]["gate"]["usage"] = [[1.0, 0.0, 0.0, 0.0]] * 10
    report.write_average(_typed(runs), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "- **Warning: Seed 1: The gate collapsed: expert 0 gets 100.00 % of the images.**" in text
    )
    assert not any("Seed" in warning for warning in warnings.of(_typed(runs)[0]))


def test_runs_that_do_not_belong_together_are_refused(make_results):
    runs = _runs(make_results, 0.9, 0.92)
    with pytest.raises(ValueError, match="runs must hold at least one, got none"):
        report.average([])
    with pytest.raises(ValueError, match="run 1 with the seed of run 0"):
        report.average(_typed([runs[0], runs[0]]))
    runs[1]["config"]["experts"]["count"] = 3
    with pytest.raises(ValueError, match=r"run 1 .* in experts.count \(experts.count: 4 and 3\)"):
        report.average(_typed(runs))
    runs[1]["config"]["experts"]["count"] = 4
    del runs[1]["rows"][4]
    with pytest.raises(ValueError, match=r"run 1 differing in \['expert 2'\]"):
        report.average(_typed(runs))


def _workdirs(runs, tmp_path):
    paths = [tmp_path / f"run{i}" for i in range(len(runs))]
    for path, run in zip(paths, runs, strict=True):
        path.mkdir()
        core.write_sealed(path / "results.json", run)
    return paths


def test_command_reports_one_run_and_several(make_results, tmp_path, capsys):
    a, b = _workdirs(_runs(make_results, 0.9, 0.92), tmp_path)
    assert command.cli(["report", f"--workdirs={a}", f"--output={tmp_path / 'one'}"]) == 0
    assert command.cli(["report", f"--workdirs={a},{b}", f"--output={tmp_path / 'both'}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"report: {tmp_path / 'both/report.html'}"
    assert sum(line.startswith("Ship expert 2, accuracy") for line in printed) == 2
    assert "# Compression report: digits\n" in (tmp_path / "one/report.md").read_text()
    # Mean of 0.90 and 0.92; √(2 · 0.01²) = 0.01414.
    assert "91.00 ± 1.41 %" in (tmp_path / "both/report.md").read_text()


def test_command_ends_bad_input_with_one_line(make_results, tmp_path, capsys):
    a, b = _workdirs(_runs(make_results, 0.9, 0.92), tmp_path)
    (b / "results.json").write_text("{")
    out = f"--output={tmp_path / 'out'}"
    for arguments, message in (
        ([f"--workdirs={tmp_path / 'none'}", out], "results.json of a finished run, got"),
        ([f"--workdirs={a},{b}", out], "results.json must be as it was written"),
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

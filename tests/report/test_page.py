import io
import json
import math
import re

import pytest
import rich.console

from hybrid_jax import report
from hybrid_jax.report import Results

PLOTS = {
    "accuracy_bytes.png",
    "accuracy_time.png",
    "accuracy_macs.png",
    "accuracy_bops.png",
    "confusion.png",
    "gate_usage.png",
    "gate_entropy.png",
    "layers.png",
    "training_loss.png",
    "training_accuracy.png",
}


@pytest.fixture(scope="module")
def written(make_results, tmp_path_factory):
    """The directory of the mixture's report."""
    path = tmp_path_factory.mktemp("report")
    assert report.write(make_results(), path) == path / "report.html"
    return path


def sections(page):
    return re.findall(r"^## (.*)$", page, re.MULTILINE)


def test_a_run_says_what_to_ship_then_what_could_be_then_the_rest(written):
    assert {p.name for p in written.iterdir()} == PLOTS | {"report.md", "report.html"}
    for name in PLOTS:
        content = (written / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    text = (written / "report.md").read_text()
    title, facts, ship, why, *_ = [line for line in text.splitlines() if line]
    assert title == "# Compression report: digits"
    assert facts.startswith("360 test images · machine x86_64, 2 cores · date 2026-11-30 · ")
    assert ship.startswith("Ship expert 2, accuracy 97.50 % (−0.83 points against the parent,")
    assert why == (
        "It is the smallest of 3 files that lose at most 1 point. “mixture” buys nothing: "
        "“expert 2” is as accurate within chance and smaller."
    )
    assert sections(text) == [
        "What can be shipped",
        "Confusion by class",
        "Every model, control and bound",
        "“mixture” against each rival",
        "Files",
        "The gate and its experts",
        "Layers",
        "Training",
        "Words",
        "This run",
    ]
    first = text.split("## ")[1]
    for name in ("equal-size net", "oracle", "BOPs", "nats"):
        assert name not in first
    assert (
        "| **expert 2** | onnx | 97.50 % | −0.83 | 14.3 kB | 4.10 kB | 815 k | 0.128 ms "
        "| 0.31× (0.30–0.34) |"
    ) in first
    # 352 / 360 = 97.78 %, −2 / 360 = −0.56 points.
    assert "| **mixture** | mixture | 97.78 % | −0.56 | 84.9 k | 22.0 k | 821 k | 13.9 M |" in text
    assert "| oracle gate | bound | 100.00 % | +1.67 |" in text
    assert "with mean 0.25 and deviation 0.5." in text
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == PLOTS
    page = (written / "report.html").read_text()
    assert '<tr class="strong"><td class="words">expert 2</td>' in page
    assert "<li><strong>Warning: The onnx file of the expert 3 is slower" in page


def test_the_terminal_shows_the_same_lines_and_table(make_results, written):
    console = rich.console.Console(record=True, file=io.StringIO(), width=120)
    report.show(make_results(), console)
    printed = console.export_text()
    text = (written / "report.md").read_text()
    for sentence in report.headline(Results.from_json(make_results())):
        assert sentence in printed
        assert sentence in text
    assert re.search(r"expert 2 +onnx +97.50 % +−0.83 +14.3 kB .* 0.31× \(0.30–0.34\)", printed)
    assert "equal-size net" not in printed


def test_a_run_of_one_network_and_three_targets(ptq, tmp_path):
    report.write(json.loads(json.dumps(ptq)), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert sections(text) == [
        "What can be shipped",
        "Confusion by class",
        "Every model, control and bound",
        "“W4A8 GPTQ” against each rival",
        "Files",
        "Words",
        "This run",
    ]
    # Of 100 classes the worst pairs are named: 9 images of class 3 are taken for class 5.
    pairs = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| [\d.]+ % \|$", text, re.MULTILINE)
    assert pairs[0] == ("3", "5", "9")
    assert len(pairs) == 12
    assert "| deploy/W4A8_GPTQ.c | W4A8 GPTQ | 139 kB |" in text
    assert "4 and 8" in text


def test_a_regression_has_its_own_metric(regression, tmp_path):
    report.write(json.loads(json.dumps(regression)), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| model | target | R² | Δ | size |" in text
    assert "| **net int8** | onnx | 0.8702 | −0.0029 | 25.0 kB |" in text
    assert "points" not in text.split("## Words")[0]


def test_markdown_tables_are_rectangular(written):
    blocks = re.findall(r"(?:^\|.*\n)+", (written / "report.md").read_text(), re.MULTILINE)
    assert len(blocks) == 7  # to ship, models, controls, files, disagreement, words, this run
    for block in blocks:
        header, rule, *rows = block.splitlines()
        assert rows
        assert set(rule) == set("|:-")
        assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}


def test_html_is_one_file(written):
    page = (written / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["'](.*?)["']""", page)
    assert len(sources) == len(PLOTS)
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)


def test_the_same_results_give_the_same_bytes(regression, tmp_path):
    report.write(regression, tmp_path / "a")
    report.write(regression, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_missing_and_non_finite_numbers_are_dashes(tmp_path):
    rows = [
        {"name": "net", "role": "parent", "accuracy": 0.9, "macs": 1000},
        {"name": "mix", "role": "mixture", "accuracy": math.nan, "macs": math.inf},
    ]
    absent = dict.fromkeys(("gate", "layers", "history", "disagreement", "environment", "dataset"))
    report.write(json.loads(json.dumps({"rows": rows} | absent)), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.md", "report.html"}
    text = (tmp_path / "report.md").read_text()
    assert "| mix | mixture | – | – | – |" in text
    assert "Nothing to ship: no file of this run was run" in text
    assert not re.search(r"\b(nan|inf|None)\b", text + (tmp_path / "report.html").read_text())


def test_files_that_were_not_run_are_listed_with_their_sizes(tmp_path):
    files = {"packed": {"artifact": "deploy/net.safetensors", "bytes": 1000}}
    row = {"name": "net", "role": "parent", "accuracy": 0.9, "files": files}
    report.write({"rows": [row]}, tmp_path)
    assert "| net | packed | 1.00 kB |" in (tmp_path / "report.md").read_text()


def test_names_are_escaped(tmp_path):
    rows = [{"name": "<b>a|b", "role": "parent", "accuracy": 0.9}]
    report.write({"rows": rows}, tmp_path)
    assert "| <b>a\\|b |" in (tmp_path / "report.md").read_text()
    assert '<td class="words">&lt;b&gt;a|b</td>' in (tmp_path / "report.html").read_text()


def test_a_report_replaces_the_old_one_and_leaves_other_files(regression, tmp_path):
    (tmp_path / "report.md").write_text("obsolete")
    (tmp_path / "notes.txt").write_text("mine")
    report.write(regression, tmp_path)
    assert "obsolete" not in (tmp_path / "report.md").read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_results_of_another_version_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"results must have the keys rows, .* got no 'rows'"):
        report.write({"config": {}}, tmp_path / "new")
    assert not (tmp_path / "new").exists()

"""A study: runs of a kind of digits, their records, and the tables that are made of these alone."""

import json

import numpy as np
import pytest

from hybrid_jax import recipes
from launch import study

STUDY = """
from hybrid_jax import recipes

SEEDS = (0, 1)
STUDY = {"int8": {}, "four bits": {"ptq.weight_bits": 4}}

def get_config():
    config = recipes.default_config()
    config.effort = "ptq"
    config.data.train_size = 200
    config.model.widths = (4, 8, 8)
    config.parent.steps = 4
    config.ptq.update(images=64, calibration="minmax", rounding="nearest", correct_biases=False)
    config.evaluation.latency_calls = 1
    return config
"""


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(STUDY)
    return str(path)


def test_records_outlive_their_runs_and_make_the_tables(module, tmp_path):
    def run(**options):
        return study.main(module, str(tmp_path / "runs"), results=tmp_path / "results", **options)

    path = run(only=["int8"])
    records = (tmp_path / "results" / "mine.jsonl").read_text()
    assert [json.loads(line)["seed"] for line in records.splitlines()] == [0, 1]
    assert {json.loads(line)["part"] for line in records.splitlines()} == {"validation"}
    assert run(only=["int8"]) == path  # nothing is run again
    assert (tmp_path / "results" / "mine.jsonl").read_text() == records
    run(only=["four bits"], seeds=[0], test=True)
    made = study.read(tmp_path / "results" / "mine.jsonl")
    assert [own["part"] for own in made] == ["validation", "validation", "test"]
    assert path.read_text() == study.tables(made)
    assert "## four bits\n\nSeeds 0; 359 test images" in path.read_text()


def row(name, role, correct, bops):
    bits = np.packbits(np.array(correct, bool)).tobytes().hex()
    own = {"name": name, "role": role, "accuracy": np.mean(correct), "correct": bits}
    return own | {"macs": bops, "bops": bops, "files": {}}


def test_an_interval_is_over_images_and_not_over_seeds():
    """100 images; of two seeds, one loses the first ten of them and the other none."""
    dense, worse = np.ones(100), np.arange(100) >= 10
    runs = [
        {"run": "a", "seed": seed, "part": "test", "seconds": 60, "images": 100}
        | {"rows": [row("parent", "parent", dense, 8), row("compressed", "single", own, 1)]}
        for seed, own in enumerate((worse, dense))
    ]
    line = study.tables(runs).splitlines()[-1]
    assert line.startswith("| compressed | 95.00 ± 7.07 | -5.00 ± 7.07 | [")
    # Of 100 images 10 lose a half each: a deviation of 1.5 points, of which 1.96 are 2.9.
    low, high = map(float, line.split("[")[1].split("]")[0].split(","))
    assert -8.5 < low < -7.3
    assert -2.7 < high < -1.5


def test_the_plot_shows_each_parent_once_and_every_run():
    runs = [
        {"run": name, "seed": 0, "part": "test", "seconds": 60, "images": 8}
        | {"rows": [row("parent", "parent", [1] * 8, 8), row("cut", "single", [1] * 7 + [0], n)]}
        for n, name in enumerate(("half", "third"), 1)
    ]
    (axes,) = study.figure(runs).axes
    texts = " ".join(text.get_text() for text in axes.texts)
    assert texts.count("parent") == 1
    assert "half" in texts
    assert "third" in texts


def test_what_does_not_fit_is_named(module, tmp_path):
    with pytest.raises(ValueError, match="--only must be of int8, four bits, got 'eight'"):
        study.main(module, str(tmp_path), only=["eight"])
    with pytest.raises(ValueError, match="--config must be a file, or one of our studies"):
        study.main("nowhere", str(tmp_path))


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted(study.RESULTS.parent.glob("*_study.py"))]
)
def test_every_run_of_our_studies_is_a_configuration(name):
    made, _ = study.load(name)
    for changes in made["STUDY"].values():
        config = made["get_config"]()
        recipes.override(config, changes)
        recipes.check_read(recipes.read(config).effort, changes)


def test_the_tables_of_our_studies_are_those_of_their_records():
    for records in study.RESULTS.glob("*.jsonl"):
        assert records.with_suffix(".md").read_text() == study.tables(study.read(records))
        assert records.with_suffix(".svg").is_file()

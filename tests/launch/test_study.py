"""A study: runs of a kind of digits, their records, and the tables that are made of these alone."""

import json

import pytest

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
    config.parent.steps = 20
    config.ptq.images = 64
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


def test_what_does_not_fit_is_named(module, tmp_path):
    with pytest.raises(ValueError, match="--only must be of int8, four bits, got 'eight'"):
        study.main(module, str(tmp_path), only=["eight"])
    with pytest.raises(ValueError, match="--config must be a file, or one of our studies"):
        study.main("nowhere", str(tmp_path))


def test_the_tables_of_our_studies_are_those_of_their_records():
    for records in study.RESULTS.glob("*.jsonl"):
        assert records.with_suffix(".md").read_text() == study.tables(study.read(records))

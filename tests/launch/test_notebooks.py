"""The notebooks run from their first cell to their last, at a reduced size, without Jupyter."""

import json
import pathlib
import sys
import types

import jax
import pytest

from hybrid_jax import recipes

FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "notebooks"
SMALL = {"compress": {"STEPS": 10, "TUNING": 4}, "tour": {"STEPS": 8}}


def quick_config(made=recipes.default_config):
    """What compiles quickly, and is told in few lines."""
    config = made()
    config.ptq.update(images=64, calibration="minmax", rounding="nearest")
    config.evaluation.latency_calls = 1
    return config


def cells(name):
    """(source, tags) of the cells of code."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.ipynb")))
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "default_config", quick_config)
    # What shows a page in a notebook; of its version others ask.
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(version_info=(9, 0)))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=str))
    (install, tags), (sizes, also), *rest = cells(name)
    assert tags == ["install"]
    assert "%pip install" in install
    assert also == ["parameters"]
    known = {"__name__": "notebook"}
    exec(sizes, known)
    assert SMALL[name].keys() <= known.keys()
    known |= SMALL[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a user has
        for source, _ in rest:
            exec(source, known)
    made = {
        "compress": ["run/deploy/compressed.onnx", "run_finetune/deploy/compressed.onnx"],
        "tour": ["files/net.onnx", "files/net.c", "files/net.safetensors"],
    }
    for file in made[name]:
        assert (tmp_path / file).stat().st_size > 1000, file

"""What is carried to an accelerator, and a study there in less time than it needs."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from launch import accelerator

STUDY = """
from hybrid_jax import recipes

SEEDS = (0,)
ALONE = {"controls.same_bytes": False, "controls.same_bops": False, "mixture.kind": "cascade"}
STUDY = {
    "eight": {"effort": "ptq", "experts.steps": 2},
    "four": {"effort": "ptq", "ptq.weight_bits": 4},
    "pair": {"effort": "mixture", **ALONE, "mixture.members": ("four", "eight")},
}

def get_config():
    config = recipes.default_config()
    config.data.validation = "test:10"
    config.model.widths = (4, 8, 8)
    config.parent.steps = 4
    config.ptq.images = 16
    config.evaluation.latency_calls = 1
    config.deploy.targets = ("packed",)
    return config
"""


@pytest.fixture
def carried(tmp_path):
    """Images of two classes, light and dark, as `pack` writes them."""
    folder, rng = tmp_path / "carried", np.random.default_rng(0)
    (folder / "weights").mkdir(parents=True)
    arrays = {}
    for part, count in (("train", 40), ("test", 30)):
        labels, files = rng.integers(0, 2, count), []
        for label in labels:
            file = io.BytesIO()
            pixels = np.full((8, 8, 3), 60 + 120 * label) + rng.integers(0, 20, (8, 8, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(file, "jpeg")
            files.append(file.getvalue())
        arrays[f"{part}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_ends"] = np.cumsum([len(file) for file in files])
        arrays[f"{part}_labels"] = labels.astype(np.uint8)
    np.savez(folder / "jpeg.npz", names=np.array(["dark", "light"]), **arrays)
    return folder


def test_images_come_back_as_a_source_reads_them(carried, tmp_path):
    path = tmp_path / "images.npz"
    assert accelerator.unpack(carried, path) == ("dark", "light")
    with np.load(path) as found:
        assert found["train_images"].shape == (40, 8, 8, 3)
        light = found["test_images"].mean((1, 2, 3)) > 130
        np.testing.assert_array_equal(light, found["test_labels"])


@pytest.mark.slow
def test_a_study_goes_as_far_as_time_allows(carried, tmp_path, monkeypatch):
    module = tmp_path / "tiny.py"
    module.write_text(STUDY)
    monkeypatch.setattr(accelerator, "spend", lambda *given: None)
    out = tmp_path / "out"
    accelerator.main(carried, out, 10, str(module), scale=2.0)
    records = [json.loads(line) for line in (out / "tiny.jsonl").read_text().splitlines()]
    assert [own["run"] for own in records] == ["four", "eight", "pair"]
    assert {own["part"] for own in records} == {"test"}
    assert (out / "pair_0.tar.xz").stat().st_size < 2**20
    assert (out / "tiny.md").is_file()
    steps = json.loads((tmp_path / "accelerator_runs/runs/eight/0/run.json").read_text())["config"]
    assert steps["experts.steps"] == 4


def test_pack_names_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="--weights must be a directory with resnet20"):
        accelerator.pack(tmp_path / "new", "nowhere", tmp_path)
    assert not (tmp_path / "new").exists()

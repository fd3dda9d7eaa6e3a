"""The data section of the configuration, on the way to the task."""

import jax
import numpy as np
import pytest
from PIL import Image

from hybrid_jax import data, recipes


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of a folder in the home directory: train and test images of 8×10, of the value 10·class."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for part, count in (("train", 6), ("test", 8)):
        for i in range(count):
            file = tmp_path / "photos" / part / f"{i % 2}_{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 8), (10 * (i % 2),) * 3).save(file)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    config = recipes.default_config()
    config.data.update(name="folder", dir="~/photos", classes="~/classes.txt", pattern=r"^(\d)_")
    config.data.update(validation="test:2", resize=(9,), crop=(8,), mean=(0.0,) * 3, std=(0.5,) * 3)
    return config


def test_the_config_reaches_the_data(config, tmp_path, key):
    config.data.augment = ("brightness",)
    task = recipes.of_config(config, tmp_path / "run").task
    assert task.splits.class_names == ("cat", "dog")
    assert task.splits.image_shape == (8, 8, 3)
    assert (len(task.splits.train.labels), len(task.splits.test.labels)) == (6, 6)
    assert task.splits.validation.labels.tolist() == [0, 1]
    # 10 / 255 / 0.5, and of it at most a fifth more or less, rounded to whole values of 0..255.
    images = task.splits.validation.images
    np.testing.assert_allclose(task.normalize(images)[1], 20 / 255, rtol=1e-5)
    inside = np.asarray(task.augmented(images, jax.random.key(3)))[1, 1:-1, 1:-1] * 255 / 2
    assert np.all((inside > 7.9) & (inside < 12.1))


def test_masks_and_their_void_reach_the_task(config, tmp_path, key):
    """Labels move with the pixels that they are of, and 0 may be void."""
    for photo in sorted((tmp_path / "photos").glob("*/*.png")):
        file = tmp_path / "masks" / photo.relative_to(tmp_path / "photos")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.tile(np.uint8([0, 0, 1, 1, 1, 1, 1, 2, 2, 2]), (8, 1))).save(file)
    config.data.update(masks="~/masks", pattern="", resize=(), crop=(8, 8), void=0)
    config.data.update(classes="", class_names=("sky", "cat", "dog"), padding=2, flip=True)
    (tmp_path / "net.py").write_text(
        "import flax.linen as nn\n\n\ndef make():\n    return nn.Conv(3, (3, 3))\n"
    )
    config.model.make, config.effort = f"{tmp_path}/net.py:make", "ptq"
    task = recipes.of_config(config, tmp_path / "run").task
    assert task.splits.label_kind == "pixels"
    labels = task.splits.train.labels
    assert labels[0, 0].tolist() == [-1, 1, 1, 1, 1, 1, 2, 2]
    moved = np.asarray(task.augmented.labels(labels, key))
    assert set(np.unique(moved)) == {-1, 1, 2}
    assert not np.array_equal(moved, labels)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dir", "~/none", "config.data: dir must be a directory of images, got '/.*/none'"),
        ("validation", "test:8", "config.data: validation must .* of 8, got 'test:8'"),
        ("padding", 8, r"config.data: padding must be an integer in \[0, 7\], got 8"),
        ("test", 3.0, "config.data: test must be None for 'folder', which has test images"),
        ("std", (1.0,), r"config.data: std must be 3 values from 0 to 1, .* got \(1.0,\)"),
        ("keys", ("a", "b"), "config.data: keys must not be given for 'folder', which takes dir, "),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(config, tmp_path, key, value, message):
    config.data[key] = value
    with pytest.raises(ValueError, match=message):
        recipes.of_config(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_of_the_users_own_is_one_by_name(config, monkeypatch, tmp_path):
    config.data.name = "mine"
    with pytest.raises(ValueError, match=r"config.data.name must be one of .*, got 'mine'"):
        recipes.read(config)
    monkeypatch.setitem(data.SOURCES, "mine", lambda dir: data.Source(([], [])))
    recipes.read(config)

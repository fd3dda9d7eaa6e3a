"""What stays on disk gives what memory gives, to the bit."""

import itertools

import numpy as np
import pytest
from PIL import Image

from hybrid_jax import data, training


@pytest.fixture
def load(tmp_path):
    """Loads the same 23 photos of random pixels, of two classes."""
    rng = np.random.default_rng(0)
    for i in range(23):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    return lambda **given: data.load("folder", dir=tmp_path, **given)


@pytest.mark.parametrize("given", [{}, {"resize": (8, 8), "crop": 4}, {"train_size": 10}])
def test_it_is_what_memory_gives(load, given):
    held, lazy = load(**given), load(memory=0, **given)
    assert isinstance(lazy.train.images, data.OnDisk)
    assert isinstance(load(memory=23 * 90, **given).train.images, np.ndarray) or "resize" in given
    assert (held.mean, held.std, held.class_names) == (lazy.mean, lazy.std, lazy.class_names)
    for name in ("train", "validation", "test"):
        own, other = getattr(held, name), getattr(lazy, name)
        assert other.images.shape == own.images.shape
        assert np.array_equal(own.labels, other.labels)
        assert np.array_equal(own.images, np.asarray(other.images))
        for index in (0, -1, slice(1, 3), slice(0), np.array([1, 0, 1]), np.array([], int)):
            assert np.array_equal(own.images[index], other.images[index])


def test_batches_and_resuming_are_bit_equal(load):
    held, lazy = load().train, load(memory=0).train
    for start in (0, 3, 7):
        expected = data.batches(held, 4, seed=5, start_step=start, steps=11)
        got = data.batches(lazy, 4, seed=5, start_step=start, steps=11)
        for one, other in zip(expected, got, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[k], other[k]) for k in one)
    endless = itertools.islice(data.batches(lazy, 4, seed=5), 9)
    assert len(list(endless)) == 9
    assert list(data.batches(lazy, 4, seed=5, start_step=2, steps=2)) == []


def test_no_more_is_read_than_is_asked_for():
    read = []

    def at(numbers):
        for i in numbers:
            yield f"{i}", lambda i=i: read.append(i) or np.full((1, 1, 1), i, np.uint8), i % 2

    splits = data.from_arrays(data.Examples(200, at), test=20, mean=[0.5], std=[0.5], memory=0)
    assert set(read) == {0}  # its size
    read.clear()
    assert splits.test.images[:3].shape == (3, 1, 1, 1)
    assert sorted(read) == splits.indices["test"][1][:3].tolist()


def test_evaluation_reads_it(load):
    predict = lambda params, x: x[:, 0, 0, :2].astype(np.float32)  # noqa: E731
    held, lazy = (
        training.predict_logits(predict, None, splits.train, 4)
        for splits in (load(), load(memory=0))
    )
    assert np.array_equal(held, lazy)


def test_what_goes_wrong_while_reading_is_named(load, tmp_path):
    lazy = load(memory=0, test=1, validation=1, mean=[0.5] * 3, std=[0.5] * 3)
    file = tmp_path / "b" / "9.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b/9.png must be an image of 8 bits a channel, got "):
        list(data.batches(lazy.train, 21, seed=0, steps=1))
    Image.new("RGB", (4, 4)).save(file)
    with pytest.raises(ValueError, match=r"one size, got \(4, 4, 3\) of .*b/9.png and \(6, 5, 3\)"):
        lazy.train.images[:]

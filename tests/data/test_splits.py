import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import data

LABELS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])  # 60 % and 40 %
IMAGES = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
    part=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_stratified_takes_the_count_and_every_class_its_share(labels, part, seed):
    count = round(part * len(labels))
    chosen = data.stratified(labels, count, seed)
    assert len(chosen) == count
    assert np.array_equal(chosen, np.unique(chosen))
    share = np.bincount(labels, minlength=5) * count / len(labels)
    # Rounding moves each of 5 classes by less than one, and they share what is over.
    assert np.all(np.abs(np.bincount(labels[chosen], minlength=5) - share) <= 2.5)
    assert np.array_equal(chosen, data.stratified(labels, count, seed))


def test_parts_are_disjoint_stratified_and_complete():
    splits = data.make_splits((IMAGES, LABELS), (IMAGES, LABELS), validation=0.5, seed=3)
    # Half of 6 and 4 is 3 and 2.
    assert np.bincount(splits.validation.labels).tolist() == [3, 2]
    assert np.bincount(splits.train.labels).tolist() == [3, 2]
    ids = [part.images[:, 0, 0, 0] for part in (splits.train, splits.validation)]
    assert sorted(np.concatenate(ids)) == list(range(10))
    assert splits.train.images.dtype == np.uint8
    assert splits.train.labels.dtype == np.int32
    other = data.make_splits((IMAGES, LABELS), (IMAGES, LABELS), validation=0.5, seed=4)
    assert not np.array_equal(ids[1], other.validation.images[:, 0, 0, 0])


def test_train_size_leaves_validation_alone():
    def make(size):
        return data.make_splits((IMAGES, LABELS), (IMAGES, LABELS), validation=5, train_size=size)

    assert len(make(2).train.labels) == 2
    assert np.array_equal(make(2).validation.images, make(None).validation.images)


def test_moments_by_hand():
    images = np.array([0, 255, 51, 51], np.uint8).reshape(2, 1, 1, 2)
    splits = data.make_splits((images, [0, 1]), (images, [0, 1]), (images, [0, 1]))
    # Channel 0 holds 0 and 51/255 = 0.2: mean 0.1, deviation 0.1.
    # Channel 1 holds 1 and 0.2: mean 0.6, deviation 0.4.
    np.testing.assert_allclose(splits.mean, [0.1, 0.6])
    np.testing.assert_allclose(splits.std, [0.1, 0.4])
    constant = np.full((2, 1, 1, 1), 7, np.uint8)
    pair = (constant, [0, 1])
    assert data.make_splits(pair, pair, pair).std == (1.0,)


def test_plain_lists_and_own_names():
    images = [[[0, 255], [1, 2]]] * 4
    splits = data.make_splits(
        (images, [0, 1, 0, 1]), (images, [[0]] * 4), validation=2, class_names=["cat", "dog", "cow"]
    )
    assert splits.image_shape == (2, 2, 1)
    assert splits.num_classes == 3
    assert splits.test.labels.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 10}, r"validation must be .* leaves train images of 10, got 10"),
        ({"validation": 0}, r"validation must be .*, got 0"),
        ({"validation": 2.5}, r"validation must be .*, got 2.5"),
        ({"validation": 4, "train_size": 7}, r"train_size must be an integer in \[1, 6\], got 7"),
        ({"class_names": ["a"]}, r"train labels must be in \[0, 1\), got 1 at index 6"),
        ({"test": (IMAGES, LABELS + 2**32)}, r"test labels must be in \[0, 2\), got 4294967296 at"),
        ({"train": (IMAGES, LABELS + 2**32)}, r"train labels, .* \[0, 10\), got 4294967296 at"),
        ({"train": (IMAGES, LABELS - 1)}, r"train labels, .* in \[0, 10\), got -1 at index 0"),
        ({"test": (IMAGES, LABELS - 1)}, r"test labels must be in \[0, 2\), got -1 at index 0"),
        ({"test": (IMAGES, LABELS[:9])}, r"test labels must have shape \(10,\) .* got \(9,\)"),
        ({"test": (IMAGES, LABELS / 2)}, "test labels must be integers, got float64"),
        ({"test": (IMAGES / 255, LABELS)}, "test images must be uint8 .* got float64"),
        ({"test": (IMAGES.astype(int) * 90, LABELS)}, "test images must be uint8 .* got int64"),
        ({"test": (IMAGES[:, :1], LABELS)}, r"test images must .* \(2, 3, 1\) .* got \(1, 3, 1\)"),
        ({"test": (IMAGES[:0], LABELS[:0])}, r"test images must have shape .* got \(0, 2, 3, 1\)"),
        ({"image_shape": (3, 3, 1)}, r"train images must have shape \(3, 3, 1\)"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {"train": (IMAGES, LABELS), "test": (IMAGES, LABELS), **changes}
    with pytest.raises(ValueError, match=message):
        data.make_splits(**arguments)

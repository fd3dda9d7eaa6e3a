import itertools

import numpy as np
import pytest

from hybrid_jax import data

IMAGES = np.arange(40, dtype=np.uint8).reshape(20, 1, 1, 2)
LABELS = np.arange(20) % 2
PAIR = IMAGES, LABELS


def equal(a, b):
    return all(
        np.array_equal(x, y)
        for name in ("train", "validation", "test")
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True)
    )


def test_what_has_labels_becomes_splits():
    splits = data.from_arrays(PAIR, seed=3)
    assert data.take(splits) is splits
    assert equal(data.take(PAIR, seed=3), splits)
    assert equal(data.take({"train": PAIR}, seed=3), splits)
    other = IMAGES[::-1], LABELS[::-1]
    parts = data.from_arrays(PAIR, test=other, validation=PAIR)
    assert equal(data.take((PAIR, PAIR, other)), parts)
    assert equal(data.take({"test": other, "train": PAIR, "validation": PAIR}), parts)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, [1]), lambda x: {"image": x, "y": 1}])
def test_batches_without_labels_are_the_same_in_each_part(wrap):
    splits = data.take((wrap(IMAGES[i : i + 8]) for i in (0, 8, 16)), mean=(0.5, 0.2), std=(1, 1))
    assert splits.label_kind is splits.class_names is None
    assert splits.mean == (0.5, 0.2)
    for part in (splits.train, splits.validation, splits.test):
        assert np.array_equal(part.images, IMAGES)
        assert part.labels is None
    (batch,) = data.batches(splits.train, 4, seed=0, steps=1)
    assert np.array_equal(batch["image"], IMAGES[batch["index"]])


def test_images_alone_and_batches_without_end():
    assert np.array_equal(data.take(IMAGES).train.images, IMAGES)
    assert len(data.take(itertools.repeat(IMAGES)).train.images) == 1024


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            [IMAGES / 255],
            {},
            r"batches must hold images \(B, H, W, C\) uint8, got float64\(",
        ),
        ([IMAGES, IMAGES[:, :, :, :1]], {}, r"of one shape, got \(1, 1, 1\) after \(1, 1, 2\)"),
        ([], {}, "data must hold at least one image, got none"),
        (3, {}, "data must be arrays, Splits or batches, got int"),
        ({"test": PAIR}, {}, "data must hold train, validation and test, got test"),
        ({"train": PAIR, "val": PAIR}, {}, "data must hold train, .*, got train, val"),
        (data.from_arrays(PAIR), {"seed": 1}, "seed must not be given beside Splits"),
    ],
)
def test_what_is_none_of_these_is_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        data.take(given, **options)

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


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"image": x, "y": 1}])
def test_batches_without_labels_are_the_same_in_each_part(wrap):
    splits = data.take((wrap(IMAGES[i : i + 8]) for i in (0, 8, 16)), mean=(0.5, 0.2), std=(1, 1))
    assert splits.label_kind is splits.class_names is None
    assert splits.mean == (0.5, 0.2)
    for part in (splits.train, splits.validation, splits.test):
        assert np.array_equal(part.images, IMAGES)
        assert part.labels is None
    (batch,) = data.batches(splits.train, 4, seed=0, steps=1)
    assert np.array_equal(batch["image"], IMAGES[batch["index"]])


@pytest.mark.parametrize("wrap", [tuple, list, lambda pair: dict(zip(("image", "label"), pair))])
@pytest.mark.parametrize(
    "labels",
    [LABELS, LABELS.astype(str), np.arange(20).reshape(20, 1, 1) % 3, np.linspace(0, 1, 40)],
    ids=["classes", "names", "pixels", "values"],
)
def test_batches_with_labels_are_as_their_arrays(wrap, labels):
    labels = labels.reshape(20, 2) if labels.dtype.kind == "f" else labels
    read = []

    def batches():
        for i in (0, 8, 16):
            read.append(i)
            yield wrap((IMAGES[i : i + 8], labels[i : i + 8]))

    assert equal(data.take(batches(), seed=3), data.take((IMAGES, labels), seed=3))
    assert read == [0, 8, 16]  # once
    assert equal(data.take(list(batches()), test=0.5), data.take((IMAGES, labels), test=0.5))


def test_batches_with_labels_end():
    with pytest.raises(ValueError, match=r"end within 100 bytes of images, got 120 in 3 batches"):
        data.gathered(itertools.repeat(PAIR), memory=100)
    images, labels = data.gathered(itertools.repeat(PAIR, 2), memory=80)
    assert np.array_equal(images, np.concatenate([IMAGES, IMAGES]))
    assert np.array_equal(labels, np.concatenate([LABELS, LABELS]))


def test_images_alone_and_batches_without_end():
    assert np.array_equal(data.take(IMAGES).train.images, IMAGES)
    assert len(data.take(itertools.repeat(IMAGES)).train.images) == 1024


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            [IMAGES / 255],
            {},
            r"batches must hold images \(B, H, W, C\) uint8, B > 0, got float64\(",
        ),
        ([IMAGES, IMAGES[:, :, :, :1]], {}, r"alike, got images .*1, 1, 1\) in batch 1 after "),
        ([PAIR, PAIR, (IMAGES[:0], LABELS[:0])], {}, r"B > 0, got uint8\(0, 1, 1, 2\) in batch 2"),
        ([PAIR, (IMAGES, LABELS[:19])], {}, r"a label for each image, got labels \(19,\) for 20 "),
        ([PAIR, IMAGES], {}, r"alike, got labels none in batch 1 after int64\(20,\)"),
        ([(IMAGES,), PAIR], {}, r"alike, got labels int64\(20,\) in batch 1 after none"),
        ([PAIR, (IMAGES, LABELS / 2)], {}, r"alike, got labels float64\(20,\) in batch 1 after "),
        ([(IMAGES, LABELS, 1)], {}, "images, or images and labels, got 3 parts in batch 0"),
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

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
    splits = data.from_arrays((IMAGES, LABELS), (IMAGES, LABELS), validation=0.5, seed=3)
    # Half of 6 and 4 is 3 and 2.
    assert np.bincount(splits.validation.labels).tolist() == [3, 2]
    assert np.bincount(splits.train.labels).tolist() == [3, 2]
    ids = [part.images[:, 0, 0, 0] for part in (splits.train, splits.validation)]
    assert sorted(np.concatenate(ids)) == list(range(10))
    assert splits.train.images.dtype == np.uint8
    assert splits.train.labels.dtype == np.int32
    other = data.from_arrays((IMAGES, LABELS), (IMAGES, LABELS), validation=0.5, seed=4)
    assert not np.array_equal(ids[1], other.validation.images[:, 0, 0, 0])


def test_train_size_leaves_validation_alone():
    def make(size):
        return data.from_arrays((IMAGES, LABELS), (IMAGES, LABELS), validation=5, train_size=size)

    assert len(make(2).train.labels) == 2
    assert np.array_equal(make(2).validation.images, make(None).validation.images)


VALUES = np.linspace(-1, 1, 20).reshape(10, 2)
PIXELS = np.arange(60).reshape(10, 2, 3) % 4


@pytest.mark.parametrize(
    ("labels", "kind", "classes"),
    [
        (LABELS, "classes", 2),
        (LABELS[:, None], "classes", 2),
        (PIXELS, "pixels", 4),
        (PIXELS.astype(np.uint8), "pixels", 4),
        (PIXELS == 1, "pixels", 2),
        (VALUES, "values", None),
        (VALUES[:, 0], "values", None),
        (VALUES[:, :1], "values", None),
        (None, None, None),
    ],
)
def test_labels_of_every_kind_stay_with_their_images(labels, kind, classes):
    splits = data.from_arrays((IMAGES, labels), validation=3, seed=1)
    assert (splits.label_kind, splits.num_classes) == (kind, classes)
    assert splits.class_names == (None if classes is None else tuple("0123")[:classes])
    for part in (splits.train, splits.validation, splits.test):
        assert len(part.images)
        if labels is None:
            assert part.labels is None
        else:
            own = labels.ravel() if kind == "classes" else labels
            number = part.images[:, 0, 0, 0]
            assert np.array_equal(part.labels, own[number].astype(part.labels.dtype))
            assert part.labels.dtype == (np.float32 if kind == "values" else np.int32)


def test_what_is_held_out_of_no_classes_is_drawn_by_the_seed():
    held = [
        data.from_arrays((IMAGES, VALUES), seed=seed, validation=3).indices["validation"][1]
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(held[0], held[1])
    assert not np.array_equal(held[0], held[2])


def test_moments_by_hand():
    images = np.array([0, 255, 51, 51], np.uint8).reshape(2, 1, 1, 2)
    splits = data.from_arrays((images, [0, 1]), (images, [0, 1]), (images, [0, 1]))
    # Channel 0 holds 0 and 51/255 = 0.2: mean 0.1, deviation 0.1.
    # Channel 1 holds 1 and 0.2: mean 0.6, deviation 0.4.
    np.testing.assert_allclose(splits.mean, [0.1, 0.6])
    np.testing.assert_allclose(splits.std, [0.1, 0.4])
    constant = np.full((2, 1, 1, 1), 7, np.uint8)
    pair = (constant, [0, 1])
    assert data.from_arrays(pair, pair, pair).std == (1.0,)


def test_plain_lists_and_own_names():
    images = [[[0, 255], [1, 2]]] * 4
    splits = data.from_arrays(
        (images, [0, 1, 0, 1]), (images, [[0]] * 4), validation=2, class_names=["cat", "dog", "cow"]
    )
    assert splits.image_shape == (2, 2, 1)
    assert splits.num_classes == 3
    assert splits.test.labels.tolist() == [0, 0, 0, 0]


def test_validation_of_test_images():
    def make(**given):
        return data.from_arrays((IMAGES, LABELS), (IMAGES + 10, LABELS), "test:5", **given)

    splits = make(seed=3)
    assert np.array_equal(splits.train.images, IMAGES)
    assert np.bincount(splits.validation.labels).tolist() == [3, 2]
    both = np.concatenate([p.images[:, 0, 0, 0] for p in (splits.validation, splits.test)])
    assert sorted(both) == list(range(10, 20))
    of, index = splits.indices["validation"]
    assert of == "test"
    assert np.array_equal(splits.validation.images, IMAGES[index] + 10)
    assert not np.array_equal(index, make(seed=4).indices["validation"][1])


@given(
    test=st.none() | st.integers(1, 3),
    validation=st.sampled_from([None, 0.25, 2, "test:0.5", "test:1"]),
    size=st.none() | st.just(3),
    seed=st.integers(0, 9),
)
def test_indices_say_where_every_image_comes_from(test, validation, size, seed):
    given = {"train": IMAGES, "test": IMAGES[::-1] + 100}
    part = (given["test"], LABELS) if test is None or test == 1 else test
    splits = data.from_arrays((IMAGES, LABELS), part, validation, seed=seed, train_size=size)
    positions = []
    for name, (of, index) in splits.indices.items():
        arrays = getattr(splits, name)
        assert np.array_equal(arrays.images, given[of][index])
        assert np.array_equal(arrays.labels, LABELS[index])
        positions += [(of, i) for i in index.tolist()]
    assert len(set(positions)) == len(positions)


def test_a_fifth_is_for_the_test_where_there_is_none():
    one, other = (data.from_arrays((IMAGES, LABELS), seed=seed) for seed in (1, 2))
    assert [len(p.labels) for p in (one.train, one.validation, one.test)] == [7, 1, 2]
    assert np.array_equal(one.test.images, other.test.images)


def test_moments_given():
    pair = (IMAGES, LABELS)
    splits = data.from_arrays(pair, pair, mean=[0.25], std=(0.5,))
    assert (splits.mean, splits.std) == ((0.25,), (0.5,))
    computed = data.from_arrays(pair, pair)
    assert data.from_arrays(pair, pair, mean=[0.25]).std == computed.std


@pytest.mark.parametrize("kind", [np.uint8, np.uint32, np.int64])
def test_pixels_of_a_void_label_are_marked(kind):
    """9 and, where there can be any, -1: neither is a class."""
    labels = np.where(np.arange(60).reshape(10, 2, 3) % 5 == 4, 9, PIXELS).astype(kind)
    expected = np.where(labels == 9, -1, labels.astype(np.int64))
    if kind == np.int64:
        labels[0, 0, 0] = expected[0, 0, 0] = -1
    splits = data.from_arrays((IMAGES, labels), (IMAGES, labels), "test:5", void=9)
    assert splits.class_names == tuple("0123")
    assert splits.train.labels.dtype == np.int32
    assert np.array_equal(splits.train.labels, expected)
    (batch,) = data.batches(splits.train, 4, seed=0, steps=1)
    assert np.array_equal(batch["label"], expected[batch["index"]])


def test_labels_of_pixels_are_resized_and_cut_as_their_images():
    """To the nearest one: no class comes in that was not there."""
    labels = np.where(np.arange(4) < 2, 5, -1)[None, None].repeat(4, 1).repeat(3, 0)
    images = np.where(labels == 5, 250, 0).astype(np.uint8)
    pair = images, labels
    splits = data.from_arrays(pair, pair, pair, resize=(8, 8), crop=(2, 6))
    assert splits.image_shape == (2, 6, 1)
    assert splits.train.labels.tolist() == [[[5] * 3 + [-1] * 3] * 2] * 3
    # Away from the edge, which bilinear images smooth.
    assert splits.train.images[0, 0, [0, 1, -2, -1], 0].tolist() == [250, 250, 0, 0]


def test_arrays_are_resized():
    pair = (IMAGES, LABELS)
    splits = data.from_arrays(pair, pair, resize=(4, 6), crop=(2, 2), image_shape=(2, 2, 1))
    assert sorted(splits.test.images[:, 0, 0, 0]) == list(range(10))


def test_examples_of_the_users_own():
    def examples(wide=None):
        def at(numbers):
            for i in numbers:
                yield f"photo {i}", lambda i=i: np.full((2, 2 + (i == wide), 3), i, np.uint8), i % 2

        return data.Examples(10, at)

    splits = data.from_arrays(examples(), test=4, validation=1)
    assert np.array_equal(splits.train.images[:, 0, 0, 0] % 2, splits.train.labels)
    with pytest.raises(ValueError, match=r"one size, got \(2, 3, 3\) of photo 3 and .* of photo 0"):
        data.from_arrays(examples(wide=3))
    for image in (np.ones((2, 2, 1)), np.ones((2, 2), np.uint8)):
        bare = data.Examples(2, lambda numbers, x=image: (("it", lambda: x, 1) for _ in numbers))
        with pytest.raises(ValueError, match=r"it must be \(h, w, C\) uint8, got \(2, 2"):
            data.from_arrays(bare)
    with pytest.raises(ValueError, match="train must hold images, got none"):
        data.from_arrays(data.Examples(0, lambda numbers: []))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 10}, r"validation must be .* leaves train images of 10, got 10"),
        ({"validation": 0}, r"validation must be .*, got 0"),
        ({"validation": 2.5}, r"validation must be .*, got 2.5"),
        ({"validation": 4, "train_size": 7}, r"train_size must be an integer in \[1, 6\], got 7"),
        (
            {"validation": "train:3"},
            r"validation must be .* or either after 'test:', got 'train:3'",
        ),
        ({"validation": "test:10"}, r"validation must .* leaves test images of 10, got 'test:10'"),
        ({"validation": "test:x"}, r"validation must be .*, got 'test:x'"),
        ({"validation": True}, r"validation must be .*, got True"),
        ({"validation": float("nan")}, r"validation must be .*, got nan"),
        ({"test": 10}, r"test must be .* leaves train images of 10, got 10"),
        ({"test": "test:1"}, r"test must be a finite number above 0, got 'test:1'"),
        ({"class_names": ["a"]}, r"train labels must be of two classes or more, got \('a',\)"),
        ({"class_names": ["a", "b", "a"]}, "class_names must differ, got 'a' twice"),
        ({"train": (IMAGES, LABELS + 1), "class_names": "ab"}, r"must be in \[0, 2\), got 2 at"),
        ({"train": (IMAGES, LABELS * 0)}, r"of two classes or more, got \('0',\)"),
        ({"mean": (0.5, 0.5)}, r"mean must be 1 values from 0 to 1, .*, got \(0.5, 0.5\)"),
        ({"mean": (123.7,)}, r"mean must be 1 values from 0 to 1, .*, got \(123.7,\)"),
        ({"std": (0,)}, r"std must be 1 values from 0 to 1, .*, got \(0,\)"),
        ({"crop": 3}, r"crop must fit .*, got \(3, 3\) for a train image of \(2, 3\)"),
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
        (
            {"test": (np.zeros((10, 3, 8, 8), np.uint8), LABELS)},
            r"\(n, H, W, C\) .* \(10, 3, 8, 8\)",
        ),
        ({"train": (IMAGES, VALUES), "class_names": "ab"}, "class_names must be None .* float64"),
        ({"train": (IMAGES, None), "class_names": "ab"}, "class_names must be None .* no labels"),
        ({"train": (IMAGES, VALUES[:, 0])}, "test labels must be floats as in train, got int64"),
        ({"train": (IMAGES, VALUES * np.inf)}, "train labels must be finite, got "),
        ({"train": (IMAGES, VALUES)}, r"test labels must have shape \(2,\) each as in .* \(\)"),
        ({"test": (IMAGES, PIXELS)}, r"test labels must have shape \(\) each as in .* \(2, 3\)"),
        ({"test": (IMAGES, None)}, r"test labels must have shape \(\) each as in train, got None"),
        (
            {"train": (IMAGES, LABELS[:, None] * [1, 1])},
            r"\(10, D\) of floats, got \(10, 2\)",
        ),
        ({"train": (IMAGES, PIXELS / 4)}, r"train labels must .*, got \(10, 2, 3\) float64"),
        ({"train": (IMAGES, PIXELS - 2), "test": 2}, r"train labels, .* got -2 at index 0"),
        (
            {"train": (IMAGES, PIXELS[:, :1]), "test": 2, "crop": 2},
            r"train labels must be of the images' size .*, got \(1, 3\) for \(2, 3\)",
        ),
        (
            {"train": (IMAGES, np.where(np.arange(10)[:, None, None] == 3, -1, PIXELS)), "test": 2},
            "train labels must have a pixel that counts in each image, got none in image 3",
        ),
        ({"void": 9}, "void must be -1 where pixels have no labels, got 9"),
        ({"void": -2}, "void must be an integer of at least -1, got -2"),
        ({"memory": -1}, "memory must be an integer of at least 0, got -1"),
        ({"image_shape": (3, 3, 1)}, r"train images must have shape \(3, 3, 1\)"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {"train": (IMAGES, LABELS), "test": (IMAGES, LABELS), **changes}
    with pytest.raises(ValueError, match=message):
        data.from_arrays(**arguments)

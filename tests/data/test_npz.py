import numpy as np
import pytest

from hybrid_jax import data


def save_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 6), ("val", 3), ("test", 4)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
        arrays[f"{part}_labels"] = np.arange(count)[:, None] % 3
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def test_medmnist(tmp_path):
    arrays = save_npz(tmp_path / "tiny.npz")
    splits = data.load("medmnist", dir=tmp_path / "tiny.npz", class_names=("a", "b", "c"))
    assert np.array_equal(splits.validation.images, arrays["val_images"])
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert splits.class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="validation must be None for 'medmnist'"):
        data.load("medmnist", dir=tmp_path / "tiny.npz", validation=0.1)
    with pytest.raises(ValueError, match=r"train labels must be in \[0, 2\), got 2 at index 2"):
        data.load("medmnist", dir=tmp_path / "tiny.npz", class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"train images must .*\(28, 28, 3\).* got \(4, 4, 3\)"):
        data.load("medmnist", dir=tmp_path / "tiny.npz", image_shape=(28, 28, 3))


def test_medmnist_files_that_are_none(tmp_path):
    path = tmp_path / "tiny.npz"
    for dir in (None, path):
        with pytest.raises(ValueError, match=r"dir must be the path .* \(no such path\)"):
            data.load("medmnist", dir=dir)
    save_npz(path, val_images=None, test_labels=None)
    with pytest.raises(ValueError, match="without test_labels, val_images"):
        data.load("medmnist", dir=path)
    with pytest.raises(ValueError, match=r"dir must be the path .* \(not readable: "):
        data.load("medmnist", dir=tmp_path)
    for content in (b"", b"not a zip file", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"dir must be the path .* \(not readable: "):
            data.load("medmnist", dir=path)


def images(count, *shape):
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones(shape, np.uint8)


TRAIN, TEST, VAL = images(6, 4, 4, 3), images(4, 4, 4, 3), images(2, 4, 4, 3)
Y, Y_TEST, Y_VAL = np.arange(6) % 2, np.arange(4) % 2, np.arange(2)


@pytest.mark.parametrize(
    ("arrays", "sizes"),
    [
        ({"x_train": TRAIN, "y_train": Y, "x_test": TEST, "y_test": Y_TEST}, (5, 1, 4)),
        ({"trainX": TRAIN, "trainY": Y, "valX": VAL, "valY": Y_VAL}, (5, 2, 1)),
        ({"images": TRAIN, "labels": Y, "ids": np.arange(6)}, (4, 1, 1)),
        ({"arr_0": TRAIN, "arr_1": Y[:, None]}, (4, 1, 1)),  # by their shapes alone
        ({"training/a": TRAIN, "training/b": Y, "mean": np.zeros(3)}, (4, 1, 1)),
        ({"Train_Data": TRAIN, "train_targets": Y, "train_weights": Y / 2}, (4, 1, 1)),
    ],
)
def test_keys_are_found(arrays, sizes, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    splits = data.load("npz", dir=tmp_path / "a.npz", validation=None if sizes[1] == 2 else 1)
    assert tuple(len(p.labels) for p in (splits.train, splits.validation, splits.test)) == sizes
    # Image i is all i, and of class i % 2.
    for part in (splits.train, splits.validation, splits.test):
        assert np.array_equal(part.images[:, 0, 0, 0] % 2, part.labels)


@pytest.mark.parametrize(
    "arrays",
    [
        {"a": TRAIN, "b": TRAIN, "labels": Y},
        {"x": TRAIN, "b": Y, "c": Y},
        {"x_train": TRAIN, "y_train": Y[:5]},
        {"x_train": TRAIN, "y_train": Y, "x_test": TEST},
        {"y": Y},
    ],
)
def test_keys_that_are_open_are_listed_with_shapes(arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    listed = ", ".join(f"{key} {array.shape} {array.dtype}" for key, array in arrays.items())
    with pytest.raises(ValueError, match="keys must be given where") as caught:
        data.load("npz", dir=tmp_path / "a.npz")
    assert str(caught.value).endswith(f"got {listed}")


def test_values_and_pixels_are_told_by_name(tmp_path):
    for name, labels, kind in [
        ("y", Y / 4, "values"),
        ("train_masks", np.tile(Y[:, None, None], (1, 4, 4)), "pixels"),
        ("values", np.stack([Y, Y], 1) / 2, "values"),
    ]:
        np.savez(tmp_path / "a.npz", x_train=TRAIN, **{name: labels}, ids=np.arange(6))
        keys = () if name.startswith("train") else ("x_train", name)
        splits = data.load("npz", dir=tmp_path / "a.npz", keys=keys, validation=1)
        assert splits.label_kind == kind
        number = splits.train.images[:, 0, 0, 0]
        assert np.array_equal(splits.train.labels, labels[number])
    np.savez(tmp_path / "a.npz", x=TRAIN, y=Y / 4, ids=np.arange(6))
    assert data.load("npz", dir=tmp_path / "a.npz", validation=1).label_kind == "values"
    np.savez(tmp_path / "a.npz", x=TRAIN, weights=Y / 4)
    with pytest.raises(ValueError, match="keys must be given where"):
        data.load("npz", dir=tmp_path / "a.npz")


def test_keys_given(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=TRAIN, b=TEST, c=Y, d=Y_TEST)
    splits = data.load("npz", dir=path, keys=("b", "d", "a", "c"), validation="test:2")
    sizes = [len(p.labels) for p in (splits.train, splits.validation, splits.test)]
    assert sizes == [4, 2, 4]
    with pytest.raises(ValueError, match=r"a, e, got .* without e: a \(6, 4, 4, 3\) uint8, b "):
        data.load("npz", dir=path, keys=("a", "e"))
    with pytest.raises(ValueError, match=r"keys must be two for each .*, got \('a',\)"):
        data.load("npz", dir=path, keys=("a",))


def test_labels_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=TRAIN, y=np.array(["cat", "ant"] * 3))
    splits = data.load("npz", dir=tmp_path / "a.npz", validation=1)
    assert splits.class_names == ("ant", "cat")
    assert np.array_equal(splits.train.labels, 1 - splits.train.images[:, 0, 0, 0] % 2)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_objects_are_never_unpickled(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x_train=np.array([Trap(), None], object), y_train=Y)
    for keys in ((), ("x_train", "y_train")):
        with pytest.raises(ValueError, match="x_train of Python objects, never unpickled, y_train"):
            data.load("npz", dir=path, keys=keys)
    np.savez(path, x=TRAIN, y=Y, notes=np.array([Trap()], object))  # which nobody needs
    assert data.load("npz", dir=path, validation=1).num_classes == 2
    np.save(tmp_path / "a.npy", TRAIN)
    with pytest.raises(ValueError, match=r"dir must be the path of an .npz file, .* \(not readab"):
        data.load("npz", dir=tmp_path / "a.npy")

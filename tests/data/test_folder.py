import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from hybrid_jax import data

REPOSITORY = pathlib.Path(__file__).parents[2]


def save(root, *names, size=(5, 4), mode="RGB"):
    """Writes images (4, 5) of value 10·i, i their place among the names."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, 10 * i if mode == "L" else (10 * i,) * 3).save(root / name)


def seen(arrays):
    """Label of each value."""
    return dict(zip(arrays.images[:, 0, 0, 0].tolist(), arrays.labels.tolist()))


def test_directories_are_classes(tmp_path):
    save(tmp_path, "cat/a.png", "cat/b.PNG", "ant/c.bmp", "ant/deep/d.png", "dog/e.png")
    (tmp_path / "cat" / "._a.png").write_bytes(b"a resource fork")
    (tmp_path / ".git").mkdir()
    (tmp_path / "notes.txt").write_text("not an image")
    splits = data.load("folder", dir=tmp_path, test=1, validation=1)
    assert splits.class_names == ("ant", "cat", "dog")
    assert splits.image_shape == (4, 5, 3)
    parts = (splits.train, splits.validation, splits.test)
    assert seen(parts[0]) | seen(parts[1]) | seen(parts[2]) == {0: 1, 10: 1, 20: 0, 30: 0, 40: 2}


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_parts_are_directories(tmp_path, name):
    save(tmp_path, "train/b/0.png", "train/a/1.png", f"{name}/a/2.png", "test/b/3.png", mode="L")
    (tmp_path / ".git" / "hooks").mkdir(parents=True)
    splits = data.load("folder", dir=tmp_path)
    assert splits.image_shape == (4, 5, 1)  # as all are grey
    assert seen(splits.train) == {0: 1, 10: 0}
    assert (seen(splits.validation), seen(splits.test)) == ({20: 0}, {30: 1})


def test_a_class_may_be_called_train(tmp_path):
    save(tmp_path, "train/0.png", "car/1.png", "train/2.png", "car/3.png")
    assert data.load("folder", dir=tmp_path, test=1, validation=1).class_names == ("car", "train")


@pytest.mark.parametrize("header", ["", "id,class\n"])
def test_labels_of_a_csv(tmp_path, header):
    save(tmp_path, "a.png", "b.png", "in/c.png", "in/d.png", "in/unlabelled.png")
    (tmp_path / "labels.csv").write_text(header + "in/d.png,10\n\na.png, 9\nb.png,10\nin/c.png,9\n")
    for labels in ("labels.csv", tmp_path / "labels.csv"):
        splits = data.load("folder", dir=tmp_path, labels=labels, test=1, validation=1)
        assert splits.class_names == ("9", "10")  # sorted as numbers
        parts = (splits.train, splits.validation, splits.test)
        assert seen(parts[0]) | seen(parts[1]) | seen(parts[2]) == {0: 0, 10: 1, 20: 0, 30: 1}


def test_labels_of_names_by_pattern(tmp_path):
    save(tmp_path, "0_x.png", "2_y.png", "2_z.png", "0_w.png")

    def load(**given):
        splits = data.load("folder", dir=tmp_path, test=1, validation=1, **given)
        return splits.class_names, seen(splits.train) | seen(splits.test) | seen(splits.validation)

    assert load(pattern=r"(\d+)_") == (("0", "2"), {0: 0, 10: 1, 20: 1, 30: 0})
    # With classes given, none of which is a number, 2 is the number of the third.
    names = ("ant", "bee", "cat")
    assert load(pattern=r"(\d+)_", class_names=names) == (names, {0: 0, 10: 2, 20: 2, 30: 0})
    with pytest.raises(ValueError, match="train labels must be of 2 class names, got '2'"):
        load(pattern=r"(\d+)_", class_names=("0", "1"))


def test_photos_of_many_sizes_and_modes(tmp_path):
    save(tmp_path, "a/0.png", "b/1.png", size=(30, 20))
    save(tmp_path, "a/2.png", "b/3.png", size=(20, 40), mode="L")
    with pytest.raises(ValueError, match=r"one size, got \(40, 20, 3\) of .*a/2.png and \(20, 30"):
        data.load("folder", dir=tmp_path)
    splits = data.load("folder", dir=tmp_path, resize=10, crop=8, test=1, validation=1)
    assert splits.image_shape == (8, 8, 3)
    assert data.load("folder", dir=tmp_path, resize=(6, 7), test=1, validation=1).image_shape == (
        6,
        7,
        3,
    )
    with pytest.raises(
        ValueError, match=r"crop must fit .*, got \(21, 20\) for .*0.png of \(20, 30"
    ):
        data.load("folder", dir=tmp_path, crop=(21, 20))


def test_a_photo_is_turned_as_its_camera_was(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png", exif=exif)
    turned = data.load("folder", dir=tmp_path, test=1, validation=1).train.images[0, :, :, 0]
    assert turned.tolist() == [[0, 255]] * 3


def broken(root):
    (root / "a" / "0.png").write_bytes((root / "a" / "0.png").read_bytes()[:40])


def deep(root):
    Image.new("I;16", (5, 4)).save(root / "a" / "0.png")


def csv(text):
    return lambda root: (root / "l.csv").write_text(text)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (broken, {}, r"a/0.png must be an image of 8 bits a channel, got "),
        (deep, {}, r"a/0.png must be an image of 8 bits a channel, got pixels of mode I"),
        (lambda root: (root / "c").mkdir(), {}, "dir must hold images of every class, got none in"),
        (
            lambda root: save(root, "x.png"),
            {},
            r"dir must hold images in .* classes, got .*x.png; or give",
        ),
        (lambda root: (root / "b/1.png").unlink(), {}, r"images of every class, got none in .*b$"),
        (csv("a/0.png,x\na/none.png,y"), {"labels": "l.csv"}, r"line 2 of .*l.csv \(no such file"),
        (csv("a/none.png,x\na/0.png,y"), {"labels": "l.csv"}, r"line 1 of .*l.csv \(no such file"),
        (csv("a/0.png,x\na/0.png,y"), {"labels": "l.csv"}, r"name each file once, .* line 2"),
        (csv("a/0.png\n"), {"labels": "l.csv"}, r"a csv of rows file,label, got \['a/0.png'\] in"),
        (csv("file,label\n"), {"labels": "l.csv"}, r"labels must be a csv .*, got none in "),
        (csv(""), {"labels": "no.csv"}, r"labels must be a csv .*, got 'no.csv' \(no such path"),
        (
            lambda root: (root / "l.csv").write_bytes(b"\xff"),
            {"labels": "l.csv"},
            r"in UTF-8, got ",
        ),
        (csv(""), {"labels": "a"}, r"labels must be a csv .*, got 'a' \(no such path"),
        (csv(""), {"labels": "l.csv", "pattern": "(.)"}, "labels and pattern must not both be"),
        (csv(""), {"masks": "m", "pattern": "(.)"}, "pattern and masks must not both be given"),
        (csv(""), {"masks": "m"}, r"masks must be a directory of label images, got 'm' \(no such"),
        (csv(""), {"pattern": "("}, r"pattern must be a regular expression .*, got '\(' \(missing"),
        (csv(""), {"pattern": "x"}, r"pattern must be .* one group, got 'x' with 0"),
        (csv(""), {"pattern": "([a-f]).png"}, r"that every file's name has, got .* for a/0.png"),
        (csv(""), {"pattern": r"\.(png)"}, r"two classes or more, got \('png',\)"),
        (csv(""), {"class_names": ("a", "c")}, "train labels must be of 2 class names, got 'b'"),
    ],
)
def test_bad_folders_are_named(tmp_path, change, options, message):
    save(tmp_path, "a/0.png", "b/1.png")
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.load("folder", dir=tmp_path, **options)


def save_mask(file, pixels, mode="L"):
    """Writes a label image, of a palette of colours with mode P."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if mode == "P":
        image = image.copy()
        image.putpalette([200, 3, 77] * 256)
    image.convert(mode).save(file)


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("given", [{}, {"memory": 0}], ids=["in memory", "on disk"])
def test_masks_are_labels_of_pixels(tmp_path, mode, given):
    """A void of 255, and parts as directories of both."""
    save(tmp_path / "in", "train/a.jpg", "train/deep/b.bmp", "val/c.png", "test/d.png", size=(3, 2))
    own = [[[i, 255, 0], [0, 2, i]] for i in range(4)]
    for name, pixels in zip(("train/a", "train/deep/b", "val/c", "test/d"), own, strict=True):
        save_mask(tmp_path / "masks" / f"{name}.png", pixels, mode)
    masks = tmp_path / "masks"
    splits = data.load(
        "folder", dir=tmp_path / "in", masks=masks, void=255, class_names="abcd", **given
    )
    assert (splits.label_kind, splits.image_shape) == ("pixels", (2, 3, 3))
    assert np.asarray(splits.train.images)[:, 0, 0, 0].tolist() == [0, 10]
    got = [*splits.train.labels, *splits.validation.labels, *splits.test.labels]
    assert np.array_equal(got, np.where(np.array(own) == 255, -1, own))


def test_masks_are_resized_and_cut_as_their_images(tmp_path):
    save(tmp_path / "in", "a.png", "b.png", "c.png", size=(4, 4))
    for name in "abc":
        save_mask(tmp_path / "masks" / f"{name}.png", [[7, 7, 9, 9]] * 4)
    splits = data.load(
        "folder",
        dir=tmp_path / "in",
        masks=tmp_path / "masks",
        resize=8,
        crop=(2, 6),
        test=1,
        validation=1,
    )
    assert splits.image_shape == (2, 6, 3)
    assert splits.train.labels.tolist() == [[[7] * 3 + [9] * 3] * 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: (m / "b.png").unlink(), r"a label image for each of dir, got no .*b.png for b"),
        (
            lambda m: save_mask(m / "b.png", [[0] * 5] * 3),
            r"size \(4, 5\) of its image, got \(3, 5",
        ),
        (lambda m: save_mask(m / "b.png", [[0] * 5] * 4, "RGB"), "labels of mode RGB, not L, P or"),
        (lambda m: (m / "b.png").write_bytes(b"x"), "b.png must be an image of 8 bits a channel"),
        (lambda m: save_mask(m / "b.png", [[0] * 5] * 4), "train labels must be of two classes"),
    ],
)
def test_bad_masks_are_named(tmp_path, change, message):
    save(tmp_path / "in", "a.png", "b.png", "c.png", "d.png")
    for name in "abcd":
        save_mask(tmp_path / "masks" / f"{name}.png", [[0] * 5] * 4)
    change(tmp_path / "masks")
    with pytest.raises(ValueError, match=message):
        data.load("folder", dir=tmp_path / "in", masks=tmp_path / "masks")


def test_a_mask_lies_as_its_turned_photo(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abcd":
        image = Image.fromarray(np.zeros((2, 3, 3), np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6  # turned by a quarter: 3 rows of 2
        image.save(tmp_path / "in" / f"{name}.png", exif=exif)
        save_mask(tmp_path / "masks" / f"{name}.png", [[0, 1]] * 3)
    given = {"masks": tmp_path / "masks", "test": 1, "validation": 1}
    splits = data.load("folder", dir=tmp_path / "in", **given)
    assert splits.image_shape == (3, 2, 3)
    assert splits.train.labels[0].tolist() == [[0, 1]] * 3


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"dir must hold images \(.jpg, .*\), got"):
        data.load("folder", dir=tmp_path)


def test_a_folder_of_no_train_images(tmp_path):
    save(tmp_path, "val/a/0.png", "test/b/1.png")
    with pytest.raises(ValueError, match="dir must hold train beside test, validation, got"):
        data.load("folder", dir=tmp_path)


def test_a_folder_of_one_class(tmp_path):
    save(tmp_path, "cat/0.png", "cat/1.png")
    with pytest.raises(ValueError, match=r"two classes or more, got \('cat',\)"):
        data.load("folder", dir=tmp_path)


def test_imagenet_images_of_a_networks_own_preprocessing(tmp_path):
    shared = REPOSITORY.parent / "shared" / "imagenet1k"
    root = pathlib.Path(os.environ.get("HYBRID_JAX_IMAGENET", shared))
    if not root.is_dir():
        pytest.skip("no ImageNet images; HYBRID_JAX_IMAGENET may name their directory")
    splits = data.load(
        "folder",
        dir=root,
        pattern=r"^(\d+)_n\d+\.jpg$",
        class_names=[f"class {i}" for i in range(1000)],
        crop=224,
        test=400,
        validation=20,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )
    assert splits.image_shape == (224, 224, 3)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part.labels) for part in parts] == [80, 20, 400]
    # One image of every second of 1,000 classes.
    assert sorted(np.concatenate([part.labels for part in parts])) == list(range(0, 1000, 2))
    batch = np.asarray(data.normalize(splits.test.images[:2], splits.mean, splits.std))
    # EfficientNet-Lite takes (x - 127) / 128.
    np.testing.assert_allclose(batch, (splits.test.images[:2] - 127.0) / 128, atol=1e-6)

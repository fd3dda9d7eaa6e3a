"""Files of strangers: what they declare is not believed, and no memory is taken for it."""

import io
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from hybrid_jax import data

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
LABELS = np.arange(20) % 2


def stored(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def declared(shape):
    """The beginning of a member that says to hold bytes of a shape, and holds none."""
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def archive(path, images, labels=LABELS, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x.npy", images)
        file.writestr("y.npy", stored(labels))
    return path


def patched(path, offset, value):
    """Overwrites a field of every entry of the central directory of a zip file."""
    content, at = bytearray(path.read_bytes()), 0
    while (at := content.find(b"PK\1\2", at)) >= 0:
        content[at + offset : at + offset + len(value)] = value
        at += 4
    path.write_bytes(content)
    return path


def refused(path, message, source="npz"):
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            data.load(source, dir=path)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1
    assert len(str(error.value)) < 800


HUGE = (10**6, 1000, 1000, 1)  # 1 TB
NPZ = {
    "no bytes": (lambda path: archive(path, declared(HUGE)), "must hold 1000000000000 bytes"),
    "few bytes": (lambda path: archive(path, declared(HUGE) + b"1" * 99), "bytes of .*, got 99"),
    "overflow": (lambda path: archive(path, declared((2**62,) * 4)), "x.npy must hold"),
    "less than none": (lambda path: archive(path, declared((-1, 4, 4, 1))), "x.npy must hold -16"),
    "said twice": (
        lambda path: patched(
            archive(path, declared((2**32 - 130, 1, 1, 1))), 24, struct.pack("<I", 2**32 - 2)
        ),
        "x.npy declares 4294967294 bytes, which it has not",
    ),
    "compression": (
        lambda path: patched(archive(path, stored(IMAGES)), 10, struct.pack("<H", 77)),
        "not readable: NotImplementedError",
    ),
    "encrypted": (
        lambda path: patched(archive(path, stored(IMAGES)), 8, b"\1"),
        "not readable: RuntimeError",
    ),
}


@pytest.mark.parametrize("name", NPZ)
def test_what_a_member_declares_takes_no_memory(tmp_path, name):
    made, message = NPZ[name]
    refused(made(tmp_path / "a.npz"), message)


def test_a_damaged_member_is_refused(tmp_path):
    path = archive(tmp_path / "a.npz", stored(IMAGES), compression=zipfile.ZIP_DEFLATED)
    assert data.load("npz", dir=path).num_classes == 2
    whole = path.read_bytes()
    for at in range(60, 300, 20):  # in the deflated images
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        refused(path, r"a\.npz \(not readable: ")


def test_a_label_does_not_make_as_many_classes(tmp_path):
    wrong = np.r_[LABELS[1:], 5 * 10**7]
    refused(archive(tmp_path / "a.npz", stored(IMAGES), wrong), "got 50000000 at index 19")
    pixels = np.full((20, 128, 128), 200_000)
    images = np.zeros((20, 128, 128, 1), np.uint8)
    with pytest.raises(ValueError, match=r"must be in \[0, 100000\), got 200000 at index 0"):
        data.take((images, pixels))


def test_many_classes_take_no_time():
    start = time.process_time()
    labels = np.arange(20_000)
    splits = data.take(
        (np.zeros((20_000, 1, 1, 1), np.uint8), labels), class_names=labels.astype(str)
    )
    assert splits.num_classes == 20_000
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("info", "features"),
    [
        ("", None),
        ("{", None),
        ("[]", None),
        ("null", None),
        ('{"name": 5, "splits": 7}', None),
        ('{"name": "mine", "version": "1.0.0", "fileFormat": "array_record"}', None),
        ('{"name": "mine", "version": "1.0.0", "fileFormat": "array_record"}', "[]"),
        ("[" * 10**5, ""),
    ],
)
def test_a_tfds_info_that_is_empty_or_broken_is_refused(tmp_path, info, features):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(info)
    if features is not None:
        (folder / "features.json").write_text(features)
    refused(tmp_path, "dir must be a directory with a prepared .*, got .*mine/1.0.0 ", "tfds")

"""Arrays in one .npz file, found by their names and shapes."""

import math
import os
import re
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np

from hybrid_jax.data.reading import Source, existing

PARTS = {"train": "train(ing)?", "test": "test(ing)?", "validation": "val(id(ation)?)?"}
IMAGES = ("x", "image", "images", "img", "imgs", "data")
LABELS = ("y", "label", "labels", "target", "targets")
TARGETS = (*LABELS, "mask", "masks", "value", "values")
MOST_DEFLATED = 1032
"""Bytes that one byte of a zip file becomes at most: what DEFLATE can say of 258 in two bits."""
MEDMNIST = [f"{part}_{what}" for part in ("train", "test", "val") for what in ("images", "labels")]


def npz(dir: str | os.PathLike | None, *, keys: Sequence[str] = ()) -> Source:
    """Reads a NumPy .npz file, `dir`, without ever unpickling.

    Images are (n, H, W, C) or (n, H, W), labels (n,) or (n, 1), of integers or class names. Their
    keys are told by shape, and by name where several have it: x_train and y_train, train_images
    and train_labels, images and labels, and so on. Labels of pixels (n, H, W) and values, floats
    (n,) or (n, D), are told by such names alone, or train_masks and train_values. `keys` gives them
    instead: those of images and labels of train, then of test, then of validation.
    """
    arrays = _arrays(dir, keys)
    pairs = list(zip(keys[::2], keys[1::2]))
    found = dict(zip(PARTS, pairs)) if keys else _found(arrays)
    return Source(**{part: tuple(arrays[key] for key in pair) for part, pair in found.items()})


def medmnist(dir: str | os.PathLike | None) -> Source:
    """Reads a MedMNIST file such as bloodmnist.npz, at `dir`."""
    return npz(dir, keys=MEDMNIST)


def _arrays(dir: str | os.PathLike | None, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """What the file holds; of what it would have to unpickle an empty array of objects."""
    expected = "the path of an .npz file"
    path = existing("dir", dir, expected)
    if len(keys) not in (0, 2, 4, 6):
        raise ValueError(f"keys must be two for each of {', '.join(PARTS)}, got {tuple(keys)}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(m.filename.removesuffix(".npy"), m) for m in archive.infolist()]
            arrays = {key: _array(archive, member) for key, member in members}
    except Exception as error:  # a stranger's file may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"dir must be {expected}, got {path} (not readable: {reason})") from error
    lost = [key for key in keys if key not in arrays or arrays[key].dtype == object]
    if lost:
        raise ValueError(
            f"dir must be {expected} with arrays {', '.join(keys)}, got {path} without "
            f"{', '.join(lost)}: {_listed(arrays)}"
        )
    return arrays


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """A member as an array, for which no more memory is taken than its bytes can fill."""
    if member.file_size > MOST_DEFLATED * (member.compress_size + 1):
        raise ValueError(f"{member.filename} declares {member.file_size} bytes, which it has not")
    with archive.open(member) as file:
        first = np.lib.format.read_magic(file) == (1, 0)
        formats = np.lib.format
        read = formats.read_array_header_1_0 if first else formats.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            return np.empty(0, object)
        if (size := math.prod(shape) * dtype.itemsize) != (left := member.file_size - file.tell()):
            raise ValueError(f"{member.filename} must hold {size} bytes of {shape}, got {left}")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _found(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    named = {key: _named(key) for key in arrays}
    if not any(part == "train" for part, _ in named.values()):
        named = {key: (part or "train", word) for key, (part, word) in named.items()}
    found = {}
    for part in PARTS:
        own = {key: arrays[key] for key, (of, _) in named.items() if of == part}
        images = [key for key, array in own.items() if array.ndim in (3, 4)]
        if part != "train" and not images:
            continue
        image = _only(images, named, IMAGES)
        count = len(own[image]) if image else 0
        others = {k: a for k, a in own.items() if k != image and a.shape[:1] == (count,)}
        classes = [k for k, a in others.items() if a.size == count and a.dtype.kind in "iuU"]
        label = _usual(others, named, TARGETS) or _only(classes, named, LABELS)
        if image is None or label is None:
            raise ValueError(
                f"keys must be given where shapes and names leave open which are images and "
                f"labels of {part}, got {_listed(arrays)}"
            )
        found[part] = (image, label)
    return found


def _named(key: str) -> tuple[str | None, str]:
    """The part that a key names, and the word that is left of it."""
    for part, pattern in PARTS.items():
        rest, count = re.subn(pattern, "", key, count=1, flags=re.IGNORECASE)
        if count:
            return part, re.sub("[^a-z]", "", rest.lower())
    return None, re.sub("[^a-z]", "", key.lower())


def _only(keys: list[str], named: dict, words: Sequence[str]) -> str | None:
    """The only key, or the only one of a usual name."""
    return keys[0] if len(keys) == 1 else _usual(keys, named, words)


def _usual(keys: Iterable[str], named: dict, words: Sequence[str]) -> str | None:
    usual = [key for key in keys if named[key][1] in words]
    return usual[0] if len(usual) == 1 else None


def _listed(arrays: dict[str, np.ndarray]) -> str:
    shapes = {
        key: "of Python objects, never unpickled" if a.dtype == object else f"{a.shape} {a.dtype}"
        for key, a in arrays.items()
    }
    return ", ".join(f"{key} {shape}" for key, shape in shapes.items()) or "no array"

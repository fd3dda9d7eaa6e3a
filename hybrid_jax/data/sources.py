"""Where images come from: scikit-learn's digits, a prepared TFDS directory, a MedMNIST file."""

import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from hybrid_jax import core
from hybrid_jax.data.splits import Splits, make_splits, stratified


class Source(NamedTuple):
    """What a source reads: (images, labels) pairs, and its own validation images if it has any."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray] | None = None
    class_names: tuple[str, ...] | None = None


def load(
    name: str,
    *,
    dir: str | os.PathLike | None = None,
    validation: float | None = None,
    seed: int = 0,
    train_size: int | None = None,
    image_shape: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Splits:
    """Loads a data set into memory.

    * 'digits': scikit-learn's 1,797 scans of handwritten digits, 8×8×1, installed with it. Its
      values 0..16 become round(value · 255 / 16). It has no test set of its own: 20 % of it,
      stratified, the same whatever the seed.
    * 'cifar10': TFDS' CIFAR-10, 32×32×3, prepared as array_record. `dir` is the TFDS root, the
      data set's directory in it or one version's. TensorFlow is not needed.
    * 'medmnist': a MedMNIST file such as bloodmnist.npz, at `dir`.

    Args:
      name: One of `SOURCES`.
      dir: Where the data lie; None for 'digits'.
      validation: How many of train to hold out, a fraction below 1 or a whole number. None takes
        the source's own validation images, or 10 % of train where it has none.
      seed: Decides which images are held out.
      train_size: How many train images to keep; None keeps all.
      image_shape: The (H, W, C) that images must have; None takes what the source has.
      class_names: N names; None takes the source's, or numbers.

    Example:
      >>> splits = load('digits', validation=200)
      >>> splits.image_shape, len(splits.train.labels), len(splits.test.labels)
      ((8, 8, 1), 1238, 359)
    """
    source = SOURCES[core.check_choice("name", name, SOURCES)](dir)
    if validation is None:
        validation = source.validation or 0.1
    elif source.validation is not None:
        raise ValueError(
            f"validation must be None for {name!r}, which has validation images of its own, "
            f"got {validation}"
        )
    return make_splits(
        source.train,
        source.test,
        validation,
        seed=seed,
        train_size=train_size,
        image_shape=image_shape,
        class_names=class_names or source.class_names,
    )


def _digits(dir: None) -> Source:
    if dir is not None:
        raise ValueError(f"dir must be None for 'digits', which scikit-learn brings, got {dir!r}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    is_test = np.zeros(len(images), bool)
    is_test[stratified(digits.target, round(0.2 * len(images)), seed=0)] = True
    return Source(
        train=(images[~is_test], digits.target[~is_test]),
        test=(images[is_test], digits.target[is_test]),
        class_names=tuple(map(str, digits.target_names)),
    )


def _cifar10(dir: str | os.PathLike | None) -> Source:
    builder = _tfds_builder("cifar10", dir)
    return Source(
        train=_decode(builder, "train"),
        test=_decode(builder, "test"),
        class_names=tuple(builder.info.features["label"].names),
    )


def _tfds_builder(name: str, dir: str | os.PathLike | None) -> Any:
    expected = f"dir must hold a prepared {name}/<version>/dataset_info.json"
    if dir is None or not pathlib.Path(dir).is_dir():
        raise ValueError(f"{expected}, got {_shown(dir)} (no such directory)")
    root = pathlib.Path(dir)
    found = [*root.glob(f"{name}/*/dataset_info.json"), *root.glob("*/dataset_info.json")]
    found = [file.parent for file in [*found, *root.glob("dataset_info.json")]]
    if not found:
        raise ValueError(f"{expected}, got {_shown(dir)} (no such file in it)")
    import tensorflow_datasets as tfds

    newest = max(found, key=lambda path: tuple(map(int, path.resolve().name.split("."))))
    builder = tfds.builder_from_directory(newest)
    if builder.name != name:
        raise ValueError(f"{expected}, got {_shown(dir)} (holds {builder.name})")
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{expected} in the array_record format, got {builder.info.file_format.value}"
        )
    return builder


def _decode(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow_datasets as tfds
    from PIL import Image

    # Decoding here instead of there spares a log line that recommends another decoder.
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int64)
    chunks = [range(i, min(i + 1000, len(source))) for i in range(0, len(source), 1000)]
    console = Console(stderr=True)
    for chunk in track(chunks, f"Reading {builder.name} {split}", console=console, transient=True):
        for i, example in zip(chunk, source.__getitems__(list(chunk)), strict=True):
            images[i] = np.asarray(Image.open(io.BytesIO(example["image"])))
            labels[i] = example["label"]
    return images, labels


def _medmnist(dir: str | os.PathLike | None) -> Source:
    expected = "dir must be the path of a MedMNIST .npz file"
    if dir is None or not pathlib.Path(dir).is_file():
        raise ValueError(f"{expected}, got {_shown(dir)} (no such file)")
    try:
        with open(dir, "rb") as file, np.load(file) as npz:
            arrays: Mapping[str, np.ndarray] = dict(npz)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{expected}, got {_shown(dir)} (not readable: {error})") from error
    keys = [f"{part}_{what}" for part in ("train", "val", "test") for what in ("images", "labels")]
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ValueError(
            f"{expected} with keys {', '.join(keys)}, "
            f"got {_shown(dir)} without {', '.join(missing)}"
        )
    return Source(
        train=(arrays["train_images"], arrays["train_labels"]),
        validation=(arrays["val_images"], arrays["val_labels"]),
        test=(arrays["test_images"], arrays["test_labels"]),
    )


def _shown(dir: str | os.PathLike | None) -> str:
    return "None" if dir is None else repr(os.fspath(dir))


SOURCES: dict[str, Callable[[str | os.PathLike | None], Source]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "medmnist": _medmnist,
}
"""What `load` knows by name: a function of `dir` that reads everything into memory."""

"""Data sets that TensorFlow Datasets prepared as array_record; TensorFlow is not needed."""

import functools
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hybrid_jax.data.reading import Example, Examples, Source, decode, existing

CHUNK = 256  # examples that are fetched at once


def tfds(dir: str | os.PathLike | None) -> Source:
    """Reads any TFDS data set of one image and one label, prepared as array_record.

    `dir` is the data set's directory, one version's, or a TFDS root that holds no other. It has a
    train part; its test and validation parts are taken where it has them.
    """
    return _source(_builder(dir))


def cifar10(dir: str | os.PathLike | None) -> Source:
    """Reads TFDS' CIFAR-10, 32×32×3, as `tfds` does; the root, `dir`, may hold others beside it."""
    return _source(_builder(dir, "cifar10"))


def _source(builder: Any) -> Source:
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)
    image, label = (
        [key for key, feature in features.items() if isinstance(feature, kind)]
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    )
    if len(image) != 1 or len(label) != 1 or features[image[0]].np_dtype != np.uint8:
        held = {key: type(feature).__name__ for key, feature in features.items()}
        raise ValueError(
            f"dir must hold a data set with one Image of 8 bits and one ClassLabel, got {held}"
        )
    if "train" not in builder.info.splits:
        raise ValueError(f"dir must hold a train part, got {', '.join(builder.info.splits)}")
    parts = {
        name: _examples(builder, name, image[0], label[0])
        for name in ("train", "test", "validation")
        if name in builder.info.splits
    }
    return Source(**parts, class_names=tuple(features[label[0]].names))


def _examples(builder: Any, split: str, image: str, label: str) -> Examples:
    import tensorflow_datasets as tfds

    # Decoding here instead of there spares a log line that recommends another decoder.
    source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    channels = builder.info.features[image].shape[-1]

    def at(numbers: Sequence[int]) -> Iterator[Example]:
        for first in range(0, len(numbers), CHUNK):
            chunk = list(numbers[first : first + CHUNK])
            for i, example in zip(chunk, source.__getitems__(chunk), strict=True):
                name = f"{builder.name} {split} image {i}"
                file = io.BytesIO(example[image])
                yield name, functools.partial(decode, name, file, channels), example[label]

    return Examples(len(source), at)


def _builder(dir: str | os.PathLike | None, name: str = "") -> Any:
    expected = f"a directory with a prepared {name or 'NAME'}/<version>/dataset_info.json"
    root = existing("dir", dir, expected)
    expected = f"dir must be {expected}"
    root = root / name if (root / name).is_dir() else root
    # The version's own directory, the data set's, that of one with configurations, and the root.
    found = [file.parent for up in range(4) for file in root.glob("*/" * up + "dataset_info.json")]
    if not found:
        raise ValueError(f"{expected}, got {dir} (no such file in it)")
    if len(sets := sorted({str(path.parent) for path in found})) > 1:
        raise ValueError(f"{expected} of one data set, got {', '.join(sets)}")
    import tensorflow_datasets as tfds

    newest = max(
        found, key=lambda path: [int(n) for n in re.findall("[0-9]+", path.resolve().name)]
    )
    try:
        builder = tfds.builder_from_directory(newest)
        features = builder.info.features
    except Exception as error:  # what was prepared elsewhere may fail in any way
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{expected}, got {newest} (not readable: {said:.300})") from error
    if features is None or not builder.info.splits:
        raise ValueError(f"{expected}, got {newest} (says nothing of its features, or its parts)")
    if name and builder.name != name:
        raise ValueError(f"{expected}, got {dir} (holds {builder.name})")
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{expected} in the array_record format, got {builder.info.file_format.value}"
        )
    return builder

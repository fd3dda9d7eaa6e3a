"""Where images come from, by name."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hybrid_jax import core
from hybrid_jax.data.folder import folder
from hybrid_jax.data.npz import medmnist, npz
from hybrid_jax.data.reading import Source, read_text
from hybrid_jax.data.splits import Splits, from_arrays
from hybrid_jax.data.tfds import cifar10, tfds


def load(
    name: str,
    *,
    dir: str | os.PathLike | None = None,
    classes: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    test: float | None = None,
    validation: float | str | None = None,
    **options: Any,
) -> Splits:
    """Loads a data set: into memory, or to be read as it is needed, see `memory` of `from_arrays`.

    `classes` is a file of the class names in the order of their numbers, one a line; without it and
    `class_names`, they are the source's, or as `from_arrays` finds them. Without `test` and
    `validation` the source's own are taken if it has any. `options` are what the source takes
    beside `dir`, and the other arguments of `from_arrays`.

    Example:
      >>> splits = load('digits', validation=200)
      >>> splits.image_shape, len(splits.train.labels), len(splits.test.labels)
      ((8, 8, 1), 1238, 359)
    """
    read = SOURCES[core.check_choice("name", name, SOURCES)]
    takes, rest = (list(inspect.signature(f).parameters)[1:] for f in (read, from_arrays))
    for option in options:
        if option not in [*takes, *rest]:
            raise ValueError(
                f"{option} must not be given for {name!r}, which takes {', '.join(['dir', *takes])}"
            )
    if classes is not None:
        if class_names is not None:
            raise ValueError(f"class_names must be None beside classes, got {class_names}")
        class_names = read_classes(classes)
    source = read(dir, **{option: options.pop(option) for option in takes if option in options})
    given = {"test": test, "validation": validation}
    for part, value in given.items():
        own = getattr(source, part)
        if value is not None and own is not None:
            raise ValueError(
                f"{part} must be None for {name!r}, which has {part} images of its own, got {value}"
            )
        given[part] = own if value is None else value
    names = source.class_names if class_names is None else class_names
    return from_arrays(source.train, **given, class_names=names, **options)


def read_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """Reads the class names of a text file, one a line; empty lines count for nothing."""
    text = read_text("classes", path, "a file of class names")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def digits(dir: None) -> Source:
    """Scikit-learn's 1,797 handwritten digits, 8×8×1; 0..16 become round(value · 255 / 16)."""
    if dir is not None:
        raise ValueError(f"dir must be None for 'digits', which scikit-learn brings, got {dir!r}")
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images[..., None] * (255 / 16)).astype(np.uint8)
    return Source((images, found.target), class_names=tuple(map(str, found.target_names)))


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "cifar10": cifar10,
    "tfds": tfds,
    "medmnist": medmnist,
    "npz": npz,
    "folder": folder,
}
"""Every source by name, open to users: `SOURCES['mine'] = f`, f(dir, **options) -> `Source`."""

"""What labels are: classes of images, classes of their pixels, or values."""

import collections
from collections.abc import Sequence

import numpy as np

from hybrid_jax import core

MOST_CLASSES = 100_000
"""That numbers alone may name: one label that is wrong would make as many classes."""


def label_kind(labels: np.ndarray | None) -> str | None:
    """'classes' of images (n,), 'pixels' with classes (n, H, W), 'values' (n, …), or None."""
    if labels is None:
        return None
    return "values" if labels.dtype.kind == "f" else "pixels" if labels.ndim == 3 else "classes"


def shaped(
    name: str, labels: np.ndarray | None, count: int, void: int = core.VOID
) -> np.ndarray | None:
    """Labels of `count` images in one of the shapes that labels have; `core.VOID` for `void`."""
    if labels is None:
        return None
    labels = np.asarray(labels)
    labels = labels.astype(np.uint8) if labels.dtype == bool else labels
    column, kind = labels.shape == (count, 1), labels.dtype.kind
    fits = {"f": labels.ndim == 2, "U": column}.get(kind, column or labels.ndim == 3)
    if labels.shape[:1] != (count,) or not (labels.ndim == 1 or fits):
        raise ValueError(
            f"{name} labels must have shape ({count},) as there are {count} images, or "
            f"({count}, H, W) of integers, or ({count}, D) of floats, "
            f"got {labels.shape} {labels.dtype}"
        )
    if void != core.VOID:
        if label_kind(labels) != "pixels":
            raise ValueError(f"void must be {core.VOID} where pixels have no labels, got {void}")
        wide = np.int32 if labels.dtype.itemsize <= 2 else np.int64
        labels = np.where(labels == void, wide(core.VOID), labels.astype(wide))
    return labels.ravel() if column and kind != "f" else labels


def check_classes(name: str, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns labels as they came if they are classes in [0, N), or void ones of pixels."""
    void = labels == core.VOID if label_kind(labels) == "pixels" else np.bool_(False)
    core.check_labels(name, np.where(void, 0, labels) if void.any() else labels, num_classes)
    return labels


def class_names(labels: np.ndarray | None, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """Those given, or of the train labels; at least two, no two of them alike; None of values."""
    if label_kind(labels) in (None, "values"):
        if given is not None:
            got = "no labels" if labels is None else labels.dtype
            raise ValueError(f"class_names must be None where labels are no classes, got {got}")
        return None
    if given is not None:
        names = tuple(given)
    elif labels.dtype.kind == "U":
        found = np.unique(labels).tolist()
        # As numbers, 10 comes after 9.
        names = tuple(sorted(found, key=int if all(map(str.isdecimal, found)) else None))
    else:
        most = min(labels.size, MOST_CLASSES)
        check_classes("train labels, without class_names,", labels, most)
        names = tuple(map(str, range(int(labels.max()) + 1)))
    name, count = collections.Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise ValueError(f"class_names must differ, got {name!r} twice")
    if len(names) < 2:
        raise ValueError(f"train labels must be of two classes or more, got {names}")
    return names


def numbered(
    name: str, labels: np.ndarray | None, names: tuple[str, ...] | None, numbers: bool
) -> np.ndarray | None:
    """int32 numbers of the classes `names`, text `numbers` too; float32 values without names."""
    if labels is None:
        return None
    if names is None:
        if labels.dtype.kind != "f":
            raise ValueError(f"{name} labels must be floats as in train, got {labels.dtype}")
        core.check_finite(f"{name} labels", labels)
        return labels.astype(np.float32)
    if labels.dtype.kind == "U":
        known = {key: i for i, key in enumerate(names)}
        found, inverse = np.unique(labels, return_inverse=True)
        for label in found.tolist():
            if label not in known and not (numbers and label.isdecimal()):
                raise ValueError(
                    f"{name} labels must be of {len(names)} class names, got {label!r}"
                )
        labels = np.array([known.get(label, label) for label in found.tolist()], np.int64)[inverse]
    labels = check_classes(f"{name} labels", labels, len(names)).astype(np.int32)
    if label_kind(labels) == "pixels":
        alone = np.flatnonzero((labels == core.VOID).all((1, 2)))
        if alone.size:
            raise ValueError(
                f"{name} labels must have a pixel that counts in each image, got none in image "
                f"{alone[0]}"
            )
    return labels

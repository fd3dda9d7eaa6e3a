"""Image files in a directory, labelled by their directories, a csv or their names."""

import csv
import functools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from hybrid_jax.data.reading import (
    Example,
    Examples,
    Source,
    decode,
    decode_labels,
    existing,
    opened,
    read_text,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PARTS = {"train": "train", "test": "test"}
PARTS |= dict.fromkeys(("val", "valid", "validation"), "validation")


def folder(
    dir: str | os.PathLike | None,
    *,
    labels: str | os.PathLike = "",
    pattern: str = "",
    masks: str | os.PathLike = "",
) -> Source:
    """Reads image files: CLASS/*.jpg, *.png and so on in `dir`, or in train, val and test of it.

    Where there are files of other names, `labels` is a csv, by its path or in `dir`, of rows
    `file,label` with or without such a header, each file relative to `dir`; or `pattern` a regular
    expression that is searched in each file's name and whose one group is the label. For classes of
    pixels `masks` is a directory of label images, of one channel or a palette, which has a .png by
    the name of each image: masks/train/a.png for train/a.jpg of `dir`. Colours are three channels,
    and one where all images are grey.
    """
    root = existing("dir", dir, "a directory of images")
    given = {"labels": labels, "pattern": pattern, "masks": masks}
    if len(given := {name: value for name, value in given.items() if value}) > 1:
        values = " and ".join(map(str, given.values()))
        raise ValueError(f"{' and '.join(given)} must not both be given, got {values}")
    if labels:
        known = _by_csv(root, labels)
    else:
        files = sorted(_images(root))
        if not files:
            raise ValueError(f"dir must hold images ({', '.join(EXTENSIONS)}), got {root}")
        if masks:
            known = _by_masks(files, existing("masks", masks, "a directory of label images"))
        else:
            known = _by_pattern(files, pattern) if pattern else _by_directory(root, files)
    depth = _depth(known)
    parts = {}
    for file, label in known.items():
        parts.setdefault(PARTS[file.parts[0]] if depth else "train", {})[file] = label
    if "train" not in parts:
        raise ValueError(f"dir must hold train beside {', '.join(parts)}, got {root}")
    grey = all(_is_grey(root / file) for file in known)
    return Source(**{name: _examples(root, part, 1 if grey else 3) for name, part in parts.items()})


def _examples(
    root: pathlib.Path, labels: dict[pathlib.Path, str | pathlib.Path], channels: int
) -> Examples:
    paths = [str(root / file) for file in labels]
    found = list(labels.values())

    def at(numbers: Sequence[int]) -> Iterator[Example]:
        for i in numbers:
            path, label = paths[i], found[i]
            if isinstance(label, pathlib.Path):
                label = functools.partial(decode_labels, str(label), label, path)
            yield path, functools.partial(decode, path, path, channels), label

    return Examples(len(paths), at)


def _images(root: pathlib.Path) -> list[pathlib.Path]:
    """Relative paths; hidden files, which some systems lay beside each image, are left out."""
    files = (file.relative_to(root) for file in root.rglob("*"))
    return [file for file in files if file.suffix.lower() in EXTENSIONS and not _is_hidden(file)]


def _depth(files: dict | list) -> int:
    """At which depth the classes are: 1 below train, test and so on, or 0."""
    tops = {file.parts[0] if len(file.parts) > 1 else "" for file in files}
    return int(tops <= set(PARTS))


def _by_directory(root: pathlib.Path, files: list[pathlib.Path]) -> dict[pathlib.Path, str]:
    depth = _depth(files)
    for file in files:
        if len(file.parts) < depth + 2:
            raise ValueError(
                f"dir must hold images in directories of their classes, got {root / file}; "
                "or give labels or pattern"
            )
    filled = {root.joinpath(*file.parts[: depth + 1]) for file in files}
    for directory in sorted(root.glob("*/*" if depth else "*")):
        hidden = _is_hidden(directory.relative_to(root))
        if directory.is_dir() and directory not in filled and not hidden:
            raise ValueError(f"dir must hold images of every class, got none in {directory}")
    return {file: file.parts[depth] for file in files}


def _by_pattern(files: list[pathlib.Path], pattern: str) -> dict[pathlib.Path, str]:
    expected = "pattern must be a regular expression with one group"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{expected}, got {pattern!r} ({error})") from error
    if compiled.groups != 1:
        raise ValueError(f"{expected}, got {pattern!r} with {compiled.groups}")
    matches = {file: compiled.search(file.name) for file in files}
    for file, match in matches.items():
        if not match or not match[1]:
            raise ValueError(f"{expected} that every file's name has, got {pattern!r} for {file}")
    return {file: match[1] for file, match in matches.items()}


def _by_masks(files: list[pathlib.Path], masks: pathlib.Path) -> dict[pathlib.Path, pathlib.Path]:
    known = {file: masks / file.with_suffix(".png") for file in files}
    for file, mask in known.items():
        if not mask.is_file():
            raise ValueError(
                f"masks must hold a label image for each of dir, got no {mask} for {file}"
            )
    return known


def _by_csv(root: pathlib.Path, labels: str | os.PathLike) -> dict[pathlib.Path, str]:
    expected = "a csv of rows file,label"
    path = root / labels if (root / labels).is_file() else labels
    lines = read_text("labels", path, expected).splitlines()
    rows = [
        (i, [cell.strip() for cell in row]) for i, row in enumerate(csv.reader(lines), 1) if row
    ]
    if rows and pathlib.Path(rows[0][1][0]).suffix.lower() not in EXTENSIONS:
        rows = rows[1:]  # a header
    known = {}
    for line, row in rows:
        at = f"got {row} in line {line} of {path}"
        if len(row) != 2 or not all(row):
            raise ValueError(f"labels must be {expected}, {at}")
        name = pathlib.Path(row[0])
        if not (root / name).is_file():
            raise ValueError(f"labels must name files in {root}, {at} (no such file)")
        if name in known:
            raise ValueError(f"labels must name each file once, {at}")
        known[name] = row[1]
    if not known:
        raise ValueError(f"labels must be {expected}, got none in {path}")
    return known


def _is_grey(path: pathlib.Path) -> bool:
    with opened(str(path), path) as image:
        return image.mode in ("1", "L", "LA")


def _is_hidden(file: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in file.parts)

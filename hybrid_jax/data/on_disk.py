"""Images that do not fit into memory: read by grain's threads when they are indexed."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

CHUNK = 16  # images that a thread reads at once

T = TypeVar("T")


class OnDisk:
    """Images (n, H, W, C) uint8 that indexing reads, by `read(numbers)` -> images (H, W, C)."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(
        self,
        read: Callable[[Sequence[int]], list[np.ndarray]],
        numbers: np.ndarray,
        image_shape: tuple[int, ...],
    ):
        self.read, self.numbers, self.shape = read, numbers, (len(numbers), *image_shape)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = self.numbers[index]
        if np.ndim(chosen) == 0:
            return self.read([int(chosen)])[0]
        chunks = [chosen[i : i + CHUNK].tolist() for i in range(0, len(chosen), CHUNK)]
        images = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        for i, found in enumerate(read_ahead(lambda i: self.read(chunks[i]), range(len(chunks)))):
            images[i * CHUNK :][: len(found)] = found
        return images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def part(self, index: np.ndarray) -> "OnDisk":
        """Those at `index`, unread."""
        return OnDisk(self.read, self.numbers[index], self.shape[1:])


def read_ahead(
    read: Callable[[int], T], numbers: range, threads: int | None = None, ahead: int = 64
) -> Iterator[T]:
    """Maps `read` over `numbers` in order, by threads, one a core, up to `ahead` of the asking."""
    if not numbers:
        return iter(())
    import grain  # takes most of a second

    options = grain.ReadOptions(threads or os.cpu_count() or 1, ahead)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
    return iter(dataset.to_iter_dataset(options))

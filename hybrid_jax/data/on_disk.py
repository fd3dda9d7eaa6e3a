"""Images that do not fit into memory: read by grain's threads when they are indexed."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

CHUNK = 16  # images that a thread reads at once

T = TypeVar("T")


class OnDisk:
    """Images (n, H, W, C) uint8 that indexing reads: by a number, a slice or an array of numbers.

    `read` gives the images (H, W, C) at some numbers, of which `numbers` (n,) are those there are.

    Example:
      >>> def read(numbers):
      ...     return [np.full((2, 2, 1), i, np.uint8) for i in numbers]
      >>> images = OnDisk(read, np.arange(5), (2, 2, 1))
      >>> images.shape, images.part(np.array([4, 2, 0]))[:2].mean((1, 2, 3)).tolist()
      ((5, 2, 2, 1), [4.0, 2.0])
    """

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
    """Maps `read` over `numbers`, in order, up to `ahead` of them before they are asked for.

    `threads` do it; None takes one for each core.
    """
    if not numbers:
        return iter(())
    import grain  # takes most of a second

    options = grain.ReadOptions(threads or os.cpu_count() or 1, ahead)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
    return iter(dataset.to_iter_dataset(options))

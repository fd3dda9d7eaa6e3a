"""What compressed networks learn from: a teacher at each step, or what it said of images before."""

import functools
import io
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from hybrid_jax import core, data, models, training
from hybrid_jax.core import versions


class Taught(NamedTuple):
    """One of both is None.

    Attributes:
      teach: (images (B, H, W, C) as a network takes them) -> outputs (B, …), run at each step.
      answers: To V views of all n training images, (V, n, …) float32.
    """

    teach: Callable[[jax.Array], jax.Array] | None = None
    answers: np.ndarray | None = None

    def entries(self, batch: Mapping[str, np.ndarray], epoch: int) -> dict[str, np.ndarray]:
        """Returns what an epoch's batch has besides: each epoch shows the next view."""
        if self.answers is None:
            return {}
        view = epoch % len(self.answers)
        return {
            "view": number(batch["index"], view, self.answers.shape[1]),
            "teacher": self.answers[view, batch["index"]],
        }


UNTAUGHT = Taught()
"""By labels alone."""


def number(index: np.ndarray, view: int, count: int) -> np.ndarray:
    """The number of a view of images (B,) of `count`, as `training.of_views` takes it."""
    return (view * count + index).astype(np.uint32)


def answers(
    network: models.Network,
    arrays: data.Arrays,
    augment: Callable,
    views: int,
    folder: core.Path,
    whose: str,
    batch_size: int,
) -> np.ndarray:
    """Returns what a network says of `views` augmentations of each image, (views, n, …) float32.

    The network takes what `augment` returns, uint8 as the images, so that it is the same anywhere.
    Each view is a file of `folder`, by a name that changes with the network, the images, their
    augmentation and `whose`; what is there and whole is not computed again.

    Source: Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition,
    arXiv 2112.01528, which keeps the answers to crops.
    """
    seen = training.of_views(augment)
    few = np.arange(min(len(arrays.images), 64))
    shown = np.asarray(jax.jit(seen)(arrays.images[few], few.astype(np.uint32)))
    key = core.digest([network.params, shown, np.frombuffer(whose.encode(), np.uint8)])[:16]

    @functools.partial(jax.jit, compiler_options=versions.run_often())
    @core.fast_convolutions
    def answer(params, images, view):
        return network.predict(params, seen(images, view))

    answered = functools.partial(answer, network.params)
    each = [functools.partial(_view, answered, arrays, view, batch_size) for view in range(views)]
    return np.stack([_kept(folder / f"{key}-{view}", make) for view, make in enumerate(each)])


def _view(answer, arrays, view, batch_size) -> np.ndarray:
    """The answers to one view; the last batch is filled up, so that all are of one program."""
    count = len(arrays.images)
    made = []
    for first in training.track(range(0, count, batch_size), f"teacher, view {view}"):
        index = np.minimum(np.arange(first, first + batch_size), count - 1)
        made.append(np.asarray(answer(arrays.images[index], number(index, view, count))))
    return np.concatenate(made)[:count]


def _kept(path: core.Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of a file, made where it is not as it was written; the first process makes it."""
    array, seal = path.with_suffix(".npy"), path.with_suffix(".json")

    def read() -> np.ndarray:
        with array.open("rb") as file:
            return np.load(file, allow_pickle=False)

    def written() -> str:
        try:
            digest = core.read_sealed(seal)["digest"]
            if digest == core.digest(read()):
                return digest
        except (OSError, ValueError, EOFError, KeyError):
            pass
        made, content = make(), io.BytesIO()
        np.save(content, made)
        core.write_atomically({array: content.getvalue()})
        core.write_sealed(seal, {"digest": core.digest(made)})
        return core.digest(made)

    digest = core.of_first(written)
    made = read()
    if core.digest(made) != digest:
        raise ValueError(f"teacher.answers must be a directory that all see, got {path.parent}")
    return made

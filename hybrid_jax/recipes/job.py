"""One run of the method: its configuration, data and directory, and what every stage asks of it."""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from hybrid_jax import core, data, training


class Network(NamedTuple):
    """A network as every stage handles it: two functions of one variables dict.

    Attributes:
      predict: (variables, images (B, H, W, C) float32) -> logits (B, N), with running statistics.
      train: (variables, images) -> (logits, {'batch_stats': …}), with those of the batch.
    """

    predict: Callable[[Any, jax.Array], jax.Array]
    train: Callable[[Any, jax.Array], tuple[jax.Array, dict]]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What a run is made of.

    Everything is written in `workdir`. Only `evaluation` reads the test part of `splits`. The
    command line, `command`, is for the report.
    """

    config: ConfigDict
    workdir: pathlib.Path
    splits: data.Splits
    command: str

    def key(self, name: str) -> jax.Array:
        """Returns the random key of the stage `name`."""
        return jax.random.fold_in(jax.random.key(self.config.seed), _number(name))

    def init(self, module: nn.Module, name: str) -> Any:
        """Returns the variables that `module` starts with."""
        # XLA's own generator: the default one takes longer to compile than a small network.
        key = jax.random.key(self.config.seed, impl="rbg")
        images = jnp.zeros(self.images.shape, self.images.dtype)
        return jax.jit(module.init)(jax.random.fold_in(key, _number(name)), images)

    def seed(self, name: str) -> int:
        """Returns the seed of the data order of the stage `name`."""
        return (self.config.seed * 1_000_003 + _number(name)) % 2**31

    @functools.cached_property
    def choices(self) -> core.Choices:
        """What was measured in this run, which holds when it goes on."""
        return core.Choices(self.workdir / "choices.json")

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """The shape of one image, as a batch of 1."""
        return jax.ShapeDtypeStruct((1, *self.splits.image_shape), jnp.float32)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Turns (B, H, W, C) uint8 into what a network takes."""
        return data.normalize(images, self.splits.mean, self.splits.std)

    @functools.cached_property
    def augment(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(images (B, H, W, C) uint8, key) -> augmented images as a network takes them."""
        settings = self.config.data
        augment = data.augmentation(settings.padding, settings.flip, settings.augment)
        return lambda images, key: self.normalize(augment(images, key))

    def start(
        self, name: str, params: Any, state: Any, tx: optax.GradientTransformation
    ) -> training.TrainState:
        """Returns the state before the first step of the stage `name`, made by one program.

        The other arguments are those of `training.create_state`.
        """
        key = self.key(name)
        return jax.jit(lambda *parts: training.create_state(*parts, tx, key))(params, state)

    def fit(
        self,
        name: str,
        step: Callable,
        state: training.TrainState,
        steps: int,
        batch_size: int,
        weights: np.ndarray | None = None,
        **options: Any,
    ) -> training.TrainState:
        """Trains the stage `name`, or goes on from its checkpoint.

        The name decides the order of the data. `weights` (E, n), of each training image for each
        expert, become batch['weight'] (E, B); `options` are for `training.fit`.
        """
        return training.fit(
            step,
            state,
            self.batches(name, batch_size, weights),
            steps=steps,
            name=name,
            **self.bookkeeping(name),
            **options,
        )

    def batches(
        self, name: str, batch_size: int, weights: np.ndarray | None = None
    ) -> Callable[[int], Iterator[dict]]:
        """Returns the batches of the stage `name` from a first step on; arguments as of `fit`."""
        train = self.splits.train
        size = min(batch_size, len(train.labels))

        def batches(first: int) -> Iterator[dict]:
            for batch in data.batches(train, size, seed=self.seed(name), start_step=first):
                own = {} if weights is None else {"weight": weights[:, batch["index"]]}
                yield batch | own

        return batches

    def bookkeeping(self, name: str) -> dict[str, Any]:
        """Returns where `training.fit` keeps the checkpoints and records of the stage `name`."""
        return {
            "checkpoint": training.Checkpoints(self.workdir / "checkpoints" / name),
            "records": self.workdir / "records.jsonl",
            "every": self.config.checkpoint_every,
        }

    def sample(self, batch_size: int, count: int) -> Iterator[jax.Array]:
        """Yields `count` batches of training images, normalized, not augmented, always the same."""
        train = self.splits.train
        size = min(batch_size, len(train.labels))
        for batch in data.batches(train, size, seed=self.config.seed, steps=count):
            yield self.normalize(batch["image"])

    def logits(self, predict: Callable, params: Any, arrays: data.Arrays) -> np.ndarray:
        """Returns the logits (n, N), or (E, n, N); `predict` is compiled once if it is kept."""
        size = self.config.evaluation.batch_size
        return training.predict_logits(self._on_raw(predict), params, arrays, size, fill=True)

    @functools.cached_property
    def _on_raw(self) -> Callable[[Callable], Callable]:
        @functools.cache
        def on_raw(predict):
            return lambda params, images: predict(params, self.normalize(images))

        return on_raw


def optimizer(
    learning_rate: float, weight_decay: float, steps: int, first: int = 0
) -> optax.GradientTransformation:
    """AdamW with a tenth of warm-up and a cosine to zero; kernels alone decay.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.

    `learning_rate` is that of the peak, and `weight_decay` per step and unit of it. It goes on with
    the schedule after its `first` steps.
    """
    whole = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)

    def schedule(count):
        return whole(count + first)

    def kernels(params):
        return core.map_with_path(lambda path, leaf: path.endswith("kernel"), params)

    # Flattened to one vector: a few operations to compile and to launch, instead of a few per leaf.
    adam = optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()))
    decay = optax.add_decayed_weights(weight_decay, mask=kernels)
    return optax.chain(adam, decay, optax.scale_by_learning_rate(schedule))


def _number(name: str) -> int:
    return zlib.crc32(name.encode())

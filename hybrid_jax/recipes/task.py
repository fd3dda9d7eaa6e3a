"""What a user brings to a run, and what every stage asks of it: data in order, keys, training."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hybrid_jax import core, data, models, training
from hybrid_jax.recipes import workdir
from hybrid_jax.recipes.cut import Cut, Model
from hybrid_jax.recipes.taught import UNTAUGHT, Taught, answers

RESIDENT = 2**31
"""Bytes of training images that are kept on an accelerator."""

PIXELS = 2**21
"""Of all images that networks are checked on, of which there are 8 to 512."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A network to compress, and the images that it is compressed for.

    Attributes:
      network: The user's, with the variables that it came with.
      splits: Its images; only the evaluation at the end reads the test images.
      workdir: Where checkpoints, records and results of the run lie.
      objective: Loss, score and confidence.
      augment: Of images (B, H, W, C) uint8, and of what labels move along.
      seed: Of everything that is drawn.
      checkpoint_every: Steps between checkpoints, of which there is one every two minutes too.
      batch_size: Of evaluation.
      judged_on: The part of `splits` that judges what was made.
      teacher: What compressed networks learn from; None for the parent.
      views: Augmentations of each image, of which the teacher answers once; 0 for new ones.
      answers: The directory of these answers.
      members: Compressed networks of finished runs, to be the experts of a mixture.
      given: Whether the network came with its weights.
      labelled: Whether labels came with the images, and are not what the network says of them.
      devices: What trains and evaluates, in all processes; () is the default device alone.
      precision: The dtype that networks are trained in before they are as deployed.
    """

    network: models.Network
    splits: data.Splits
    workdir: core.Path
    objective: training.Objective
    augment: data.Augmentation = dataclasses.field(default_factory=data.augmentation)
    seed: int = 0
    checkpoint_every: int = 500
    batch_size: int = 256
    judged_on: str = "test"
    teacher: models.Network | None = None
    views: int = 0
    answers: core.Path | None = None
    members: tuple[Model, ...] = ()
    given: bool = True
    labelled: bool = True
    devices: Sequence[jax.Device] = ()
    precision: str = "float32"

    @property
    def judged(self) -> data.Arrays:
        """The images that everything which was made is judged by: those of `judged_on`."""
        return getattr(self.splits, self.judged_on)

    @property
    def whose(self) -> str:
        """What tells the run from others, once the directory is its own."""
        return workdir.whose(self.workdir)

    def key(self, name: str) -> jax.Array:
        """Returns the random key of the stage `name`."""
        return jax.random.fold_in(jax.random.key(self.seed), _number(name))

    def init_key(self, name: str) -> jax.Array:
        """Returns the random key of the weights that the network `name` starts from."""
        # XLA's own generator: the default one takes longer to compile than a small network.
        return jax.random.fold_in(jax.random.key(self.seed, impl="rbg"), _number(name))

    @functools.cached_property
    def choices(self) -> core.Choices:
        """What was measured in this run, which holds when it goes on."""
        return core.Choices(self.workdir / "choices.json")

    @property
    def image(self) -> jax.ShapeDtypeStruct:
        """The shape of one image, as a batch of 1."""
        return jax.ShapeDtypeStruct((1, *self.splits.image_shape), jnp.float32)

    @functools.cached_property
    def images(self) -> jax.Array:
        """Training images (B, H, W, C) as a network takes them, always the same."""
        height, width, _ = self.splits.image_shape
        count = min(max(PIXELS // (height * width), 8), 512)
        return self.normalize(self.splits.train.images[:count])

    @functools.cached_property
    def parent(self) -> Model:
        """The network as it came, as stages take it."""
        return Model(Cut(self.network, self.images, self.network.params))

    def normalize(self, images: jax.Array) -> jax.Array:
        """Turns (B, H, W, C) uint8 into what a network takes."""
        return data.normalize(images, self.splits.mean, self.splits.std)

    @functools.cached_property
    def augmented(self) -> data.Augmentation:
        """Turns (B, H, W, C) uint8 into what a network is trained on, and moves labels along."""
        return data.Augmentation(
            lambda images, key: self.normalize(self.augment(images, key)), self.augment.labels
        )

    def loss(self, forward: Callable, alpha: float = 0.0) -> Callable:
        """Returns the loss function of a step, of which `alpha` is the teacher's share."""
        return training.loss_of(forward, self.objective, alpha)

    def computed(self, forward: Callable) -> Callable:
        """Returns the forward function of a step in `precision`, but for ranges."""
        if self.precision == "float32":
            return forward

        def run(params, state, images, key):
            def own(weights, *others):
                return forward({**params, "params": weights}, *others)

            computed = training.compute_in(own, jnp.dtype(self.precision))
            return computed(params["params"], state, images, key)

        return run

    def taught(self, parent: Model) -> Taught:
        """Returns what compressed networks learn from: the teacher, or where there is none this."""
        own = self.teacher or parent.cut.network._replace(params=parent.cut.variables)
        if not self.views:
            return Taught(functools.partial(own.predict, own.params))
        whose, where = workdir.digest(self.splits), self.answers or self.workdir / "teacher"
        raw = own._replace(predict=self._on_raw(own.predict))
        arguments = (raw, self.splits.train, self.augment, self.views)
        return Taught(answers=answers(*arguments, where, whose, self.batch_size))

    def start(
        self, name: str, params: Any, state: Any, tx: optax.GradientTransformation
    ) -> training.TrainState:
        """Returns the state before the first step of the stage `name`, made by one program.

        The other arguments are those of `training.create_state`.
        """
        key = self.key(name)
        return jax.jit(lambda *parts: training.create_state(*parts, tx, key))(params, state)

    def mesh(self, batch_size: int, count: int = 1, local: bool = False) -> Mesh | None:
        """Returns the mesh for batches of this size and `count` stacked networks.

        None where they run on one device. `local` is of the devices of this process alone, on which
        it does what needs no others.
        """
        own = [d for d in self.devices if not local or d.process_index == jax.process_index()]
        return training.fitting_mesh(batch_size, count, own) if own else None

    def fit(
        self,
        name: str,
        step: Callable,
        state: training.TrainState,
        steps: int,
        batch_size: int,
        weights: np.ndarray | None = None,
        taught: Taught = UNTAUGHT,
        **options: Any,
    ) -> training.TrainState:
        """Trains the stage `name`, or goes on from its checkpoint.

        The name decides the order of the data. `weights` (E, n), of each training image for each
        expert, become batch['weight'] (E, B); what was `taught` before is added to batches as well.
        `options` are for `training.fit`. On several devices a stack is divided by expert and each
        batch by example; what is returned is on one again.
        """
        size = self._batch(batch_size)
        mesh = self.mesh(size, *np.shape(state.step))
        scan = on_accelerator()
        resident = self._resident(mesh) if scan else {}
        state = training.fit(
            step,
            state if mesh is None else training.place_state(state, mesh),
            self.batches(name, batch_size, weights, taught, mesh, resident),
            steps=steps,
            name=name,
            checkpoint=training.Checkpoints(
                self.workdir / "checkpoints" / name, whose=f"{self.whose} {name}"
            ),
            records=self.workdir / "records.jsonl",
            every=self.checkpoint_every,
            scan=scan,
            resident=resident,
            **options,
        )
        return core.gathered(state)

    def batches(
        self,
        name: str,
        batch_size: int,
        weights: np.ndarray | None = None,
        taught: Taught = UNTAUGHT,
        mesh: Mesh | None = None,
        resident: Collection[str] = (),
    ) -> Callable[[int], Iterator[dict]]:
        """Returns the batches of the stage `name` from a first step on; arguments as of `fit`.

        They lack what is `resident` on the device.
        """
        size, seed = self._batch(batch_size), (self.seed * 1_000_003 + _number(name)) % 2**31
        rows = training.own_rows(mesh, size)

        def batches(first: int) -> Iterator[dict]:
            train = self.splits.train
            if resident:
                train = train._replace(images=train.images[:, :0])
            given = data.batches(train, size, seed=seed, start_step=first, rows=rows)
            for step, batch in enumerate(given, first):
                own = {} if weights is None else {"weight": weights[:, batch["index"]]}
                batch = batch | own | taught.entries(batch, step // self.epoch(size))
                batch = {key: leaf for key, leaf in batch.items() if key not in resident}
                yield batch if mesh is None else training.shard_batch(batch, mesh, own, size)

        return batches

    def _resident(self, mesh: Mesh | None) -> dict[str, jax.Array]:
        """The training images on the device, or on all, if they have room there."""
        images = self.splits.train.images
        if not isinstance(images, np.ndarray) or images.nbytes > RESIDENT:
            return {}
        own = {"image": images}
        return jax.device_put(own) if mesh is None else training.replicate(own, mesh)

    def _batch(self, batch_size: int) -> int:
        """As many, or all training images where there are fewer."""
        return min(batch_size, len(self.splits.train.images))

    def epoch(self, batch_size: int) -> int:
        """Returns how many steps are one pass over the training images."""
        return max(1, len(self.splits.train.labels) // batch_size)

    def sample(self, batch_size: int, count: int) -> Iterator[jax.Array]:
        """Yields `count` batches of training images, normalized, not augmented, always the same.

        They are divided among the devices of this process; what is made of them comes back to one
        by `core.gathered`.
        """
        size = self._batch(batch_size)
        mesh = self.mesh(size, local=True)
        for batch in data.batches(self.splits.train, size, seed=self.seed, steps=count):
            own = {"image": batch["image"]}
            own = own if mesh is None else training.shard_batch(own, mesh)
            yield self.normalize(own["image"])

    def outputs(self, predict: Callable, params: Any, arrays: data.Arrays) -> np.ndarray:
        """Returns the outputs (n, ...); `predict` is compiled once if it is kept."""
        mesh = self.mesh(self.batch_size)
        return training.predict_logits(
            self._on_raw(predict), params, arrays, self.batch_size, fill=True, mesh=mesh
        )

    def score(self, outputs: np.ndarray, arrays: data.Arrays) -> np.ndarray:
        """Returns how good each output is, (n,): of a class whether it is right."""
        return np.asarray(self._score(outputs, arrays.labels))

    def scores(self, made: Sequence[Any], arrays: data.Arrays) -> np.ndarray:
        """Returns the scores (E, n) of deployed models."""
        each = [self.outputs(model.fn, model.params, arrays) for model in made]
        return np.stack([self.score(outputs, arrays) for outputs in each])

    @functools.cached_property
    def _score(self) -> Callable:
        return jax.jit(self.objective.score)

    @functools.cached_property
    def _on_raw(self) -> Callable[[Callable], Callable]:
        @functools.cache
        def on_raw(predict):
            return lambda params, images: predict(params, self.normalize(images))

        return on_raw


def on_accelerator() -> bool:
    """Whether steps are to be one program with the images beside it: a CPU has nothing of it."""
    return jax.default_backend() != "cpu"


def _number(name: str) -> int:
    return zlib.crc32(name.encode())

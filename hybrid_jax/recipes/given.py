"""What a call or a configuration gives, as a run takes it; what is wrong with it names it."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from hybrid_jax import core, data, models, training
from hybrid_jax.recipes import schema
from hybrid_jax.recipes.budget import Budget
from hybrid_jax.recipes.cut import Model
from hybrid_jax.recipes.sections import Config
from hybrid_jax.recipes.state import State

PATHS = ("dir", "labels", "masks", "classes")
"""Keys of config.data that may begin with ~."""

AUGMENTATION = ("padding", "flip", "augment")
"""Keys of config.data that decide nothing of which images there are."""


def images(images: Any, settings: Any) -> data.Splits:
    """Returns the images of a call, as config.data says to take them; splits are taken already."""
    images = data.gathered(images)
    if isinstance(images, data.Splits):
        return images
    names = ["seed", "train_size", "resize", "crop", "image_shape", "class_names", "mean", "std"]
    names += ["void"]
    if isinstance(images, tuple) and len(images) == 2:
        names += ["test", "validation"]  # of which none was given
    given = {name: getattr(settings, name) for name in names}
    return data.take(images, **_told(given))


def _told(given: dict[str, Any]) -> dict[str, Any]:
    """What is not left to the source: void labels may be 0."""
    return {k: value for k, value in given.items() if k == "void" or value not in ("", (), 0)}


def network(
    network: Any, few: Any, mode: str | None, seed: int, name: str = "network"
) -> models.Network:
    """Returns the network of a call; what is wrong with it names the argument, and the images."""
    if name == "teacher" and isinstance(network, nn.Module):
        raise ValueError("teacher must be a trained network, got a module without variables")
    try:
        return models.take(network, few, mode, seed)
    except (TypeError, ValueError) as error:
        what, _, rest = str(error).partition(" ")
        known = {"given": name, "training": "training_mode"}
        said = f"{known.get(what, what)} {rest} (for images of shape {few.shape[1:]})"
        raise ValueError(said) from error


def load(settings: Any) -> data.Splits:
    """Returns the images that config.data says."""
    given = _told(
        {k: value for k, value in dataclasses.asdict(settings).items() if k not in AUGMENTATION}
    )
    paths = {k: str(pathlib.Path(given[k]).expanduser()) for k in PATHS if k in given}
    try:
        splits = data.load(**{**given, **paths})
        core.check_integer("padding", settings.padding, 0, min(splits.image_shape[:2]) - 1)
    except ValueError as error:
        raise ValueError(f"config.data: {error}") from error
    return splits


def teacher(settings: Any, splits: data.Splits) -> Any:
    """Returns the network that config.teacher says; None where it names none."""
    if not (settings.name or settings.make):
        if settings.weights:
            raise ValueError("config.teacher.weights must be given with teacher.name or make")
        return None
    return of_section("teacher", settings, splits)


def member(i: int, made: State) -> Model:
    """Returns the network that a run made, as the expert of another."""
    if len(made.experts) != 1:
        raise ValueError(
            f"members[{i}] must be a run of one compressed network, got {len(made.experts)}"
        )
    (model,) = made.experts
    return model._replace(cut=dataclasses.replace(model.cut, origin=f"member {i}"))


def of_section(section: str, settings: Any, splits: data.Splits) -> Any:
    """Returns the network that a section of the configuration says, as `models.take` takes it."""
    table = None
    overrides = {"widths": settings.widths, "shortcut": settings.shortcut}
    overrides = {key: value for key, value in overrides.items() if value}
    if settings.make:
        for key, value in overrides.items():
            raise ValueError(
                f"config.{section}.{key} must not be given beside make, which makes the network "
                f"as it is, got {value!r}"
            )
        given = models.make(settings.make)
    else:
        table = settings.name if settings.name in models.tables.names() else None
        try:
            given = models.create(settings.name, splits.num_classes, **overrides)
        except ValueError as error:
            raise ValueError(f"config.{section}: {error}") from error
    if not settings.weights:
        return given
    image = jax.ShapeDtypeStruct((1, *splits.image_shape), np.float32)
    network = models.take(given, image, settings.training or None, seed=None)
    try:
        params = models.restore(network, pathlib.Path(settings.weights).expanduser(), table)
    except (ValueError, OSError) as error:
        raise ValueError(f"config.{section}.weights: {error}") from error
    return network._replace(params=params)


def config_of(config, budget, effort, targets) -> Config:
    """Returns the configuration with what the call says, checked."""
    if not (budget is None or isinstance(budget, Budget)):
        raise ValueError(f"budget must be a Budget, got {budget!r}")
    if isinstance(targets, str):
        raise ValueError(f"targets must be a sequence of names, got {targets!r}")
    config = schema.default_config() if config is None else config
    values = schema.flatten(config)
    if budget is not None:
        asked = dataclasses.asdict(budget)
        values |= {f"budget.{name}": value for name, value in asked.items() if value is not None}
    if isinstance(effort, str):
        values["effort"] = effort
    if targets is not None:
        values["deploy.targets"] = tuple(targets)
    return schema.read(values)


def objective(loss, metric, confidence, splits, temperature) -> training.Objective:
    """Returns it by its name, or as labels tell, with the user's own functions if there are any."""
    usual = "classification" if splits.num_classes else "regression"
    name = loss if isinstance(loss, str) and loss else usual
    options = {"temperature": temperature} if name == "classification" else {}
    core.check_choice("loss", name, training.OBJECTIVES)
    own = loss if callable(loss) else None
    return training.objective(name, loss=own, metric=metric, confidence=confidence, **options)


def augmentation(settings: Any, splits: data.Splits) -> Callable:
    """Returns that of the configuration, without shifts where labels are of coarser pixels."""
    moves = splits.label_kind != "pixels" or splits.train.labels.shape[1:] == splits.image_shape[:2]
    padding, flip = (settings.padding, settings.flip) if moves else (0, False)
    return data.augmentation(padding, flip, settings.augment, label_kind=splits.label_kind)


def labelled(network: models.Network, splits: data.Splits) -> data.Splits:
    """Returns the splits with what the network says as labels, which files are to repeat."""
    images = data.normalize(splits.train.images[:], splits.mean, splits.std)
    outputs = np.asarray(jax.jit(network.predict)(network.params, images))
    classes = outputs.ndim in (2, 4)
    labels = outputs.argmax(-1).astype(np.int32) if classes else outputs.astype(np.float32)
    names = tuple(map(str, range(outputs.shape[-1]))) if classes else None
    part = data.Arrays(splits.train.images, labels)
    return dataclasses.replace(splits, train=part, validation=part, test=part, class_names=names)


def check_same_images(folder: str, theirs: Any, ours: Any) -> None:
    """Raises ValueError unless both say the same images, but for how they are augmented."""
    theirs, ours = map(dataclasses.asdict, (theirs, ours))
    for key, value in ours.items():
        if key not in AUGMENTATION and theirs[key] != value:
            raise ValueError(
                f"config.mixture.members must be runs on the same images, got {folder} with "
                f"config.data.{key}={theirs[key]!r} where this config has {value!r}"
            )

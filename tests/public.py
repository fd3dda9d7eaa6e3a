"""Trained networks and images beside the checkout; tests skip where they are absent."""

import io
import pathlib

import numpy as np
import pytest

from hybrid_jax import models

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def shared(name: str) -> pathlib.Path:
    """The file or folder of that name."""
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside the checkout")
    return SHARED / name


def network(name: str, file: str):
    """(fn, params) of a network as PyTorch trained it."""
    module, params = models.load(name, shared(f"weights/{file}.safetensors"))
    return module.apply, params


def cifar10(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a part, scaled: float32 (n, 32, 32, 3); and their labels."""
    import tensorflow_datasets as tfds
    from PIL import Image

    folder = max(shared("tfds/cifar10").rglob("dataset_info.json")).parent
    builder = tfds.builder_from_directory(folder)
    source = builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()})
    examples = source.__getitems__(list(range(count)))
    files = [io.BytesIO(example["image"]) for example in examples]
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    images = ((pixels / 255 - MEAN) / STD).astype(np.float32)
    return images, np.array([example["label"] for example in examples])


def imagenet() -> tuple[np.ndarray, np.ndarray]:
    """500 images, one of every second class, scaled: float32 (500, 224, 224, 3); and labels."""
    from PIL import Image

    files = sorted(shared("imagenet1k").glob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(file), np.float32) for file in files])
    return (pixels - 127) / 128, np.array([int(file.name.partition("_")[0]) for file in files])

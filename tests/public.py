"""Trained networks and images beside the checkout; tests skip where they are absent."""

import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def shared(name: str) -> pathlib.Path:
    """The file or folder of that name."""
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside the checkout")
    return SHARED / name


def resnet20(name: str = "resnet20_cifar10"):
    """(fn, params) of a ResNet-20 as PyTorch trained it, (B, 32, 32, 3) to (B, 10)."""
    from safetensors.numpy import load_file

    state = load_file(shared(f"weights/{name}.safetensors"))
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
    return _resnet20, {key: jnp.asarray(v.transpose(order[v.ndim])) for key, v in state.items()}


def _resnet20(params, x):
    def norm(name, x):
        scale = params[f"{name}.weight"] * jax.lax.rsqrt(params[f"{name}.running_var"] + 1e-5)
        shift = params[f"{name}.bias"] - params[f"{name}.running_mean"] * scale
        return x * scale[None, None, None] + shift[None, None, None]

    def conv(name, x, stride=1):
        kernel, numbers = params[f"{name}.weight"], ("NHWC", "HWIO", "NHWC")
        strides, padding = (stride, stride), ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

    x = jax.nn.relu(norm("bn1", conv("conv1", x)))
    for at in (f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)):
        stride = 2 if at in ("layer2.0", "layer3.0") else 1
        y = jax.nn.relu(norm(f"{at}.bn1", conv(f"{at}.conv1", x, stride)))
        y = norm(f"{at}.bn2", conv(f"{at}.conv2", y))
        if stride == 2:
            side = x.shape[-1] // 2
            x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (side, side)))
        x = jax.nn.relu(x + y)
    return x.mean((1, 2)) @ params["linear.weight"] + params["linear.bias"][None]


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

"""The networks of this project in PyTorch, as its users would write them."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np

from hybrid_jax import models


def stepping(module: nn.Module, batch: dict[str, Any]) -> Callable[[], Any] | None:
    """Makes a call that takes a training step of `module` in PyTorch: float32, channels last.

    It has as many threads as the process has cores. None without PyTorch.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = _twin(module, batch["image"].shape[1:]).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    images = torch.from_numpy(np.array(batch["image"])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.array(batch["label"], np.int64))
    loss_fn = torch.nn.CrossEntropyLoss()

    def run():
        optimizer.zero_grad()
        loss = loss_fn(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def _twin(module, image_shape):
    """The same layers with other weights."""
    import torch
    from torch import nn as tnn
    from torch.nn import functional as F

    def conv_norm(inputs, outputs, size=3, stride=1, groups=1, activation=None):
        conv = tnn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        layers = [conv, tnn.BatchNorm2d(outputs)]
        return tnn.Sequential(*layers, *([activation(inplace=True)] if activation else []))

    class Basic(tnn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.stride, self.extra = stride, width - inputs
            self.first = conv_norm(inputs, width, 3, stride, activation=tnn.ReLU)
            self.second = conv_norm(width, width)

        def forward(self, x):
            y = self.second(self.first(x))
            if self.stride > 1 or self.extra:
                sides = (self.extra // 2, self.extra - self.extra // 2)
                x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *sides))
            return F.relu(y + x)

    class Residual(tnn.Module):
        def __init__(self, inputs, outputs, expansion, stride):
            super().__init__()
            wide = inputs * expansion
            layers = [conv_norm(inputs, wide, 1, activation=tnn.ReLU6)] if expansion != 1 else []
            layers += [conv_norm(wide, wide, 3, stride, wide, tnn.ReLU6)]
            self.layers = tnn.Sequential(*layers, conv_norm(wide, outputs, 1))
            self.adds = stride == 1 and inputs == outputs

        def forward(self, x):
            return x + self.layers(x) if self.adds else self.layers(x)

    height, _, inputs = image_shape
    pooled = [tnn.AdaptiveAvgPool2d(1), tnn.Flatten()]
    layers: list[torch.nn.Module] = []
    if isinstance(module, models.ResNet):
        layers.append(conv_norm(inputs, module.widths[0], activation=tnn.ReLU))
        inputs = module.widths[0]
        for stage, (count, width) in enumerate(zip(module.blocks, module.widths, strict=True)):
            for i in range(count):
                layers.append(Basic(inputs, width, 2 if stage and not i else 1))
                inputs = width
        return tnn.Sequential(*layers, *pooled, tnn.Linear(inputs, module.num_classes))
    if isinstance(module, models.VGG):
        for widths in module.widths:
            for width in widths:
                layers.append(conv_norm(inputs, width, activation=tnn.ReLU))
                inputs = width
            layers.append(tnn.MaxPool2d(2))
        inputs *= (height >> len(module.widths)) ** 2
        hidden = [tnn.Linear(inputs, module.hidden, bias=False), tnn.BatchNorm1d(module.hidden)]
        return tnn.Sequential(
            *layers,
            tnn.Flatten(),
            *hidden,
            tnn.ReLU(),
            tnn.Linear(module.hidden, module.num_classes),
        )
    layers.append(conv_norm(inputs, 32, activation=tnn.ReLU6))
    inputs, kept = 32, False
    for expansion, outputs, count, stride in module.stages:
        if stride > 1 and not kept:  # the stem for CIFAR keeps the first strided stage's size
            stride, kept = 1, True
        for i in range(count):
            layers.append(Residual(inputs, outputs, expansion, stride if i == 0 else 1))
            inputs = outputs
    layers.append(conv_norm(inputs, 1280, 1, activation=tnn.ReLU6))
    return tnn.Sequential(*layers, *pooled, tnn.Linear(1280, module.num_classes))

"""Programs put together by hand, as tests of targets need them."""

import dataclasses
import math

import numpy as np

from hybrid_jax.program import (
    UNBOUNDED,
    Conv,
    Convert,
    Dense,
    Encoding,
    Program,
    Step,
    Tensor,
    Weights,
    integer_step,
)

Q = Encoding(0.05, 128)
RELU, RELU6 = (0.0, math.inf), (0.0, 6.0)
TANH, EXP = ((Step(name, (0,)),) for name in ("tanh", "exp"))
# x where it is above 0, else x · slope of its channel.
PRELU = (Step("mul", (0, 1)), Step("gt", (0, 2)), Step("select_n", (4, 3, 0)))
SLOPES = np.float32([0.1, -0.5, 2.0]), np.float32(0)


class Build:
    """A program under construction; each step reads the last tensor unless it is told others."""

    def __init__(self, shape, encoding=Q, seed=0):
        self.rng = np.random.default_rng(seed)
        self.tensors, self.operations, self.last = {"x": Tensor(shape)}, [], "x"
        self.add(Convert, shape, encoding)

    @property
    def shape(self):
        return self.tensors[self.last].shape

    @property
    def encoding(self):
        return self.tensors[self.last].encoding

    def add(self, kind, shape, encoding, *fields, inputs=None):
        name = f"t{len(self.tensors)}"
        inputs = (self.last,) if inputs is None else inputs
        self.operations.append(kind(inputs, name, *fields))
        self.tensors[name] = Tensor(tuple(map(int, shape)), encoding)
        self.last = name
        return self

    def weights(self, shape, bits):
        most = 2 ** (bits - 1) - 1
        values = self.rng.integers(-most, most + 1, shape).astype(np.int8)
        scale = self.rng.uniform(0.5, 1.5, shape[-1]) / (most * math.sqrt(math.prod(shape[:-1])))
        # Scales that are powers of two, as half of them are, make ties.
        scale = np.where(np.arange(shape[-1]) % 2, scale, 2 ** np.rint(np.log2(scale)))
        step, bias = integer_step(bits), np.float32(self.rng.normal(size=shape[-1]))
        return Weights(values * np.int8(step), np.float32(scale / step), bias, bits)

    def conv(self, features, window=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1)), **options):
        options = {"dilation": (1, 1), "groups": 1, "clip": UNBOUNDED, "to": Q, "bits": 8} | options
        encoding, bits, dilation = (options.pop(key) for key in ("to", "bits", "dilation"))
        h, w, channels = self.shape
        weights = self.weights((*window, channels // options["groups"], features), bits)
        size = _sizes((h, w), window, strides, padding, dilation)
        fields = weights, strides, padding, dilation, options["groups"], options["clip"]
        return self.add(Conv, (*size, features), encoding, f"conv {len(self.tensors)}", *fields)

    def dense(self, features, to=None, clip=UNBOUNDED, bits=8):
        weights = self.weights((*self.shape, features), bits)
        return self.add(Dense, (features,), to, f"dense {len(self.tensors)}", weights, clip)

    def pool(self, kind, window, strides, padding=((0, 0), (0, 0)), to=None):
        size = _sizes(self.shape[:2], window, strides, padding, (1, 1))
        to = to or self.encoding
        return self.add(kind, (*size, self.shape[2]), to, window, strides, padding)

    def program(self):
        if self.encoding is not None:
            self.add(Convert, self.shape, None)
        return Program("x", self.last, self.tensors, tuple(self.operations))


def _sizes(shape, window, strides, padding, dilation):
    return [
        (n + sum(p) - (k - 1) * d - 1) // s + 1
        for n, k, s, p, d in zip(shape, window, strides, padding, dilation, strict=True)
    ]


def floats(program):
    """The same operations on floats; what converts is then nothing."""
    tensors = {n: dataclasses.replace(t, encoding=None) for n, t in program.tensors.items()}
    return dataclasses.replace(program, tensors=tensors)

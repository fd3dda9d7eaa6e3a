"""Programs that are choices, as tests of `program` and of every target need them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from built import RELU, Build, floats

from hybrid_jax import program as p
from hybrid_jax.program import Encoding, Program, Step, Tensor

SHAPE = (6, 5, 3)


def part(seed, depth=1, classes=4, bits=8):
    """A small network in integers that returns floats."""
    b = Build(SHAPE, seed=seed)
    for _ in range(depth):
        b.conv(5, clip=RELU, to=Encoding(0.03), bits=bits)
    return b.add(p.Mean, (5,), Encoding(0.02, 128)).dense(classes, bits=bits).program()


def coarse_gate():
    """Of three outputs in steps of 2, which often tie."""
    return (
        Build(SHAPE).add(p.Mean, (3,), Encoding(2.0, 2, 0, 3)).add(p.Convert, (3,), None).program()
    )


def images(count=24):
    """Images that differ in how their channels are spread."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, *SHAPE)) + rng.normal(scale=3, size=(count, 1, 1, 3))
    return x.astype(np.float32)


def confidences(program, x):
    """The largest softmax probabilities, in float64."""
    return softmax(np.asarray(p.run(program)(x), np.float64)).max(-1)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def in_a_gap(values):
    """A number about their median that is far from all of them."""
    values = np.sort(values)
    inner = values[len(values) // 3 : -(len(values) // 3)]
    widest = np.diff(inner).argmax()
    return float(inner[widest : widest + 2].mean())


def mixture():
    return p.Mixture(coarse_gate(), (part(1), part(2, 2, bits=4), part(3, 2)))


def cascade():
    """Of three stages, whose thresholds are far from every image's confidence."""
    stages = part(1), part(2, 2), part(3, 2, bits=4)
    return p.Cascade(stages, tuple(in_a_gap(confidences(s, images())) for s in stages[:2]))


def of_bytes(kind):
    """A choice of programs of uint8."""

    def part(seed, outputs):
        rng = np.random.default_rng(seed)
        weights = p.Weights(
            rng.integers(-127, 128, (6, outputs)).astype(np.int8),
            np.full(outputs, 0.0001, np.float32),
            rng.normal(size=outputs).astype(np.float32),
            8,
        )
        tensors = {"x": Tensor((6,), Encoding(1.0), "uint8"), "y": Tensor((outputs,))}
        return Program("x", "y", tensors, (p.Dense(("x",), "y", "dense", weights),))

    if kind is p.Mixture:
        return p.Mixture(part(0, 3), tuple(part(seed, 4) for seed in (1, 2, 3)))
    return p.Cascade((part(1, 4), part(2, 4)), 0.6)


def in_floats(choice):
    """The same with parts in floats: a NaN in an image is then one in what they return."""
    if isinstance(choice, p.Mixture):
        return p.Mixture(floats(choice.gate), tuple(map(floats, choice.experts)))
    return dataclasses.replace(choice, stages=tuple(map(floats, choice.stages)))


def by_hand(share=0.0, shape=(2,)):
    """Of two numbers: themselves, thrice them, or their opposites; thresholds 0.8 and 0.9.

    Of shape (1, 2) with a confidence of its own, how far they are apart, and thresholds of a half.
    """

    def scaled(factor):
        steps = (p.Function(("x",), "y", (Step("mul", (0, 1)),), (np.array(factor, np.float32),)),)
        return Program("x", "y", {"x": Tensor(shape), "y": Tensor(shape)}, steps)

    stages, apart = tuple(map(scaled, (1, 3, -1))), None
    if shape != (2,):
        apart = p.lower(lambda _, y: apart_by(y), {}, IMAGES.reshape(-1, *shape))
    return p.Cascade(stages, (0.5, 0.5) if apart else (0.8, 0.9), share, apart)


def apart_by(y):
    """A quarter of the distance between the two numbers of (B, 1, 2), at most 1."""
    return jnp.minimum(jnp.abs(y[:, 0, 0] - y[:, 0, 1]) / 4, 1)


# e³ / (1 + e³) is 0.953: the first is sure. Of (1, 0) it is 0.731, and of (3, 0) the second is. Of
# (0.5, 0) they are 0.62 and, of (1.5, 0), 0.818: the last answers. With half of the answer before,
# the second has (3.5, 0) and (1.75, 0), of 0.852, and the last (-0.5 + 0.875, 0). By a quarter of
# their distance the same go on at a half: 0.75, 0.25, 0.125; 0.75, 0.375; with half 0.875, 0.4375.
IMAGES = np.float32([[3, 0], [1, 0], [0.5, 0]])
BY_HAND = {0.0: [[3, 0], [3, 0], [-0.5, 0]], 0.5: [[3, 0], [3.5, 0], [0.375, 0]]}

"""A program may be a choice: programs of one input, of which each image runs those that it needs.

A mixture's gate chooses the expert that answers. A cascade has no gate: a stage answers where it is
sure, and else the next one runs. What decides is computed by operations of a program, the same in
every target, so that equal outputs decide alike to the bit.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.program.encoding import Tensor
from hybrid_jax.program.functions import Step
from hybrid_jax.program.graph import Program
from hybrid_jax.program.operations import Add, Convert, Function, Largest, Mean, Pad, Reshape


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """Programs of one input shape and dtype, whose answers have one shape and are float32."""

    def __post_init__(self):
        shapes = {
            "input": {part.input_shape for part in self.parts},
            "output": {part.output_shape for part in self.answering},
        }
        for end, found in shapes.items():
            if len(found) > 1:
                raise ValueError(f"programs must have one {end} shape, got {sorted(found)}")
        dtypes = sorted({part.tensors[part.input].dtype for part in self.parts})
        if len(dtypes) > 1:
            raise ValueError(f"programs must have inputs of one dtype, got {dtypes}")
        made = sorted({part.tensors[part.output].dtype for part in self.parts})
        if made != ["float32"]:
            raise ValueError(f"programs of a choice must return float32, got {', '.join(made)}")

    @property
    def parts(self) -> tuple[Program, ...]:
        """The programs that it consists of; the first of them always runs."""
        raise NotImplementedError

    @property
    def answering(self) -> tuple[Program, ...]:
        """Those of its parts whose outputs are answers."""
        return self.parts

    @property
    def written(self) -> tuple[Program, ...]:
        """Its parts as a target runs them: with what decides among their outputs."""
        return self.parts

    def answer(self, fns: Sequence[Callable[..., Any]], image: jax.Array) -> jax.Array:
        """What it makes of a batch of one by the functions of what is written."""
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.parts[0].input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.answering[0].output_shape


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture(Choice):
    """A gate, and experts of which one runs for each image: that of the gate's largest output.

    A NaN among the gate's outputs makes the answer NaN; ties go to the lowest index.
    """

    gate: Program  # its outputs are (E,)
    experts: tuple[Program, ...]  # E, of one input shape and one output shape

    def __post_init__(self):
        count = self.gate.output_shape
        if count != (len(self.experts),):
            raise ValueError(f"gate must return shape ({len(self.experts)},), got {count}")
        super().__post_init__()

    @property
    def parts(self):
        return (self.gate, *self.experts)

    @property
    def answering(self):
        return self.experts

    def answer(self, fns, image):
        """That of the expert of the largest score."""
        gate, *experts = fns
        scores = gate(image)
        y = jax.lax.switch(jnp.argmax(scores[0]), experts, image)
        return jnp.where(jnp.isnan(scores).any(), jnp.nan, y)


@dataclasses.dataclass(frozen=True, eq=False)
class Cascade(Choice):
    """Stages, of which each image runs the first, and the next where one is not sure.

    A stage is sure where the confidence in its answer reaches its threshold, as in
    `experts.cascade`, whose thresholds and share these are; `below` computes it. The answer of a
    later stage is its output plus `share` of the answer before. One with a NaN is an answer.
    """

    stages: tuple[Program, ...]  # the cheapest first; of one input shape
    # In [0, 1], of each stage but the last; one number for all of them. 0 never hands on, 1 always
    # but where the stage is certain.
    thresholds: tuple[float, ...]
    share: float = 0.0  # in [0, 1]
    # Of an answer, a float (); None is the largest softmax probability of answers (N,).
    confidence: Program | None = None

    def __post_init__(self):
        super().__post_init__()
        count = len(self.stages) - 1
        if np.shape(self.thresholds) not in ((), (count,)):
            raise ValueError(
                f"thresholds must be {count}, one for each stage but the last, "
                f"got {self.thresholds}"
            )
        known = np.broadcast_to(np.asarray(self.thresholds, np.float64), (count,))
        if not ((known >= 0) & (known <= 1)).all():
            raise ValueError(f"thresholds must be in [0, 1], got {self.thresholds}")
        object.__setattr__(self, "thresholds", tuple(known.tolist()))
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")
        own, shape = self.confidence, self.output_shape
        if own is None and len(shape) != 1:
            raise ValueError(f"stages without a confidence must return shape (N,), got {shape}")
        if own is not None and (own.input_shape, own.output_shape) != (shape, ()):
            raise ValueError(
                f"confidence must be of shape {shape} to (), got {own.input_shape} to "
                f"{own.output_shape}"
            )

    @property
    def parts(self):
        return self.stages

    @property
    def written(self):
        """The stages, all but the last with whether they are below their threshold.

        With a share, all but the first take the answer before as a second input.
        """
        first, *later = self.stages
        if self.share:
            later = [joined(stage, self.share) for stage in later]
        *asked, last = first, *later
        pairs = zip(asked, self.thresholds, strict=True)
        return (*(below(*pair, self.confidence) for pair in pairs), last)

    def answer(self, fns, image, *before):
        """That of the first stage that is sure."""
        first, *rest = fns
        if not rest:
            return first(image, *before)
        y, unsure = first(image, *before)
        own = (y,) if self.share else ()
        return jax.lax.cond(
            unsure[0],
            lambda image, y: self.answer(rest, image, *own),
            lambda image, y: y,
            image,
            y,
        )


def joined(program: Program, share: float) -> Program:
    """The program with a second input, as its output, of which it adds `share` to that."""
    before, part, y = (_new(name, program.tensors) for name in ("before", "part", "joined"))
    shape, tensors, steps = program.output_shape, dict(program.tensors), list(program.operations)
    own = program.output
    if program.encoding(own) is not None:
        own = _new("own", tensors)
        tensors[own] = Tensor(shape)
        steps.append(Convert((program.output,), own))
    tensors |= {name: Tensor(shape) for name in (before, part, y)}
    factor = (np.array(share, np.float32),)
    steps.append(Function((before,), part, (Step("mul", (0, 1)),), factor))
    steps.append(Add((own, part), y))
    inputs = (*program.inputs, before)
    return dataclasses.replace(
        program, inputs=inputs, outputs=(y,), tensors=tensors, operations=tuple(steps)
    )


def _new(name, tensors):
    while name in tensors:
        name += "_"
    return name


_SQUARINGS = 12


def below(program: Program, threshold: float, confidence: Program | None = None) -> Program:
    """The program with a second output, bool (): whether it is less confident than the threshold.

    Without one of its own its confidence is 1 / Σ exp(x − max x), the largest softmax probability,
    and compared as

        Σ round(2^s · (1 + (x − max x) / 2^12)^(2^12)) > ⌈2^s / threshold⌉

    in operations of which each is rounded alike on every device: exp is a power by squaring, and
    integers that add up to at most 2^24 have one sum in float32, in whatever order. It is right to
    some 1e-4, for hundreds of classes and more to N / 2^(s + 1), with s = 24 − ⌈log2 N⌉.
    """
    tensors, steps, last = dict(program.tensors), list(program.operations), program.output

    def add(kind, shape, *fields, beside=(), dtype="float32", name=""):
        nonlocal last
        inputs, last = (last, *beside), _new(name or f"{program.output}/{len(steps)}", tensors)
        tensors[last] = Tensor(shape, dtype=dtype)
        steps.append(kind(inputs, last, *fields))

    if program.encoding(last) is not None:
        add(Convert, program.output_shape)
    if confidence is not None:
        last, compare = _appended(confidence, last, tensors, steps), "lt"
        limit = np.array(threshold, np.float32)
    else:
        (count,), logits, compare = program.output_shape, last, "gt"
        places = (count - 1).bit_length()
        scale = np.float32(2 ** (24 - places))
        with np.errstate(divide="ignore"):
            limit = np.array(np.ceil(scale / np.float64(threshold)) / 2**places, np.float32)
        add(Largest, (), (0,))
        add(Reshape, (1,), (1,))
        most, last = last, logits
        add(Add, (count,), (-np.inf, np.inf), True, beside=(most,))
        constants = tuple(np.array(c, np.float32) for c in (2.0**-_SQUARINGS, 1, 0, scale))
        add(Function, (count,), tuple(_powers()), constants)
        add(Pad, (2**places,), ((0, 2**places - count),))
        add(Mean, (), (0,))
    add(Function, (), (Step(compare, (0, 1)),), (limit,), dtype="bool", name="unsure")
    outputs = (program.output, last)
    return dataclasses.replace(program, outputs=outputs, tensors=tensors, operations=tuple(steps))


def _appended(program, last, tensors, steps):
    """The output of a program of the edge `last`, whose tensors and steps are put to those."""
    names = {program.input: last}
    for op in program.operations:
        names[op.output] = _new(f"{last}/{op.output}", tensors)
        tensors[names[op.output]] = program.tensors[op.output]
        inputs = tuple(names[name] for name in op.inputs)
        steps.append(dataclasses.replace(op, inputs=inputs, output=names[op.output]))
    return names[program.output]


def _powers() -> Iterator[Step]:
    """round(scale · max(1 + x · part, 0)^(2^12)), of x, part, 1, 0 and scale."""
    yield from (Step("mul", (0, 1)), Step("add", (5, 2)), Step("max", (6, 3)))
    yield from (Step("square", (7 + i,)) for i in range(_SQUARINGS))
    yield Step("mul", (7 + _SQUARINGS, 4))
    yield Step("round", (8 + _SQUARINGS,), (("rounding_method", "TO_NEAREST_EVEN"),))


def kernel_bits(program: Program | Choice) -> list[int]:
    """Bits of the kernels as `Weights.values` has them, for files that hold them as they are."""
    kernels = (op.weights.values for part in program.parts for op in part.weighted)
    return sorted({8 * values.itemsize for values in kernels})

"""What C files take on Cortex-M, compiled by Clang and run in an emulator.

Single layers and whole networks in every build: instructions, which are no cycles, and on the first
processor loads and stores. Weights are random, and an answer must have the bits that the file gives
on this machine. Beside them stands what CMSIS-NN 99f736a takes, compiled by GCC 12, where that was
counted: a target is 3/4 of it, with 4 bits half, and as much with -Os; what has no dual products of
int16, and a dense layer, may take 1.25 times as many.
"""

import dataclasses
import importlib.util
import itertools
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from hybrid_jax import cost, deploy, experts
from hybrid_jax import program as p
from launch.benchmarks import measure
from launch.benchmarks.measure import Row, Size

# (layer, image, convolution or features of a dense layer, (8, 4 bits) of CMSIS-NN on M4F -O3)
_LAYERS = (
    ("3x3, 16x16x32 to 32", (16, 16, 32), (3, 1, 32), (1.93, 3.68)),
    ("3x3, 32x32x16 to 16", (32, 32, 16), (3, 1, 16), (2.33, 4.09)),
    ("3x3, 8x8x64 to 64", (8, 8, 64), (3, 1, 64), (1.76, 3.51)),
    ("3x3, 32x32x3 to 16", (32, 32, 3), (3, 1, 16), (4.82, 6.49)),
    ("1x1, 16x16x64 to 64", (16, 16, 64), (1, 1, 64), (2.07, 3.73)),
    ("depthwise 3x3, 16x16x64", (16, 16, 64), (3, 64, 64), (8.61, 15.76)),
    ("dense, 256 to 10", (256,), (1, 1, 10), (2.18, 5.25)),
)
# {network in integers: {build: M instructions of CMSIS-NN}}
_CMSIS_NN = {
    "resnet8 int8": {
        **{"Cortex-M4F -O3": 29.9, "Cortex-M4F -O2": 29.9, "Cortex-M4F -Os": 41.1},
        **{"Cortex-M7 -O3": 30.0, "Cortex-M3 -O3": 42.6, "Cortex-M0+ -O2": 98.9},
    },
    "resnet8 int4": {"Cortex-M4F -O3": 51.1, "Cortex-M4F -O2": 51.1},
}


def instructions(size: Size) -> Iterator[Row]:
    """Of layers for each multiply-accumulate, of networks for an image.

    Nothing if a package is missing.
    """
    missing = [name for name in ("ziglang", "unicorn") if not importlib.util.find_spec(name)]
    if missing:
        print(f"left out without {' and '.join(missing)}", file=sys.stderr)
        return
    yield from _of_layers(size)
    yield from _of_networks(size)


BENCHMARKS = (instructions,)


def _of_layers(size):
    chosen = (_LAYERS[i] for i in size.embedded_layers)
    for (name, shape, kernel, theirs), bits in itertools.product(chosen, (8, 4)):
        x = np.random.default_rng(0).integers(0, 256, (1, *shape)).astype(np.uint8)
        program, rest = _layer(shape, kernel, bits)
        [op] = program.weighted
        macs = math.prod(program.output_shape) * op.weights.values[..., 0].size
        beside = dict(_emulated(size, rest, np.zeros((1, *rest.input_shape), np.uint8), ("-O3",)))
        for build, ran in _emulated(size, program, x, ("-O3",)):
            count = (ran.instructions[0] - beside[build].instructions[0]) / macs
            facts, target = [], None
            if build == "Cortex-M4F -O3":
                [cmsis] = theirs[:1] if bits == 8 else theirs[1:]
                facts.append(f"CMSIS-NN {cmsis}")
                target = cmsis * (1.25 if len(shape) == 1 else 0.75 if bits == 8 else 0.5)
            if ran.accesses:
                both = zip(ran.accesses, beside[build].accesses, strict=True)
                loads, stores = ((ours - other) / macs for ours, other in both)
                facts.append(f"{loads:.3g} loads, {stores:.3g} stores")
            row = f"{name}, int{bits}, {build}"
            yield Row(row, count, count, count, "instructions a MAC", target, "; ".join(facts))


def _of_networks(size):
    for name, program, images, macs in _networks(size):
        for build, ran in _emulated(size, program, np.asarray(images), ("-O3", "-O2", "-Os")):
            yield _row(name, build, ran, macs)


def _emulated(size, program, x, optimizations):
    """(build, what it takes) on every processor."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.c")
        deploy.export_to("c", path, program)
        want = deploy.TARGETS["c"].session(path, batch=1, threads=1)(x)
        for processor, optimize in itertools.product(size.processors, optimizations):
            build = {"processor": processor, "optimize": optimize}
            ran = deploy.emulate(path, x, **build, accesses=processor == size.processors[0])
            if ran.outputs[0].tobytes() != want.tobytes():
                raise AssertionError(f"{program} on {processor} {optimize}: other bits")
            yield f"{processor} {optimize}", ran


def _row(name, build, ran, macs):
    millions = [count / 1e6 for count in ran.instructions]
    low, median, high = np.percentile(millions, [25, 50, 75]).tolist()
    worst = f"{np.mean(millions):.3g} M on average, {max(millions):.3g} M at most"
    facts, target = [f"{1e6 * median / macs:.3g} a MAC" if macs else worst], None
    if cmsis := _CMSIS_NN.get(name, {}).get(build):
        target = cmsis * (1 if "-Os" in build else 0.75 if name.endswith("8") else 0.5)
        target = 1.25 * cmsis if build[:9] in ("Cortex-M3", "Cortex-M0") else target
        facts.append(f"CMSIS-NN {cmsis} M")
    if ran.accesses:
        loads, stores = (count / 1e6 for count in ran.accesses)
        facts.append(f"{loads:.3g} M loads, {stores:.3g} M stores")
    sizes = {"code": ran.code, "library": ran.library, "constants": ran.constants}
    sizes |= {"RAM": ran.ram, "stack": ran.stack}
    facts.append("bytes: " + ", ".join(f"{size} {what}" for what, size in sizes.items()))
    return Row(f"{name}, {build}", median, low, high, "M instructions", target, "; ".join(facts))


def _layer(shape, kernel, bits):
    """A layer of bytes with the zero point 0, and what turns its result into floats alone."""
    window, groups, features = kernel
    made = (*shape[:-1], features)
    # A multiplication by 1 is none: what leaves takes the same in both programs.
    rng, encoding = np.random.default_rng(1), p.Encoding(1.0)
    depth, most = shape[-1] // groups, 2 ** (bits - 1) - 1
    values = rng.integers(-most, most + 1, (window, window, depth, features)).astype(np.int8)
    values *= np.int8(p.integer_step(bits))
    scale = np.full(features, 2e-4, np.float32)
    weights = p.Weights(values, scale, np.zeros(features, np.float32), bits)
    pad = (window // 2, window // 2)
    if len(shape) == 1:
        dense = dataclasses.replace(weights, values=values[0, 0])
        op = p.Dense(("x",), "y", "layer", dense)
    else:
        op = p.Conv(("x",), "y", "layer", weights, padding=(pad, pad), groups=groups)
    ends = {"y": p.Tensor(made, encoding), "z": p.Tensor(made)}
    back = p.Convert(("y",), "z")
    whole = {"x": p.Tensor(shape, encoding, "uint8")} | ends
    alone = ends | {"y": p.Tensor(made, encoding, "uint8")}
    return p.Program("x", "z", whole, (op, back)), p.Program("y", "z", alone, (back,))


def _networks(size):
    """(name, program, images, MACs where every image takes as many)."""
    for name, (module, image) in size.embedded.items():
        x = measure.inputs(size.embedded_images, image)
        for bits in (8, 4):
            program, macs = _integers(module, x, bits)
            yield f"{name} int{bits}", program, x, macs
    module, image = next(iter(size.embedded.values()))
    x = measure.inputs(size.embedded_images, image)
    parts = [_integers(module, x, 8, seed)[0] for seed in (0, 1)]
    gate, _ = _integers(experts.gate_cnn(len(parts)), x, 8)
    yield "mixture of two int8", p.Mixture(gate, tuple(parts)), x, None
    small, _ = _integers(module, x, 4)
    threshold = float(np.median(experts.max_probability(p.run(small)(x))))
    yield "cascade, int4 then int8", p.Cascade((small, parts[0]), (threshold,)), x, None


def _integers(module, x, bits, seed=0):
    """The module in integers, first and last layer in 8 bits, and the MACs of an image."""
    fn = module.apply
    params = measure.variables(module, x.shape[1:], seed)
    program = measure.integers((fn, params), x, bits, 8)
    return program, cost.of_program(p.lower(fn, params, x)).formula.count()["macs"]

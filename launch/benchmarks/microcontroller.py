"""What the C files of networks take on Cortex-M, compiled by Clang and run in an emulator.

Every network in every build: instructions of an image, which are no cycles, and on the first
processor loads and stores. Weights are random, and an answer must have the bits that the file gives
on this machine.
"""

import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from hybrid_jax import cost, deploy, experts
from hybrid_jax import program as p
from launch.benchmarks import measure
from launch.benchmarks.measure import Row, Size


def instructions(size: Size) -> Iterator[Row]:
    """Instructions of an image in each build of each network; nothing if a package is missing."""
    missing = [name for name in ("ziglang", "unicorn") if not importlib.util.find_spec(name)]
    if missing:
        print(f"left out without {' and '.join(missing)}", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, program, images, macs in _networks(size):
            path, x = pathlib.Path(folder, f"{name}.c"), np.asarray(images)
            deploy.export_to("c", path, program)
            want = deploy.TARGETS["c"].session(path, batch=1, threads=1)(x)
            for processor in size.processors:
                for optimize in ("-O2", "-Os"):
                    build = {"processor": processor, "optimize": optimize}
                    first = processor == size.processors[0]
                    ran = deploy.emulate(path, x, **build, accesses=first)
                    if ran.outputs[0].tobytes() != want.tobytes():
                        raise AssertionError(f"{name} on {processor} {optimize}: other bits")
                    yield _row(f"{name}, {processor} {optimize}", ran, macs)


BENCHMARKS = (instructions,)


def _row(name, ran, macs):
    millions = [count / 1e6 for count in ran.instructions]
    low, median, high = np.percentile(millions, [25, 50, 75]).tolist()
    facts = [f"{1e6 * median / macs:.3g} a MAC" if macs else f"{max(millions):.3g} M at most"]
    if ran.accesses:
        loads, stores = (count / 1e6 for count in ran.accesses)
        facts.append(f"{loads:.3g} M loads, {stores:.3g} M stores")
    sizes = {"code": ran.code, "library": ran.library, "constants": ran.constants}
    sizes |= {"RAM": ran.ram, "stack": ran.stack}
    facts.append("bytes: " + ", ".join(f"{size} {what}" for what, size in sizes.items()))
    return Row(name, median, low, high, "M instructions", None, "; ".join(facts))


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

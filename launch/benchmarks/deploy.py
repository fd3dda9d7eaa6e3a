"""Inference of what is deployed, against the dense float model in the same runtime.

Every model, dense and with half of its channels removed, in floats and in integers, written for
every target that can be run here: the time of an image and of a batch on one thread, and the size
of the file. Kernels have 7 bits, with which an ONNX file is as fast on every processor; what those
of 8 bits cost there is measured apart.
"""

import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from hybrid_jax import core, deploy, pruning
from hybrid_jax import program as p
from launch.benchmarks import measure
from launch.benchmarks.measure import Row, Size


def inference(size: Size) -> Iterator[Row]:
    """The time of each variant of each model over that of the dense one in floats."""
    with tempfile.TemporaryDirectory() as folder:
        for name, module in size.deployed.items():
            programs = dict(_variants(module, size))
            for target in deploy.TARGETS:
                yield from _rows(pathlib.Path(folder), name, target, programs, size)


def kernels(size: Size) -> Iterator[Row]:
    """The time of each form of the kernels of an ONNX file over that of int8 kernels of 8 bits."""
    forms = {"8 bits, int8": (8, True), "8 bits, uint8": (8, False), "7 bits, int8": (7, False)}
    with tempfile.TemporaryDirectory() as folder:
        for name, module in size.deployed.items():
            model, images = _model(module, size)
            programs = {bits: measure.integers(model, images, bits) for bits in (7, 8)}
            for target in ("onnx", "openvino"):
                runtime, written = deploy.TARGETS[target], {}
                for form, (bits, vnni) in forms.items():
                    path = pathlib.Path(folder, f"{name} {form}{runtime.suffix}")
                    try:
                        manifest = deploy.export_to(target, path, programs[bits], vnni=vnni)
                        runtime.session(path, batch=1, threads=1)
                    except ImportError:
                        break
                    written[form] = path, manifest["bytes"]
                yield from _ratios(f"{target}: {name}", written, runtime, size, targets=False)


BENCHMARKS = (inference, kernels)


def _model(module, size):
    """((fn, params), images)."""
    images = measure.inputs(size.deployed_batches[-1], size.small_image)
    return (measure.predict(module), measure.variables(module, size.small_image)), images


def _variants(module, size):
    """{variant: its program}; 'dense float32' first."""
    (fn, params), images = _model(module, size)
    graph = core.trace(fn, params, images[:1])
    scores = pruning.group_scores(pruning.magnitude(graph.kernels, params), graph.groups)
    masks = core.expand(pruning.keep_channels(scores, 0.5), graph.groups, params)
    small_fn, small, _ = core.shrink(fn, params, masks, images[:1])
    for width, model in {"dense": (fn, params), "half": (small_fn, small)}.items():
        yield f"{width} float32", p.lower(*model, images)
        yield f"{width} int8", measure.integers(model, images, 7)


def _rows(folder, name, target, programs, size):
    runtime, written = deploy.TARGETS[target], {}
    for variant, program in programs.items():
        if target == "c" and "float32" in variant:
            continue  # plain loops, which say nothing of how fast floats can be
        path = folder / f"{name} {variant}{runtime.suffix}"
        try:
            manifest = deploy.export_to(target, path, program)
            runtime.session(path, batch=1, threads=1)
        except ImportError:
            return
        written[variant] = path, manifest.get("flash", manifest["bytes"])
    yield from _ratios(f"{target}: {name}", written, runtime, size)


def _ratios(name, written, runtime, size, targets=True):
    """Every file over the first: {variant: (path, bytes)}."""
    x = np.asarray(measure.inputs(size.deployed_batches[-1], size.small_image))
    reference, *others = written or [None]
    for variant in others:
        ratio = written[reference][1] / written[variant][1]
        for batch in size.deployed_batches:
            ours, theirs = (
                runtime.session(written[v][0], batch=batch, threads=1) for v in (variant, reference)
            )
            yield measure.ratio(
                f"{name} {variant} / {reference}, batch {batch}",
                ours,
                theirs,
                x[:batch],
                pairs=size.pairs if batch == 1 else size.step_pairs,
                target=1.0 if targets else None,
                note=f"{written[variant][1] / 1e3:,.0f} kB, {ratio:.3g}× smaller",
            )

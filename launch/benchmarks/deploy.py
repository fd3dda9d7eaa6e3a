"""Inference of what is deployed, against the dense float model in the same runtime.

Every model, dense and with half of its channels removed, in floats and in 8-bit integers, written
for every target that can be run here: the time of an image and of a batch on one thread, and the
size of the file.
"""

import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from hybrid_jax import core, deploy, pruning, quantization
from launch.benchmarks import measure
from launch.benchmarks.measure import Row, Size


def inference(size: Size) -> Iterator[Row]:
    """The time of each variant of each model over that of the dense one in floats."""
    with tempfile.TemporaryDirectory() as folder:
        for name, module in size.deployed.items():
            programs = dict(_variants(module, size))
            for target in deploy.TARGETS:
                yield from _rows(pathlib.Path(folder), name, target, programs, size)


BENCHMARKS = (inference,)


def _variants(module, size):
    """{variant: its program}; 'dense float32' first."""
    images = measure.inputs(size.deployed_batches[-1], size.small_image)
    fn, params = measure.predict(module), measure.variables(module, size.small_image)
    graph = core.trace(fn, params, images[:1])
    scores = pruning.group_scores(pruning.magnitude(graph.kernels, params), graph.groups)
    masks = core.expand(pruning.keep_channels(scores, 0.5), graph.groups, params)
    small_fn, small, _ = core.shrink(fn, params, masks, images[:1])
    for width, model in {"dense": (fn, params), "half": (small_fn, small)}.items():
        spec = quantization.spec(core.trace(*model, images[:1]), deployable=True)
        ranges = quantization.calibrate(*model, [(images,)], spec)
        yield f"{width} float32", deploy.lower(*model, None, None, images)
        yield f"{width} int8", deploy.lower(*model, spec, ranges, images)


def _rows(folder, name, target, programs, size):
    runtime = deploy.TARGETS[target]
    x = np.asarray(measure.inputs(size.deployed_batches[-1], size.small_image))
    written = {}
    for variant, program in programs.items():
        path = folder / f"{name} {variant}{runtime.suffix}"
        try:
            manifest = deploy.export_to(target, path, program)
            runtime.session(path, batch=1, threads=1)
        except ImportError:
            return
        except ValueError:
            continue  # C takes integers alone
        written[variant] = path, manifest.get("flash", manifest["bytes"])
    reference, *others = written
    for variant in others:
        ratio = written[reference][1] / written[variant][1]
        for batch in size.deployed_batches:
            ours, theirs = (
                runtime.session(written[v][0], batch=batch, threads=1) for v in (variant, reference)
            )
            yield measure.ratio(
                f"{target}: {name} {variant} / {reference}, batch {batch}",
                ours,
                theirs,
                x[:batch],
                pairs=size.pairs if batch == 1 else size.step_pairs,
                target=1.0,
                note=f"{written[variant][1] / 1e3:,.0f} kB, {ratio:.3g}× smaller",
            )

"""GPTQ: kernels rounded one input at a time, what follows making up for the error so far."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core
from hybrid_jax import program as p
from hybrid_jax.quantization import grids, lookup, specs
from hybrid_jax.quantization.planning import Plan

ORDERS = ("activation", "natural")


def gptq(
    params: Any,
    grams: Mapping[str, core.Gram],
    spec: specs.Spec,
    ranges: Mapping[str, Any],
    masks: Any = None,
    *,
    bits: Any = None,
    damping: float = 0.01,
    order: str = "activation",
) -> Any:
    """Moves every kernel onto its grid so that the outputs of its layer change little.

    Each group of a convolution is a matrix product of its own (see `core.Gram`). With masks, what
    the sweep would move onto a removed weight is handed on to the weights after it. Give it pruned
    parameters that have answered their pruning already, and their masks:

        params = pruning.compensate(params, masks, grams)
        ranges = calibrate(fn, params, batches, spec, 'mse')
        params = gptq(params, grams, spec, ranges, masks)

    Weights that are not zero yet it prunes itself, with SparseGPT's update, which is cheaper than
    `compensate` and not exact.

    `grams`, of the float model, have every kernel that `spec` quantizes. `masks` are bool like
    `params`, True where kept, with `optax.MaskedNode()` where nothing is pruned; masked weights
    come out exactly zero. `bits`, as `Spec.bits` gives them, may be traced. A kernel used at
    several sites has one range. `damping` is λ of `core.damped_gram`; the `order` 'activation'
    rounds the inputs with the largest second moments first, 'natural' goes through them as the
    kernel has them. Kernels come out on their grids: `fake_quantized`, compiled, with the same
    spec, ranges and bits, does not change them, to the bit. One of 32 bits is only pruned.

    Source: E. Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers, arXiv 2210.17323; jointly with masks E. Frantar, D. Alistarh, SparseGPT, arXiv
    2301.00774.

    Example:
      >>> from hybrid_jax.quantization import calibration
      >>> fn, params = lambda params, x: x @ params['w'], {'w': jnp.array([[3.0], [1.45], [1.45]])}
      >>> x = jnp.array([[0.0, 1.0, 1.0]])
      >>> spec = specs.spec(core.trace(fn, params, x), weight_bits=3, first_last_bits=3)
      >>> ranges = calibration.calibrate(fn, params, [(x,)], spec)
      >>> grams = core.input_grams(fn, params, [(x,)])
      >>> gptq(params, grams, spec, ranges)['w'].ravel().tolist()  # 1.45 + 1.45 ≈ 1 + 2
      [3.0, 1.0, 2.0]
    """
    core.check_positive("damping", damping)
    core.check_choice("order", order, ORDERS)
    core.check_grams(params, grams)
    masks = jax.tree.map(lambda _: optax.MaskedNode(), params) if masks is None else masks
    core.check_masks(params, masks)
    widths = {site.name: _width(site, bits) for site in spec.sites}
    swept = [site.name for gram in grams.values() for site in gram.sites]
    for name, width in widths.items():
        if name not in swept and not _is_off(width):
            raise ValueError(_no_gram(name, grams))

    def move(path, mask, leaf):
        kept = None if core.is_masked_node(mask) else mask
        if path not in grams:
            if kept is not None:
                raise ValueError(_no_gram(path, grams))
            return leaf
        gram = grams[path]
        quantizer, width = spec[gram.site.name].weight, widths[gram.site.name]
        if kept is None and _is_off(width):
            return leaf
        if kept is not None and quantizer.scheme == "binary":
            raise ValueError(f"masks must leave the binary kernel {path!r} whole: it has no zero")
        grid = None if _is_off(width) else quantizer.grid(_span(gram, spec, ranges), width)
        return _sweep(leaf, gram, grid, jnp.asarray(width == grids.OFF), kept, damping, order)

    return core.map_with_path(move, masks, params)


def gptq_planned(
    planned: Plan,
    ranges: Mapping[str, Mapping[str, grids.Range]],
    batches: Iterable[tuple[Any, ...]],
) -> p.Params:
    """The plan's weights with every quantized kernel on its grid: `gptq` of the program in floats.

    The plan has the weights of the float model, of which one that is exactly 0 (pruned) stays 0;
    `ranges` are as `calibrate_edges` returns them.
    """
    params, off = planned.program.params, specs.Quantizer(grids.OFF, "affine")
    # The program is a function like any other, whose sites are called after the kernels.
    names = {f"{name}/kernel": name for name in planned.ranged}
    spec = specs.Spec(
        tuple(specs.SiteSpec(site, planned.kernels[name], off) for site, name in names.items())
    )
    spans = {s: {"weight": lookup.range_at(ranges, name, "weight")} for s, name in names.items()}
    masks = core.map_with_path(
        lambda path, leaf: leaf != 0 if path in names and (leaf == 0).any() else optax.MaskedNode(),
        params,
    )
    fn = functools.partial(p.apply, planned.program)
    grams = core.input_grams(fn, params, batches)
    grams = {path: gram for path, gram in grams.items() if path in names}
    return gptq(params, grams, spec, spans, masks)


def _no_gram(name, grams):
    return (
        f"grams must have every kernel to be quantized or pruned, got none for {name!r} among: "
        f"{', '.join(grams) or 'nothing'}"
    )


def _width(site, bits):
    if bits is None:
        return site.weight.bits
    width = lookup.entry("bits", bits, site.name, "weight")
    return site.weight.check_bits(f"bits of {site.name!r}", width)


def _is_off(width):
    return isinstance(width, int) and width == grids.OFF


def _span(gram, spec, ranges):
    first, *others = [lookup.range_of(spec, ranges, site, "weight") for site in gram.sites]
    if first is None:
        raise ValueError(
            f"the kernel at {gram.site.name!r} must have a range of its own, got learning 'dynamic'"
        )
    for site, span in zip(gram.sites[1:], others, strict=True):
        traced = any(isinstance(end, jax.core.Tracer) for end in (*first, *span))
        if not traced and not all(map(np.array_equal, first, span)):
            raise ValueError(
                f"ranges must be the same at all sites of a kernel, got others at "
                f"{gram.site.name!r} and {site.name!r}"
            )
    return first


@functools.partial(jax.jit, static_argnames="order")
def _sweep(kernel, gram, grid, off, kept, damping, order):
    """One kernel onto its grid (unless None, or `off`) and its mask (unless None)."""
    site = gram.site

    def in_rows(leaf):
        leaf = grids.spread(leaf, site.kernel_shape)
        return core.kernel_matrix(site, jnp.broadcast_to(leaf, site.kernel_shape))

    def project(row, steps, kept):
        if steps is not None:
            own = grid._replace(scale=steps[0], zero_point=steps[1])
            row = jnp.where(off, row, grids.dequantize(grids.quantize(row, own), own))
        return row if kept is None else jnp.where(kept, row, 0.0)

    def solve(weights, matrix, rows):
        natural = jnp.arange(len(weights))
        turn = jnp.argsort(-jnp.diagonal(matrix)) if order == "activation" else natural
        weights, matrix, rows = jax.tree.map(
            lambda leaf: leaf[turn], (weights, matrix[:, turn], rows)
        )
        factor = core.inverse_factor(core.damped_gram(matrix, damping))
        swept = core.sweep_rows(weights, factor, project, *rows)
        return jnp.zeros_like(swept).at[turn].set(swept)

    steps = None if grid is None else (grid.scale, grid.zero_point)
    rows = jax.tree.map(in_rows, (steps, kept))
    swept = jax.vmap(solve)(in_rows(kernel.astype(jnp.float32)), gram.matrix, rows)
    return core.kernel_from_matrix(site, swept).astype(kernel.dtype)

"""Bias correction: quantization shifts the mean of a channel, and the bias takes it back."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core
from hybrid_jax.quantization import grids, model, specs


def correct_biases(
    fn: Callable[..., Any],
    params: Mapping[str, jax.Array],
    batches: Iterable[tuple[Any, ...]],
    spec: specs.Spec,
    ranges: Mapping[str, Mapping[str, grids.Range]],
    rounded: Mapping[str, jax.Array] | None = None,
    *,
    bits: Any = None,
) -> dict[str, jax.Array]:
    """Makes the mean output of every folded site what it is in the float model.

    Site by site, in the order in which they run, with those before it corrected,

        bias := float bias + E[float output] − E[quantized output]

    for each output channel, the means taken over examples and positions of `batches`, all of the
    same shapes. The model runs on them once for each site. A site without a folded bias
    (name + '/bias') stays as it is.

    `fn` is the folded function that `core.fold` returns, `params` are its float parameters and
    `ranges` those of `calibrate`. Corrected and returned are `rounded`, such as what `adaround`
    gives, or else `params`; `bits`, as `Spec.bits` gives them, take the place of the spec's.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    arXiv 1906.04721, section 4.2 and appendix D (empirical bias correction).

    Example:
      >>> fn, refold = core.fold(lambda params, x: x @ params['w'], {'w': jnp.ones((1, 1))},
      ...                        jnp.ones((2, 1)))
      >>> params, x = refold({'w': jnp.full((1, 1), 1.3)}), jnp.array([[1.0], [3.0]])
      >>> spec = specs.spec(core.trace(fn, params, x), [('w', {'weight': 4, 'activation': 32})])
      >>> span = grids.Range(jnp.full((1, 1), -7.0), jnp.full((1, 1), 7.0))
      >>> new = correct_biases(fn, params, [(x,)], spec, {'w': {'weight': span}})
      >>> print(f"{new['w/bias'][0]:.3f}")  # 1.3 becomes 1: of the mean 2.6, 0.6 is lost.
      0.600
    """
    batches = list(core.check_batches(batches, alike=True))
    flat = core.flatten_paths(params)
    names = [
        site.name
        for site in core.trace(fn, params, *batches[0]).sites
        if f"{site.name}/bias" in flat
    ]
    if not names:
        raise ValueError(
            f"params must have folded biases, as core.fold gives them, got {', '.join(flat)}"
        )

    def mean(site, x, kernel, apply):
        y = apply(x, kernel)
        others = tuple(axis for axis in range(y.ndim) if axis not in site.output_axes)
        return y, y.astype(jnp.float32).mean(others)

    watched = core.at_sites(fn, mean)
    quantized = model.fake_quantized(watched, spec)

    def over_batches(means, *args):
        each = [means(*args, *batch) for batch in batches]
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each)

    compiled = [
        jax.jit(core.fast_convolutions(fn))
        for fn in (lambda *args: watched(*args)[1], lambda *args: quantized(*args, bits=bits)[1])
    ]
    expected, means = over_batches(compiled[0], params), compiled[1]
    corrected = dict(params if rounded is None else rounded)
    for name in names:
        shift = over_batches(means, corrected, ranges)[name] - expected[name]
        core.check_finite("the shift of the mean", {name: shift})
        bias = params[f"{name}/bias"]
        corrected[f"{name}/bias"] = (bias - shift).astype(bias.dtype)
    return corrected

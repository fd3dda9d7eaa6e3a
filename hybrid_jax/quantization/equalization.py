"""Cross-layer equalization: channels of one layer get like ranges, and the next layer undoes it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import core
from hybrid_jax.quantization.blocks import cut, marked

# Powers of two scale without rounding, so that a difference is the function's own.
_PROBE = 2.0**6


class _Part(NamedTuple):
    """The entries of one parameter that belong to the channels: index[u] along `axis` for u."""

    path: str
    axis: int
    index: np.ndarray


class _Pair(NamedTuple):
    """Channels between a site (with its bias) and its readers: scaled by 1/s before, by s after."""

    producer: _Part
    bias: _Part
    consumers: tuple[_Part, ...]


def equalize(
    fn: Callable[..., Any],
    params: Mapping[str, jax.Array],
    *inputs: Any,
    iterations: int = 20,
    tolerance: float = 1e-5,
) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Scales channels between layers so that weights quantize better; the function stays the same.

    Channel i of a site and of the sites that read it are scaled by 1/s and s, where

        s_i = √(r_i r'_i) / r'_i

    with r_i the largest magnitude of the weights that make channel i and r'_i of those that read
    it, which makes both √(r_i r'_i). All sites are gone through until nothing moves any more. This
    helps a grid for each tensor; a grid for each output channel has scales of its own.

    It holds where what lies between the sites is positively homogeneous: ReLU and pooling are,
    ReLU6, SiLU and a sum with what is not scaled are not. No list says so: every site is tried on
    `inputs` with factors far from 1, and left out if an output changes by more than `tolerance` of
    the largest. What the inputs do not show (an activation that none of them reaches) is not found:
    give real images.

    `fn` is the folded function that `core.fold` returns. The sites are gone through `iterations`
    times at most. With the scaled parameters comes {site name: reason} for each site that is not
    scaled.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    arXiv 1906.04721, section 4.1.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params['a'] + params['b'][None]) @ params['c']
      >>> params = {'a': jnp.array([[1.0, 16.0]]), 'b': jnp.ones(2), 'c': jnp.array([[4.0], [1.0]])}
      >>> x = jnp.array([[1.0], [-3.0]])
      >>> folded_fn, refold = core.fold(fn, params, x)
      >>> new, left_out = equalize(folded_fn, refold(params), x)
      >>> print(new['a'], new['a/bias'], new['c'].ravel(), left_out)
      [[2. 4.]] [2.   0.25] [2. 4.] {'c': 'makes an output of the function'}
    """
    core.check_integer("iterations", iterations, 1)
    core.check_positive("tolerance", tolerance)
    run = jax.jit(core.fast_convolutions(fn))
    expected = _leaves(run(params, *inputs))
    core.check_finite("outputs of fn on inputs", dict(enumerate(expected)))
    reach = max(float(np.abs(out).max(initial=0)) for out in expected)

    def unchanged(new):
        outs = _leaves(run(new, *inputs))
        return all(
            np.abs(a - b).max(initial=0) <= tolerance * reach for a, b in zip(outs, expected)
        )

    pairs, left_out = _pairs(fn, params, inputs)
    for name, several in list(pairs.items()):
        for factor in (_PROBE, 1 / _PROBE):
            probed = dict(params)
            for pair in several:
                _scale(probed, pair, np.full(len(pair.producer.index), factor))
            if name in pairs and not unchanged(probed):
                del pairs[name]
                left_out[name] = "is not followed by positively homogeneous operations alone"
    new = {path: np.asarray(leaf) for path, leaf in params.items()}
    for _ in range(iterations):
        moved = 0.0
        for pair in (pair for several in pairs.values() for pair in several):
            made, read = _reach(new, [pair.producer]), _reach(new, pair.consumers)
            dead = (made == 0) | (read == 0)
            scale = np.where(dead, 1.0, np.sqrt(made / np.where(dead, 1.0, read)))
            _scale(new, pair, scale)
            moved = max(moved, np.abs(np.log(scale)).max())
        if moved < tolerance:
            break
    return {path: jnp.asarray(leaf, params[path].dtype) for path, leaf in new.items()}, left_out


def _pairs(fn, params, inputs) -> tuple[dict[str, list[_Pair]], dict[str, str]]:
    """{name of the site that makes the channels: pairs}, and why the other sites have none."""
    graph = core.trace(fn, params, *inputs)
    jaxpr = jax.make_jaxpr(marked(fn))(params, *inputs).jaxpr
    variables = dict(zip(core.flatten_paths(params), jaxpr.invars))
    folded = [site for site in graph.sites if f"{site.name}/bias" in variables]
    if not folded:
        raise ValueError(
            f"params must have folded biases, as core.fold gives them, got {', '.join(variables)}"
        )
    pairs: dict[str, list[_Pair]] = {}
    left_out = {}
    for site in folded:
        kernel = {site.path: variables[site.path]}
        taps = cut(jaxpr, [site.name], kernel, jaxpr.invars[len(variables) :]).taps
        readers = [name for names in taps for name in names]
        if any(isinstance(name, int) for name in readers):
            left_out[site.name] = "makes an output of the function"
            continue
        found = [_pair(group, site, list(map(graph.site, readers))) for group in graph.groups]
        if any(found):
            pairs[site.name] = [pair for pair in found if pair]
        else:
            left_out[site.name] = "makes channels that are no single axis of each kernel that reads"
    return pairs, left_out


def _pair(group: core.Group, site: core.Site, readers: Sequence[core.Site]) -> _Pair | None:
    """The channels of `group` between a site and its readers, or None if it has none."""

    def part(path, axes):
        found = (m for m in group.members if m.path == path and m.axis in axes)
        return next((_Part(m.path, m.axis, m.index) for m in found), None)

    made, bias = part(site.path, site.kernel_out_axes), part(f"{site.name}/bias", [0])
    # A depthwise kernel has one index for the channel that it reads and makes: its output's.
    read = [
        part(reader.path, reader.kernel_in_axes)
        or (reader.groups > 1 and part(reader.path, reader.kernel_out_axes))
        for reader in readers
    ]
    return _Pair(made, bias, tuple(read)) if made and bias and all(read) else None


def _scale(params: dict[str, Any], pair: _Pair, scale: np.ndarray) -> None:
    """Scales the channels of a pair in place: the entries of the dictionary are replaced."""
    sides = [(pair.producer, 1 / scale), (pair.bias, 1 / scale)]
    for (path, axis, index), factor in [*sides, *((part, scale) for part in pair.consumers)]:
        leaf = np.asarray(params[path])
        along = np.ones(leaf.shape[axis], leaf.dtype)
        along[index] = factor[:, None]
        params[path] = leaf * along.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)])


def _reach(params: Mapping[str, np.ndarray], parts: Sequence[_Part]) -> np.ndarray:
    """The largest magnitude of each channel's weights over all the parts."""

    def reach(part):
        leaf = np.abs(np.moveaxis(params[part.path], part.axis, 0))
        return leaf.reshape(len(leaf), -1).max(1)[part.index].max(1)

    return np.max([reach(part) for part in parts], axis=0)


def _leaves(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]

"""Parts of a kernel that leave together: N of M weights, blocks of channels, H×W kernels.

They are cut from a kernel's form (taps, in, out), which `core.trace(...).kernels` knows in any
layout. A kernel that a block or M does not divide is an error: exempt its path.
"""

import numpy as np

from hybrid_jax import core
from hybrid_jax.pruning.granularity import Granularity, Kernels, within_leaves


def n_m(kernels: Kernels, n: int, m: int) -> Granularity:
    """At least `n` of every `m` consecutive weights along the inputs C of an output are kept.

    Every m weights are a row that loses floor(sparsity · m + ½): exactly m − n at sparsity
    1 − n/m, fewer on the way there with a schedule. Goes with `uniform()` alone. A. Mishra et al.,
    Accelerating Sparse Deep Neural Networks (arXiv 2104.08378).

    Example:
      >>> import jax.numpy as jnp
      >>> from hybrid_jax.pruning import masks
      >>> params = {'w': jnp.array([[1.0, 2.0, 4.0, 3.0]])}  # O = 1, C = 4
      >>> kernels = core.trace(lambda p, x: x @ p['w'].T, params, jnp.ones((1, 4))).kernels
      >>> masks(params, 0.5, n_m(kernels, 2, 4))['w'].tolist()
      [[False, False, True, True]]
    """
    core.check_integer("m", m, 1)
    core.check_integer("n", n, 1, m)

    def cut(kernel):
        layers, taps, c, o = kernel.known_sizes()
        _check_divides("m", m, "C", c, kernel)
        return (layers, taps, c // m, m, o), (0, 1, 2, 4, 3), (-1, m, 1)

    return _within_kernels(f"n_m({n}, {m})", kernels, cut, max_sparsity=1 - n / m)


def blocks(
    kernels: Kernels, bc: int, bo: int, reduce: str = "sum", at_least: int = 0
) -> Granularity:
    """Blocks of `bc` input by `bo` output channels leave as a whole, at each place of a kernel.

    Of equal scores the block kept is the first in (H, W, C/bc, O/bo). S. Narang, E. Undersander, G.
    Diamos, Block-Sparse Recurrent Neural Networks (arXiv 1711.02782).
    """
    core.check_integer("bc", bc, 1)
    core.check_integer("bo", bo, 1)

    def cut(kernel):
        layers, taps, c, o = kernel.known_sizes()
        _check_divides("bc", bc, "C", c, kernel)
        _check_divides("bo", bo, "O", o, kernel)
        dims = layers, taps, c // bc, bc, o // bo, bo
        return dims, (0, 1, 2, 4, 3, 5), (1, -1, bc * bo)

    return _within_kernels(f"blocks({bc}, {bo})", kernels, cut, reduce, at_least=at_least)


def kernels(kernels: Kernels, reduce: str = "sum", at_least: int = 0) -> Granularity:
    """The H×W kernel of one input and one output channel leaves as a whole.

    In a dense layer, or one of 1×1 convolutions, this is a single weight. Under `global_`, where
    kernels of several sizes compete, a sum favours the large ones. H. Mao et al., Exploring the
    Regularity of Sparse Structure in Convolutional Neural Networks (arXiv 1705.08922).
    """

    def cut(kernel):
        sizes = kernel.known_sizes()
        return sizes, (0, 2, 3, 1), (1, -1, sizes[1])

    return _within_kernels("kernels", kernels, cut, reduce, at_least=at_least)


GRANULARITIES = {
    "n_m": lambda graph: n_m(graph.kernels, 2, 4),
    "blocks": lambda graph: blocks(graph.kernels, 2, 2),
    "kernels": lambda graph: kernels(graph.kernels),
}
"""By name, for a graph, as `pruning.GRANULARITIES`."""


def _within_kernels(name, kernels, cut, reduce="sum", at_least=0, **attributes):
    # `cut(kernel) -> (dims, order, view)`: reshaped to `dims`, its axes transposed to `order`, and
    # reshaped to `view` the form (L, T, C, O) is (rows, n, weights of a unit).
    def known(path):
        if path not in kernels:
            raise ValueError(
                f"scores must be of kernels with {name}, got some at {path!r}, expected at: "
                f"{', '.join(kernels) or 'none'}"
            )
        return kernels[path], *cut(kernels[path])

    def arrange(path, leaf):
        kernel, dims, order, view = known(path)
        return kernel.canonical(leaf).reshape(dims).transpose(order).reshape(view)

    def restore(path, weights, shape):
        kernel, dims, order, _ = known(path)
        moved = weights.reshape([dims[axis] for axis in order])
        return kernel.restore(moved.transpose(np.argsort(order)))

    return within_leaves(name, arrange, restore, reduce, at_least, **attributes)


def _check_divides(name: str, size: int, axis: str, length: int, kernel: core.Kernel) -> None:
    if length % size:
        raise ValueError(
            f"{name} must divide {axis} = {length} of {kernel.path!r} with shape {kernel.shape}, "
            f"got {size}; exempt the path or choose another {name}"
        )

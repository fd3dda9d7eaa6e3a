"""Compresses convolutional networks for edge devices, in JAX.

A model is a pure function `fn(params, *inputs)` and a pytree `params`; every capability takes such
a pair and returns one. Nothing is declared layer by layer: sites, channels and costs are read from
the traced program, whether Flax Linen, NNX or bare JAX wrote it.

Example:
  >>> import jax, jax.numpy as jnp, hybrid_jax as hj
  >>> model = hj.models.create('resnet8', 10)
  >>> x = jnp.zeros((1, 32, 32, 3))
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
  >>> graph = hj.trace(model.apply, variables, x)
  >>> len(graph.sites), graph.macs, hj.cost.count(graph).bytes
  (8, 12239488, 303080)

The method is that of *Hybrid Compression: Integrating Pruning and Quantization for Optimized Neural
Networks* (arXiv 2606.22935).
"""

from etils import epy

# Each is imported when it is first asked for: a mistake in a flag is told before JAX is there.
with epy.lazy_api_imports(globals()):
    from hybrid_jax import (
        core,
        cost,
        data,
        deploy,
        experts,
        models,
        program,
        pruning,
        quantization,
        recipes,
        report,
        training,
    )
    from hybrid_jax.core import (
        Certificate,
        Graph,
        Group,
        Site,
        at_sites,
        expand,
        narrow,
        shrink,
        trace,
    )
    from hybrid_jax.program import Program, lower
    from hybrid_jax.recipes import Budget, compress

__all__ = [
    "Budget",
    "Certificate",
    "Graph",
    "Group",
    "Program",
    "Site",
    "at_sites",
    "compress",
    "core",
    "cost",
    "data",
    "deploy",
    "expand",
    "experts",
    "lower",
    "models",
    "narrow",
    "program",
    "pruning",
    "quantization",
    "recipes",
    "report",
    "shrink",
    "trace",
    "training",
]

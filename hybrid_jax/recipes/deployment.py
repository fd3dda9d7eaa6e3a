"""What is deployed: kernels as integers, and one file of the top-1 mixture, checked elsewhere."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import core, deploy, experts, quantization
from hybrid_jax.recipes import phase1
from hybrid_jax.recipes.job import Job
from hybrid_jax.recipes.phase1 import Experts
from hybrid_jax.recipes.phase2 import Gate

ARTIFACT = "mixture.stablehlo"

Deployed = tuple[Callable[[Any, jax.Array], jax.Array], Any]
"""(fn(params, images (B, H, W, C)) -> logits, params)."""


def integers(
    predict: Callable[..., jax.Array],
    graph: core.Graph,
    quantizer: quantization.Spec,
    variables: Any,
    ranges: Any,
    images: jax.ShapeDtypeStruct,
) -> Deployed:
    """Returns what `fake_quantized(predict, quantizer)` computes, from kernels stored as integers.

    Args:
      predict: (variables, images) -> logits, in floats.
      graph: Its sites.
      quantizer: How these are quantized.
      variables: Its variables.
      ranges: Its ranges.
      images: Shape of a batch.
    """
    example = jnp.zeros(images.shape, images.dtype)
    kernels = quantization.integer_kernels(predict, quantizer, variables, ranges, example)
    shapes = jax.eval_shape(lambda: variables)
    replaced = {site.path for site in graph.sites}
    flat = core.flatten_paths(variables)
    floats = {path: leaf for path, leaf in flat.items() if path not in replaced}

    def fn(params, images):
        def rule(site, x, kernel, apply):
            stored, own = params["kernels"][site.name], quantizer[site.name]
            span = params["ranges"][own.range_site("activation")]["activation"]
            grid = own.activation.grid(span)
            kernel = quantization.dequantize(stored.values, stored.grid)
            return apply(quantization.fake_quant(x, grid), kernel), None

        def leaf(path, shape):
            # The rule puts an integer kernel in the place of these zeros.
            return params["floats"].get(path, jnp.zeros(shape.shape, shape.dtype))

        given = quantizer, params["ranges"]
        others = quantization.at_joins(*given), quantization.at_biases(*given)
        return core.at_sites(predict, rule, *others)(core.map_with_path(leaf, shapes), images)[0]

    return fn, {"floats": floats, "kernels": kernels, "ranges": ranges}


def deployed_experts(job: Job, made: Experts) -> list[Deployed]:
    """Returns each expert as it is deployed."""
    return [
        integers(e.predict, e.graph, e.quantizer, e.variables, e.ranges, job.images)
        for e in phase1.alone(made)
    ]


def deployed_gate(job: Job, gate: Gate) -> Deployed:
    """Returns the gate as it is deployed."""
    return integers(
        gate.float_predict,
        gate.graph,
        gate.quantizer,
        gate.params["variables"],
        gate.params["ranges"],
        job.images,
    )


def deployed_mixture(job: Job, made: Experts, gate: Gate) -> Deployed:
    """Returns the top-1 mixture for the edge, which runs the gate and one expert.

    Raises:
      ValueError: If the gate was fitted to other experts.
    """
    experts.check_fitted(gate.fitted_to, phase1.trained(made.stack))
    fns, params = zip(*deployed_experts(job, made), strict=True)
    gate_fn, gate_params = deployed_gate(job, gate)
    edge = experts.one_of(fns, gate_fn)
    return (
        lambda params, images: edge(params["experts"], params["gate"], images),
        {"experts": list(params), "gate": gate_params},
    )


def deploy_mixture(job: Job, made: Experts, gate: Gate, expected: Any) -> dict:
    """Writes the top-1 mixture of raw images to a file and runs it in a new process.

    Args:
      job: The run.
      made: The experts.
      gate: The gate.
      expected: (n, N) logits of the model that was evaluated, for all test images.

    Returns:
      An entry of 'deploy' in `results.json`.
    """
    predict, params = deployed_mixture(job, made, gate)
    path = job.workdir / "deploy" / ARTIFACT
    manifest = deploy.export(
        path,
        lambda params, images: predict(params, job.normalize(images)),
        params,
        jax.ShapeDtypeStruct(job.images.shape, jnp.uint8),
        platforms=job.config.deploy.platforms,
    )
    checked = deploy.verify(path, job.splits.test.images, expected)
    return {
        "artifact": f"deploy/{ARTIFACT}",
        "platforms": manifest["platforms"],
        "bytes": manifest["bytes"],
        "max_difference": checked.max_difference,
        "agreement": checked.agreement,
    }

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax import core, pruning


def test_from_a_trace_to_the_small_function_nothing_is_compiled(compiled):
    sizes = (5, 11, 13, 17, 19, 3)

    def fn(params, x):
        for kernel, bias in params[:-1]:
            x = jax.nn.relu(x @ kernel + bias[None])
        return x @ params[-1][0]

    rng = np.random.default_rng(0)
    params = [
        tuple(jax.device_put(rng.random(s, np.float32)) for s in ((n, m), m))
        for n, m in itertools.pairwise(sizes)
    ]
    jax.device_put(np.ones(977, np.float32)) + 1
    assert compiled() == 1
    shape = jax.ShapeDtypeStruct((1, 5), jnp.float32)
    graph = core.trace(fn, params, shape)
    scores = pruning.magnitude(graph.kernels, params)
    for granularity in (
        pruning.unstructured(1),
        pruning.channels(graph.groups),
        pruning.channels(graph.groups, "l2", "max", multiple=4),
    ):
        for allocation in (pruning.uniform(), pruning.global_(), pruning.erk(graph.kernels)):
            masks = pruning.masks(scores, 0.5, granularity, allocation)
    pruning.apply_masks(params, masks)
    _, small, certificate = core.shrink(fn, params, masks, shape)
    keep = pruning.keep_channels(pruning.group_scores(scores, graph.groups), 0.5)
    core.slice_tree(params, core.keep_indices(keep, graph.groups, params))
    assert compiled() == 0
    assert certificate.parameters[1] == sum(leaf.size for leaf in jax.tree.leaves(small))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((scores, masks, small)))


def test_scores_of_what_is_known_are_compiled_for_no_shape(compiled):
    rng = np.random.default_rng(0)
    params = {
        str(i): jax.device_put(rng.random(shape, np.float32))
        for i, shape in enumerate(itertools.pairwise((5, 11, 13, 17, 19, 3)))
    }
    statistics = jax.tree.map(lambda w: jax.device_put(np.cos(w)), params)

    def fn(params, x):
        for kernel in params.values():
            x = x @ kernel
        return x

    kernels = core.trace(fn, params, jax.ShapeDtypeStruct((1, 5), jnp.float32)).kernels
    compiled()
    for criterion in (pruning.magnitude, pruning.lamp, pruning.geometric_median):
        criterion(kernels, params)
    for name in ("taylor", "snip", "grasp", "fisher", "movement", "wanda", "chip"):
        getattr(pruning, name)(kernels, params, statistics)
    assert compiled() == 0
    # Random numbers are drawn at once.
    pruning.random(kernels, params, jax.random.key(0))
    assert compiled() <= 3


def test_what_is_put_on_the_device_is_a_copy():
    # Large enough that jax would share the memory.
    given = np.ones(4096, np.float32)
    put = core.on_device({"w": given})["w"]
    given[:] = 0
    assert put.min() == 1


def test_what_is_spread_over_devices_stays_spread():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    params = {"w": jax.device_put(np.arange(32, dtype=np.float32).reshape(8, 4), spread)}
    graph = core.trace(lambda params, x: x @ params["w"], params, jnp.ones((1, 8)))
    scores = pruning.magnitude(graph.kernels, params)
    masks = pruning.masks(scores, 0.5)
    masked = pruning.apply_masks(params, masks)
    assert scores["w"].sharding == masked["w"].sharding == spread
    np.testing.assert_array_equal(masks["w"], np.arange(32).reshape(8, 4) >= 16)

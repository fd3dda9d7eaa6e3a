"""Masks as bits: an eighth of the memory and of a checkpoint."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core


def pack_masks(masks: Any) -> Any:
    """Stores each mask as bits, eight to a byte, as `numpy.packbits` does.

    Args:
      masks: Pytree of bool, with `optax.MaskedNode()` where nothing is pruned.

    Returns:
      Pytree like `masks` of uint8[⌈size / 8⌉]: the entries in C order, the first in the highest
      bit of the first byte, zeros behind the last. `optax.MaskedNode()` stays.

    Raises:
      ValueError: If a mask is not bool.

    Example:
      >>> pack_masks({'w': jnp.array([[True, False, True]]), 'b': optax.MaskedNode()})
      {'b': MaskedNode(), 'w': Array([160], dtype=uint8)}
    """
    xp = core.namespace(masks)

    def pack(path, mask):
        if core.is_masked_node(mask):
            return mask
        if mask.dtype != bool:
            raise ValueError(f"masks must be bool, got {mask.dtype} at {path!r}")
        return core.on_device(xp.packbits(mask))

    return core.map_with_path(pack, masks)


def unpack_masks(packed: Any, like: Any) -> Any:
    """Restores what `pack_masks` stored.

    Args:
      packed: Pytree of uint8 vectors, with `optax.MaskedNode()` where nothing is pruned.
      like: Pytree with the shapes of the masks: the parameters, or `jax.ShapeDtypeStruct`s.

    Returns:
      Pytree of bool like the parameters; `optax.MaskedNode()` where `packed` has it.

    Raises:
      ValueError: If the structures differ, or a vector has not the bytes of its shape.

    Example:
      >>> like = {'w': jnp.ones((1, 3)), 'b': jnp.ones(3)}
      >>> unpack_masks({'w': jnp.array([160], jnp.uint8), 'b': optax.MaskedNode()}, like)
      {'b': MaskedNode(), 'w': Array([[ True, False,  True]], dtype=bool)}
    """
    core.check_same_paths("packed", packed, "like", like)
    xp, shapes = core.namespace(packed), core.flatten_paths(like)

    def unpack(path, bits):
        if core.is_masked_node(bits):
            return optax.MaskedNode()
        shape = np.shape(shapes[path])
        size = int(np.prod(shape))
        if bits.dtype != jnp.uint8 or bits.shape != (-(-size // 8),):
            raise ValueError(
                f"packed must have uint8[{-(-size // 8)}] at {path!r} for shape {shape}, "
                f"got {bits.dtype}{list(bits.shape)}"
            )
        return core.on_device(xp.unpackbits(bits, count=size).reshape(shape).astype(bool))

    return core.map_with_path(unpack, packed)

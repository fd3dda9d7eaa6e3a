"""Masks as bits: an eighth of the memory and of a checkpoint."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax import core


def pack_masks(masks: Any) -> Any:
    """Stores each mask as bits, eight to a byte, as `numpy.packbits` does: uint8[⌈size / 8⌉].

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
    """Restores what `pack_masks` stored, in the shapes of `like`, such as the parameters."""
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

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as st_numpy

from hybrid_jax import contrib, pruning

masks_of_any_shape = st_numpy.arrays(
    bool, st_numpy.array_shapes(min_dims=0, max_dims=4, max_side=5)
)


@settings(max_examples=60)
@given(mask=masks_of_any_shape)
def test_masks_come_back_from_their_bits(mask):
    masks = {"w": jnp.asarray(mask), "bias": optax.MaskedNode()}
    packed = contrib.pack_masks(masks)
    np.testing.assert_array_equal(packed["w"], np.packbits(mask))
    assert packed["bias"] == optax.MaskedNode()
    params = {"w": np.zeros(mask.shape), "bias": np.zeros(3)}
    restored = contrib.unpack_masks(packed, params)
    assert restored["w"].dtype == bool
    np.testing.assert_array_equal(restored["w"], mask)
    assert restored["bias"] == optax.MaskedNode()


def test_packing_compiles(key):
    masks = pruning.masks({"w": jax.random.uniform(key, (3, 3, 2, 5))}, 0.5)
    shapes = jax.eval_shape(lambda: masks)
    packed = jax.jit(contrib.pack_masks)(masks)
    assert packed["w"].shape == (12,)  # 90 bits
    restored = jax.jit(lambda bits: contrib.unpack_masks(bits, shapes))(packed)
    np.testing.assert_array_equal(restored["w"], masks["w"])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="masks must be bool, got float32 at 'w'"):
        contrib.pack_masks({"w": jnp.ones(2)})
    packed = contrib.pack_masks({"w": jnp.ones(9, bool)})
    for like in (jnp.ones(8), jnp.ones((4, 5))):
        with pytest.raises(ValueError, match=r"packed must have uint8\[.*\] at 'w' for shape"):
            contrib.unpack_masks(packed, {"w": like})
    with pytest.raises(ValueError, match="packed must have the structure of like, got 'v'"):
        contrib.unpack_masks(packed, {"w": jnp.ones(9), "v": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"got float32\[2\]"):
        contrib.unpack_masks({"w": jnp.ones(2)}, {"w": jnp.ones(9)})

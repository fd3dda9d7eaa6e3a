import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import data


def test_shift_moves_each_image_by_its_own_amount(key):
    # Pixel (2, 2) of 5×5 alone is lit: it stays inside for every shift of up to 2.
    images = jnp.zeros((64, 5, 5, 1), jnp.uint8).at[:, 2, 2].set(200)
    shifted = data.random_shift(images, key, padding=2)
    assert shifted.dtype == jnp.uint8
    lit = np.argwhere(np.asarray(shifted[..., 0]) == 200)
    assert lit[:, 0].tolist() == list(range(64))
    places = {tuple(place) for place in lit[:, 1:].tolist()}
    # 64 draws of 25 places: all rows and columns 0..4 occur, and more than the 5 of a diagonal.
    assert {row for row, _ in places} == {column for _, column in places} == set(range(5))
    assert len(places) > 5
    assert np.asarray(shifted).sum() == 64 * 200


def test_flip_mirrors_about_half(key):
    images = jnp.broadcast_to(jnp.arange(3.0).reshape(1, 1, 3, 1), (200, 1, 3, 1))
    rows = np.asarray(data.random_flip(images, key))[:, 0, :, 0]
    mirrored = rows[:, 0] == 2
    # Binomial(200, 1/2): mean 100, deviation 7; five deviations either side.
    assert 65 <= mirrored.sum() <= 135
    assert np.array_equal(rows, np.where(mirrored[:, None], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]))


def test_augmentation_is_pure_and_compiles_once(key):
    augment = data.augmentation(padding=1, flip=True)
    compiled = jax.jit(augment)
    images = jax.random.randint(key, (8, 6, 6, 3), 0, 256).astype(jnp.uint8)
    other = jax.random.key(1)
    assert np.array_equal(augment(images, key), compiled(images, key))
    assert not np.array_equal(compiled(images, key), compiled(images, other))
    assert compiled._cache_size() == 1
    assert np.array_equal(data.augmentation()(images, key), images)
    with pytest.raises(ValueError, match="padding must be an integer of at least 0, got -1"):
        data.augmentation(padding=-1)


def test_normalize_by_hand():
    images = jnp.array([[[[0, 255]]]], jnp.uint8)
    # (0 - 0.5) / 0.5 = -1 and (1 - 0.2) / 0.4 = 2.
    got = data.normalize(images, (0.5, 0.2), (0.5, 0.4))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got.ravel(), [-1, 2], rtol=1e-6)
    with pytest.raises(ValueError, match="std must have one value for each of 2 channels"):
        data.normalize(images, (0.5, 0.2), (0.5,))


def test_normalized_train_images_have_zero_mean_and_unit_deviation():
    splits = data.load("digits")
    images = np.asarray(data.normalize(splits.train.images, splits.mean, splits.std))
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-5)

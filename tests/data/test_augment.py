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


def test_padding_beyond_the_image_is_refused(key):
    images = jnp.zeros((2, 6, 4, 1), jnp.uint8)
    data.random_shift(images, key, padding=3)
    with pytest.raises(ValueError, match=r"padding must be an integer in \[0, 3\], got 4"):
        data.augmentation(padding=4)(images, key)


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_contract_of_every_augmentation(name, key):
    images = jax.random.randint(key, (32, 6, 8, 3), 50, 200).astype(jnp.uint8)
    augment = jax.jit(data.augmentation(others=[name]))
    got = augment(images, key)
    assert (got.shape, got.dtype) == (images.shape, images.dtype)
    assert np.array_equal(got, augment(images, key))
    assert not np.array_equal(got, augment(images, jax.random.key(1)))
    assert not np.array_equal(got, images)
    assert data.AUGMENTATIONS[name].__doc__


def test_augmentations_by_hand(key):
    images = jnp.full((200, 8, 10, 1), 100, jnp.uint8).at[:, 0].set(250)
    bright = np.asarray(data.AUGMENTATIONS["brightness"](images, key))
    assert bright[:, 1].min() >= 80
    assert bright[:, 1].max() <= 120
    assert bright[:, 0].max() == 255  # 300 is cut, not wrapped
    cut = np.asarray(data.AUGMENTATIONS["cutout"](images, key)[..., 0]) == 0
    # 8 // 4 = 2 to either side of a centre that may be at a corner: 5 × 5, or 3 × 3 of it inside.
    assert cut.sum(axis=(1, 2)).max() == 25
    assert cut.sum(axis=(1, 2)).min() == 9
    assert cut.any(axis=1).sum(axis=1).max() == cut.any(axis=2).sum(axis=1).max() == 5


def test_augmentation_of_the_users_own(key, monkeypatch):
    images = jnp.zeros((2, 4, 4, 1), jnp.uint8)
    monkeypatch.setitem(data.AUGMENTATIONS, "mine", lambda images, key: images + jnp.uint8(3))
    augment = data.augmentation(others=["mine", lambda images, key: images * jnp.uint8(2)])
    assert np.all(np.asarray(augment(images, key)) == 6)
    with pytest.raises(ValueError, match=r"augmentation must be one of .*, got 'cutuot'.*cutout"):
        data.augmentation(others=["cutuot"])
    floats = data.augmentation(others=[lambda images, key: images / 2])
    with pytest.raises(ValueError, match=r"images after augmentation .* must have .*uint8"):
        floats(images, key)


@data.moving
def turned(images, key):
    return images[:, ::-1]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_labels_move_along_with_their_pixels(key, dtype):
    """Each label is that of its pixel's value before; what comes in from outside is void."""
    augment = data.augmentation(
        padding=2, flip=True, others=["flip", turned, "flip"], label_kind="pixels"
    )
    labels = jnp.broadcast_to(jnp.arange(30).reshape(1, 5, 6), (64, 5, 6)).astype(jnp.int32)
    images = (labels + 100)[..., None].astype(dtype)
    seen = np.asarray(augment(images, key))[..., 0].astype(int)
    moved = np.asarray(jax.jit(augment.labels)(labels, key))
    assert moved.dtype == np.int32
    assert np.array_equal(moved, np.where(seen == 0, -1, seen - 100))
    assert len(np.unique(moved, axis=0)) > 30
    assert (moved == -1).any()
    # What was void stays so, and shifts of nothing bring nothing in.
    assert np.all(np.asarray(augment.labels(0 * labels - 1, key)) == -1)
    still = data.augmentation(flip=True, label_kind="pixels")
    assert (np.asarray(still.labels(labels, key)) >= 0).all()


def test_labels_stay_where_their_pixels_do(key):
    """Darker or in part black, a pixel is what it was."""
    own = data.in_place(lambda images, key: images // 2)
    augment = data.augmentation(others=["brightness", "cutout", own], label_kind="pixels")
    labels = jnp.arange(16).reshape(1, 4, 4)
    assert np.array_equal(augment.labels(labels, key), labels)


def test_what_may_move_pixels_without_their_labels_is_refused():
    others = [lambda images, key: images[:, ::-1]]
    message = r"must be marked as `in_place` or `moving` where pixels have labels, got .*lambda"
    with pytest.raises(ValueError, match=message):
        data.augmentation(others=others, label_kind="pixels")
    for kind in ("values", "classes", None):
        assert data.augmentation(others=others, label_kind=kind).labels is None


def test_normalize_by_hand():
    images = jnp.array([[[[0, 255]]]], jnp.uint8)
    # (0 - 0.5) / 0.5 = -1 and (1 - 0.2) / 0.4 = 2.
    got = data.normalize(images, (0.5, 0.2), (0.5, 0.4))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got.ravel(), [-1, 2], rtol=1e-6)
    with pytest.raises(ValueError, match="std must have one value for each of 2 channels"):
        data.normalize(images, (0.5, 0.2), (0.5,))

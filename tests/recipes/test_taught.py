"""A teacher that answers once to a few views of each image."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_jax import data, models, recipes, training
from hybrid_jax.recipes import taught
from tests.recipes.test_members import tiny

IMAGES = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)
ARRAYS = data.Arrays(IMAGES, np.arange(5, dtype=np.int32))


def shifted(images, key):
    """Images of uint8 as floats, with another offset for each key."""
    return images.astype(np.float32) + jax.random.normal(key, (len(images), 1, 1, 1))


NETWORK = models.Network(
    lambda params, images: images.sum((1, 2)) @ params["w"][None],
    None,
    {"w": np.ones(3, np.float32)},
)


def answers(folder, augment=shifted, views=2, whose="a", network=NETWORK):
    return taught.answers(network, ARRAYS, augment, views, folder, whose, batch_size=2)


def test_answers_are_those_to_what_the_step_shows(tmp_path):
    found = answers(tmp_path)
    assert found.shape == (2, 5, 3)
    own = taught.Taught(answers=found)
    batch = {"image": IMAGES[[4, 1]], "index": np.array([4, 1], np.int32)}
    for epoch in range(3):
        entries = own.entries(batch, epoch)
        assert entries["view"].tolist() == [[4, 1], [9, 6]][epoch % 2]
        shown = training.of_views(shifted)(batch["image"], entries["view"])
        expected = NETWORK.predict(NETWORK.params, shown)
        np.testing.assert_allclose(entries["teacher"], expected, rtol=1e-6)
    assert taught.UNTAUGHT.entries(batch, 0) == {}


def test_what_is_kept_is_not_computed_again(tmp_path, monkeypatch):
    first = answers(tmp_path)
    monkeypatch.setattr(taught, "_view", lambda *_: pytest.fail("computed again"))
    np.testing.assert_array_equal(answers(tmp_path), first)
    np.testing.assert_array_equal(answers(tmp_path, views=1), first[:1])


@pytest.mark.parametrize(
    "changes",
    [
        {"whose": "b"},
        {"augment": lambda images, key: shifted(images, key) + 1},
        {"network": NETWORK._replace(params={"w": np.full(3, 2, np.float32)})},
    ],
)
def test_answers_are_of_one_teacher_and_its_images(tmp_path, changes):
    answers(tmp_path)
    answers(tmp_path, **changes)
    assert len(list(tmp_path.glob("*.npy"))) == 4


@pytest.mark.parametrize("damage", ["bit", "cut", "seal", "lost"])
def test_damaged_answers_are_made_again(tmp_path, damage):
    first = answers(tmp_path, views=1)
    (array,), (seal,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    whole = bytearray(array.read_bytes())
    if damage == "bit":
        whole[-3] ^= 1
    array.write_bytes(whole[: 40 if damage == "cut" else None])
    if damage == "seal":
        seal.write_text("[]")
    if damage == "lost":
        seal.unlink()
    np.testing.assert_array_equal(answers(tmp_path, views=1), first)
    assert len(list(tmp_path.iterdir())) == 2


def test_labels_of_pixels_move_with_their_view():
    flip = data.augmentation(flip=True, label_kind="pixels")
    images = np.arange(8 * 3, dtype=np.int32).reshape(8, 1, 3, 1)

    def loss_fn(params, state, batch, key):
        moved = (batch["label"] != images[..., 0]).any((1, 2))
        same = (batch["label"] == batch["image"][..., 0]).all()
        return params, (state, {"moved": moved.sum(), "same": same})

    state = training.create_state(jnp.float32(0), {}, optax.sgd(0.1), jax.random.key(0))
    batch = {"image": images, "label": images[..., 0], "view": np.arange(8, dtype=np.uint32)}
    _, metrics = training.make_step(loss_fn, flip)(state, batch)
    assert metrics["same"]
    assert 0 < metrics["moved"] < 8


@pytest.mark.slow
def test_a_run_with_views_goes_on_where_it_was(tmp_path):
    own = {"effort": "finetune", "teacher.views": 2, "deploy.targets": ("packed",)}
    config = tiny(**own, **{"teacher.answers": str(tmp_path / "shared")})
    first = recipes.run(config, tmp_path / "run")
    assert len(list((tmp_path / "shared").glob("*.npy"))) == 2
    again = recipes.run(tiny(**own), tmp_path / "run")
    assert again.accuracy == first.accuracy

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import data


def arrays(count):
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return data.Arrays(images, np.arange(count, dtype=np.int32))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 20))
def test_resuming_gives_what_would_have_come(count, batch_size, start):
    batch_size = min(count, batch_size)
    whole = data.batches(arrays(count), batch_size, seed=5, steps=start + 4)
    resumed = data.batches(arrays(count), batch_size, seed=5, start_step=start)
    for expected, got in zip(itertools.islice(whole, start, None), resumed, strict=False):
        assert expected.keys() == got.keys() == {"image", "label", "index"}
        assert all(np.array_equal(expected[k], got[k]) for k in expected)


def test_epochs_hold_every_example_once_in_new_orders():
    batches = list(data.batches(arrays(6), 2, seed=0, steps=6))
    epochs = [np.concatenate([b["index"] for b in batches[i : i + 3]]) for i in (0, 3)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert not np.array_equal(*epochs)
    for batch in batches:
        assert np.array_equal(batch["label"], batch["index"])
        assert np.array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)


def test_order_depends_on_seed_and_epoch_alone():
    # Held fixed: a changed order would break resuming of a run begun earlier.
    assert data.epoch_order(8, seed=0, epoch=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert not np.array_equal(data.epoch_order(8, 0, 1), data.epoch_order(8, 1, 0))


def test_labels_of_any_kind_go_with_their_images():
    images = arrays(6).images
    values = images.reshape(6, 1).astype(np.float32) / 2
    pixels = images.reshape(6, 1, 1).astype(np.int32)
    for labels in (values, pixels, None):
        (batch,) = data.batches(data.Arrays(images, labels), 4, seed=1, steps=1)
        if labels is None:
            assert batch.keys() == {"image", "index"}
        else:
            assert np.array_equal(batch["label"], labels[batch["index"]])
            assert batch["label"].dtype == labels.dtype


def test_bad_arguments_are_named_at_once():
    with pytest.raises(ValueError, match=r"batch_size must be an integer in \[1, 4\], got 5"):
        data.batches(arrays(4), 5, seed=0)
    with pytest.raises(ValueError, match="start_step must be an integer of at least 0, got -1"):
        data.batches(arrays(4), 2, seed=0, start_step=-1)
    wide = data.Arrays(arrays(2).images, np.array([0, 2**32 + 1]))  # 1, if it were cast
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2147483648\), got 4294967297 at"):
        data.batches(wide, 2, seed=0)

import builtins

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax import data


def test_resize_by_hand():
    # Halved: every pixel is a mean of its neighbours under a triangle of width 4, antialiased;
    # at the edges the triangle is cut: weights 3, 3, 1 of 7 for pixels 0, 1, 2.
    image = np.array([0, 70, 140, 210], np.uint8).reshape(1, 4, 1) * np.ones((2, 1, 2), np.uint8)
    got = data.fit("it", image, resize=(1, 2))
    assert got.shape == (1, 2, 2)
    # (3·0 + 3·70 + 1·140) / 7 = 50, and the mirror image, 210 - 50.
    assert got[0, :, 0].tolist() == got[0, :, 1].tolist() == [50, 160]


def test_crop_takes_the_centre():
    image = np.arange(30, dtype=np.uint8).reshape(5, 6, 1)
    assert data.fit("it", image, crop=(1, 2))[..., 0].tolist() == [[14, 15]]
    assert data.fit("it", image, crop=(3,))[:, 0, 0].tolist() == [8, 14, 20]  # 1.5 rounds to 2
    assert data.fit("it", image, crop=(5, 6)) is not None


@given(
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    short=st.integers(1, 40),
    channels=st.integers(1, 5),
)
def test_the_short_side_is_as_asked_and_the_long_one_in_proportion(sides, short, channels):
    image = np.full((*sides, channels), 7, np.uint8)
    got = data.fit("it", image, resize=(short,))
    assert min(got.shape[:2]) == short
    assert got.shape[:2] == tuple(int(short * side / min(sides) + 1e-9) for side in sides)
    assert got.shape[2] == channels
    assert np.all(got == 7)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1, 2, 3), r"resize must be one side or \(height, width\), got \(1, 2, 3\)"),
        (0, r"resize must be an integer in \[1, 16384\], got 0"),
        ((224, 1e3), r"resize must be an integer in \[1, 16384\], got 1000.0"),
        ("224", r"resize must be .*, got"),
    ],
)
def test_sizes_that_are_none(value, message):
    with pytest.raises(ValueError, match=message):
        data.check_size("resize", value)


def test_without_pillow_one_line_says_what_to_install(monkeypatch):
    def absent(name, *rest):
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="resize need Pillow: pip install pillow"):
        data.fit("it", np.zeros((2, 2, 1), np.uint8), resize=(1,))

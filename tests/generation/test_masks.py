"""Training masks and their way to the latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.generation.masks import random_mask, to_latents


def test_masks_are_rectangles_and_now_and_then_everything():
    masks = np.asarray(jax.vmap(lambda key: random_mask(key, 32, 24))(jax.random.split(jax.random.key(0), 2000)))
    assert masks.shape == (2000, 32, 24, 1) and set(np.unique(masks)) == {0, 1}
    covered = masks.mean((1, 2, 3))
    assert (covered == 1).mean() == pytest.approx(0.25, abs=0.03)
    assert covered.min() >= 2 * 2 / (32 * 24) and len(np.unique(covered)) > 200
    some = masks[covered < 1]
    everywhere = some.mean((0, -1))
    assert everywhere.min() > 0.1 and everywhere.max() < 0.7, "every place is masked now and then"
    # A union of axis-parallel rectangles of at least an eighth, cut in half at most: no pixel stands alone.
    runs = np.diff(np.pad(some[..., 0], ((0, 0), (0, 0), (1, 1))), axis=-1)
    widths = np.nonzero(runs == -1)[2] - np.nonzero(runs == 1)[2]
    assert widths.min() >= 2


def test_nearest_takes_the_first_pixel_of_a_block():
    mask = jnp.arange(64.0).reshape(1, 8, 8, 1)
    np.testing.assert_array_equal(to_latents(mask, (4, 2, 3))[0, :, :, 0], np.arange(64).reshape(8, 8)[::2, ::4])

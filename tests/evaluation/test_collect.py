"""Features of images, collected from any number of devices and in any batches."""

import jax
import numpy as np
import pytest

from jaxdiff.config import ShardingConfig
from jaxdiff.evaluation.collect import Collector, make_extract, provenance_of
from jaxdiff.evaluation.inception_score import softmax
from jaxdiff.models.features import Features
from jaxdiff.training.sharding import batch_sharding, make_mesh
from tests.evaluation.tiny_extractor import tiny_extractor

EXTRACTOR = tiny_extractor()
IMAGES = np.random.default_rng(0).integers(0, 256, (53, 8, 8, 1), dtype=np.uint8)


def collect(images=IMAGES, devices=1, batch_per_device=4, from_device=False, **options):
    mesh = make_mesh(ShardingConfig(), jax.devices()[:devices])
    size = devices * batch_per_device

    def on_device():
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.uint8)])
            yield jax.device_put(padded, batch_sharding(mesh)), len(part)

    batches = on_device() if from_device else [(images[:30], 30), (images[30:], len(images) - 30)]
    collector = Collector(**options)
    for features in make_extract(EXTRACTOR, mesh, batch_per_device)(batches):
        collector.add(features)
    return collector.statistics(provenance_of(EXTRACTOR, "random images"))


@pytest.mark.parametrize(
    "how",
    [
        {"batch_per_device": 7},
        {"devices": 4},
        {"devices": 8, "batch_per_device": 16},
        {"devices": 8, "from_device": True},
        {"from_device": True, "batch_per_device": 53},
    ],
)
def test_batches_and_devices_do_not_matter(how):
    one, other = collect(spatial=True), collect(**how, spatial=True)
    assert other.provenance.num_images == len(IMAGES)
    for name in ("mean", "covariance", "spatial_covariance", "marginal"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(other.features, one.features)


def test_order_does_not_matter():
    one, other = collect(), collect(IMAGES[::-1])
    np.testing.assert_allclose(other.covariance, one.covariance, rtol=1e-9)


def test_they_are_the_features_moments():
    found = collect(spatial=True)
    raw = EXTRACTOR.features(EXTRACTOR.params, IMAGES)
    np.testing.assert_allclose(found.features, raw.pool, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(np.asarray(found.features, np.float64).T), rtol=1e-9)
    np.testing.assert_allclose(found.spatial_mean, np.asarray(raw.spatial).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.probabilities, softmax(np.asarray(raw.logits)), rtol=1e-4)
    np.testing.assert_allclose(found.marginal, found.probabilities.mean(0), rtol=1e-6)


def test_only_so_many_features_are_kept():
    assert collect(keep=0).features is None
    np.testing.assert_array_equal(collect(keep=10).features, collect().features[:10])
    assert collect().spatial_mean is None


def test_features_that_are_not_finite_are_named():
    collector = Collector()
    good = Features(np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32))
    collector.add(good)
    bad = good._replace(pool=np.array([[1, 1], [1, np.nan], [1, 1]], np.float32))
    with pytest.raises(ValueError, match="features of image 4 are not finite"):
        collector.add(bad)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images(count):
    collector = Collector()
    if count:
        collector.add(Features(np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)))
    with pytest.raises(ValueError, match=f"somewhere: scores need at least 2 images, not {count}"):
        collector.statistics(provenance_of(EXTRACTOR, "somewhere"))

"""Moments of batches are the moments of the whole, whatever the batches."""

import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxdiff.evaluation.moments import Moments, merge_processes

FEATURES = np.random.default_rng(0).normal(size=(103, 7)) * 3 + 50


def streamed(features, size):
    moments = Moments.empty(features.shape[1])
    for start in range(0, len(features), size):
        moments = moments.merge(Moments.of(features[start : start + size]))
    return moments


@pytest.mark.parametrize("size", [1, 2, 10, 50, 103, 1000])
def test_batch_size_does_not_matter_and_the_last_batch_counts(size):
    moments = streamed(FEATURES, size)
    assert moments.count == 103
    np.testing.assert_allclose(moments.mean, FEATURES.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(FEATURES.T), rtol=1e-9)


def test_order_does_not_matter():
    a, b = streamed(FEATURES, 10), streamed(FEATURES[np.random.default_rng(1).permutation(103)], 9)
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-9)


def test_a_large_mean_costs_no_digits():
    """Raw sums of products would lose all of them: 1e8 squared, times 1e-16, is 1."""
    np.testing.assert_allclose(streamed(FEATURES + 1e8, 10).covariance, np.cov(FEATURES.T), rtol=1e-6)


def test_float32_features_are_summed_in_float64():
    features = FEATURES.astype(np.float32)
    np.testing.assert_allclose(streamed(features, 10).covariance, np.cov(features.astype(np.float64).T), rtol=1e-12)


def test_merging_with_nothing():
    moments = Moments.of(FEATURES)
    for merged in (Moments.empty(7).merge(moments), moments.merge(Moments.empty(7)), merge_processes(moments)):
        np.testing.assert_array_equal(merged.covariance, moments.covariance)


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_needs_two_images(count):
    with pytest.raises(ValueError, match=f"at least 2 images, not {count}"):
        streamed(FEATURES[:count], 1).covariance  # noqa: B018


PROCESS = """
    import sys
    import jax, numpy as np
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    index, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    from jaxdiff.evaluation.collect import Collector
    from jaxdiff.evaluation.statistics import Provenance
    from jaxdiff.models.features import Features
    rng = np.random.default_rng(0)
    pool, logits = rng.normal(size=(103, 7)).astype(np.float32) + 50, rng.normal(size=(103, 5)).astype(np.float32)
    collector = Collector(spatial=True)
    for start in range(index, 103, 2 * 20):
        rows = slice(start, start + 2 * 20, 2)
        collector.add(Features(pool[rows], logits[rows], pool[rows, :3]))
    found = collector.statistics(Provenance(data="test"))
    np.savez(f"{out}/{index}.npz", mean=found.mean, covariance=found.covariance, features=found.features, pool=pool,
             count=found.provenance.num_images, spatial=found.spatial_covariance, p=found.probabilities, logits=logits)
"""


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    """Real processes over loopback: uneven shares, float64 kept, features in their order on both."""
    import socket

    from jaxdiff.evaluation.inception_score import softmax

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    code, root = textwrap.dedent(PROCESS), pathlib.Path(__file__).parents[2]
    commands = [[sys.executable, "-c", code, str(i), str(port), str(tmp_path)] for i in range(2)]
    processes = [subprocess.Popen(command, cwd=root) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for i in range(2):
        found = np.load(tmp_path / f"{i}.npz")
        pool = found["pool"].astype(np.float64)
        assert found["count"] == 103
        np.testing.assert_allclose(found["mean"], pool.mean(0), rtol=1e-13)
        np.testing.assert_allclose(found["covariance"], np.cov(pool.T), rtol=1e-9)
        np.testing.assert_allclose(found["spatial"], np.cov(pool[:, :3].T), rtol=1e-9)
        np.testing.assert_array_equal(found["features"], found["pool"])
        np.testing.assert_allclose(found["p"], softmax(found["logits"]), rtol=1e-6)

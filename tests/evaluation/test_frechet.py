"""The Frechet distance against closed forms, reference values and scipy's root of a matrix."""

import numpy as np
import pytest
import scipy.linalg

from jaxdiff.evaluation.frechet import (
    distance_to,
    frechet_distance,
    frechet_infinite,
    frechet_standard_error,
    symmetric_root,
)
from jaxdiff.evaluation.moments import Moments


def distance_of(x, y):
    a, b = Moments.of(x), Moments.of(y)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_closed_forms():
    d = 2048
    eye, zero = np.eye(d), np.zeros(d)
    assert frechet_distance(zero, eye, np.ones(d), eye) == pytest.approx(2048, rel=1e-12)
    eye, zero = np.eye(16), np.zeros(16)
    assert frechet_distance(zero, eye, zero, 4 * eye) == pytest.approx(16, rel=1e-12)


def test_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 1], [1, 2]]), np.diag([3.0, 1])
    assert frechet_distance(np.array([1.0, -1]), a, np.zeros(2), b) == pytest.approx(2.5166852264521, abs=1e-12)


def test_reference_value_of_torch_fidelity():
    rng = np.random.RandomState(2023)
    assert distance_of(rng.randn(1024, 64), rng.randn(1024, 64)) == pytest.approx(2.2164077433, abs=1e-9)
    rng = np.random.RandomState(2023)
    assert distance_of(rng.randn(32768, 256), rng.randn(32768, 256)) == pytest.approx(1.0144363585, abs=1e-9)


@pytest.mark.parametrize("n", [200, 12])  # 12: singular covariances
def test_agrees_with_scipy(n):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 24)) @ rng.normal(size=(24, 24)), rng.normal(size=(n + 5, 24)) + 0.3
    a, b = Moments.of(x), Moments.of(y)
    values = scipy.linalg.eigvals(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance)
    expected -= 2 * np.sqrt(np.maximum(values.real, 0)).sum()
    # Each of 24 eigenvalues that should be 0 is a rounding error, whose root is 1.5e-8 of the largest.
    largest = max(np.linalg.norm(a.covariance, 2), np.linalg.norm(b.covariance, 2))
    bound = 24 * np.sqrt(np.finfo(float).eps) * largest
    assert distance_of(x, y) == pytest.approx(expected, abs=bound)
    assert distance_of(y, x) == pytest.approx(distance_of(x, y), abs=bound)
    assert distance_of(x, x) == pytest.approx(0, abs=bound)


def test_rotation_changes_nothing_and_scaling_scales():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(100, 8)), rng.normal(size=(100, 8)) * 2
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert distance_of(x @ rotation, y @ rotation) == pytest.approx(distance_of(x, y), rel=1e-10)
    assert distance_of(3 * x, 3 * y) == pytest.approx(9 * distance_of(x, y), rel=1e-10)


def test_root_squares_to_the_matrix_even_if_singular():
    a = np.random.default_rng(2).normal(size=(6, 3))
    matrix = a @ a.T
    np.testing.assert_allclose(symmetric_root(matrix) @ symmetric_root(matrix), matrix, atol=1e-12)


def test_known_root_gives_the_same():
    rng = np.random.default_rng(3)
    a, b = Moments.of(rng.normal(size=(50, 5))), Moments.of(rng.normal(size=(60, 5)))
    direct = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert distance_to(b.mean, b.covariance)(a.mean, a.covariance) == pytest.approx(direct, rel=1e-12)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(3), np.eye(3), "3 and 2 dimensions"),
        (np.array([0, np.nan]), np.eye(2), "not finite"),
        (np.zeros(2), np.full((2, 2), np.inf), "not finite"),
    ],
)
def test_bad_moments_are_refused(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(mean, covariance, np.zeros(2), np.eye(2))


def test_standard_error_is_the_spread_over_fresh_samples():
    """Against the spread of the distance over 200 fresh draws of the images, which no bootstrap can see."""
    rng = np.random.default_rng(4)
    d, n = 8, 400
    reference = (np.full(d, 0.3), np.eye(d))
    fresh = [distance_to(*reference)(*_moments(rng.normal(size=(n, d)))) for _ in range(200)]
    error = frechet_standard_error(rng.normal(size=(n, d)), *reference, replicates=200)
    assert error == pytest.approx(np.std(fresh), rel=0.25)


def test_infinitely_many_images():
    """The bias of few images is gone: N(0, 1) against itself gives 0, where the plain distance is far from it."""
    rng = np.random.default_rng(5)
    d, n = 16, 1000
    x = rng.normal(size=(n, d))
    plain = distance_to(np.zeros(d), np.eye(d))(*_moments(x))
    limits = [frechet_infinite(x, np.zeros(d), np.eye(d), seed=seed) for seed in range(4)]
    assert plain > 0.05
    assert abs(np.mean(limits)) < plain / 4


def _moments(x):
    moments = Moments.of(x)
    return moments.mean, moments.covariance


def test_same_seed_same_error():
    x = np.random.default_rng(6).normal(size=(50, 4))
    errors = [frechet_standard_error(x, np.zeros(4), np.eye(4), 10, seed) for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


def test_too_few_replicates_or_images():
    x = np.random.default_rng(7).normal(size=(6, 2))
    with pytest.raises(ValueError, match="at least 2 bootstrap replicates"):
        frechet_standard_error(x, np.zeros(2), np.eye(2), replicates=1)
    with pytest.raises(ValueError, match="at least 8 images"):
        frechet_infinite(x, np.zeros(2), np.eye(2))

"""The inception score against closed forms and reference values."""

import numpy as np
import pytest

from jaxdiff.evaluation.inception_score import inception_score, softmax


@pytest.mark.parametrize("k", [2, 10, 1008])
def test_one_hot_rows_over_all_classes_give_their_number(k):
    assert inception_score(np.eye(k), splits=1).mean == pytest.approx(k, rel=1e-12)


def test_identical_rows_give_one():
    rows = np.tile([0.1, 0.2, 0.7], (20, 1))
    assert inception_score(rows) == pytest.approx((1, 0), abs=1e-12)


def test_reference_values():
    assert inception_score(np.array([[0.9, 0.1], [0.1, 0.9]]), 1).mean == pytest.approx(1.44493481, abs=1e-8)
    for k, expected in ((10, 6.06355983), (1008, 365.063534)):
        assert inception_score(0.9 * np.eye(k) + 0.1 / k, 1).mean == pytest.approx(expected, rel=1e-8)


def test_splits_are_consecutive_and_all_images_count():
    """Of 7 images in 2 splits the first has 3, and the std is the population's."""
    p = softmax(np.random.default_rng(0).normal(size=(7, 4)) * 3)
    parts = [inception_score(p[:3], 1).mean, inception_score(p[3:], 1).mean]
    assert inception_score(p, 2) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-12)


def test_given_marginal():
    """Exp of the mean KL(p(y|x) || q) with q given, whatever the images' own marginal is."""
    p, q = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([0.25, 0.75])
    divergences = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), np.log(4)]
    assert inception_score(p, 1, q).mean == pytest.approx(np.exp(np.mean(divergences)), rel=1e-12)
    assert inception_score(p, 1, p.mean(0)).mean == pytest.approx(inception_score(p, 1).mean, rel=1e-12)


def test_softmax_of_large_logits():
    np.testing.assert_allclose(softmax(np.array([[1000.0, 1000, -1000]])), [[0.5, 0.5, 0]])


@pytest.mark.parametrize(
    ("rows", "splits", "marginal", "message"),
    [
        (np.eye(3), 4, None, "3 images cannot use 4 splits"),
        (np.eye(3), 0, None, "cannot use 0 splits"),
        (np.full((4, 2), 0.4), 1, None, "sum 1"),
        (np.full((4, 2), np.nan), 1, None, "finite"),
        (np.array([[1.5, -0.5]]), 1, None, "not negative"),
        (np.eye(3), 1, np.ones(2) / 2, "marginal has 2 classes, the probabilities have 3"),
    ],
)
def test_bad_rows_are_refused(rows, splits, marginal, message):
    with pytest.raises(ValueError, match=message):
        inception_score(rows, splits, marginal)

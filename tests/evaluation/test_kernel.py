"""KID against its definition, a reference value and the truth for Gaussians."""

import numpy as np
import pytest

from jaxdiff.evaluation.kernel import kernel_distance, kernel_standard_error, mmd2


def test_reference_value():
    x, y = np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 1], [0, 0]])
    assert mmd2(x, y) == pytest.approx(-2.375, abs=1e-12)


def test_is_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert mmd2(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_is_unbiased():
    """Sets of one distribution give 0 on average, however small; one side shifted gives a positive number."""
    rng = np.random.default_rng(1)
    values = [mmd2(rng.normal(size=(5, 4)), rng.normal(size=(5, 4))) for _ in range(4000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(4000)
    assert mmd2(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 1) > 0.5


def test_subsets():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(40, 4)) + 0.5
    whole = kernel_distance(x, y[:30], num_subsets=3, subset_size=30)
    assert whole.mean == pytest.approx(mmd2(x, y[:30]), rel=1e-10)  # a subset of all images has no choice
    assert whole.std == pytest.approx(0, abs=1e-12)
    few = kernel_distance(x, y, 50, 10, seed=1)
    assert few.std > 0
    assert few == kernel_distance(x, y, 50, 10, seed=1) != kernel_distance(x, y, 50, 10, seed=2)


def test_standard_error_is_the_spread_over_fresh_samples():
    rng = np.random.default_rng(3)

    def draw():
        return rng.normal(size=(200, 6)), rng.normal(size=(150, 6)) + 0.4

    fresh = np.std([mmd2(*draw()) for _ in range(200)])
    assert np.mean([kernel_standard_error(*draw()) for _ in range(5)]) == pytest.approx(fresh, rel=0.2)


def test_bad_input_is_refused():
    x = np.zeros((5, 3))
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        mmd2(x, np.zeros((5, 2)))
    with pytest.raises(ValueError, match="at least 2 images"):
        mmd2(x, x[:1])
    with pytest.raises(ValueError, match="subsets of 6 need 2 to 5 images"):
        kernel_distance(x, x, subset_size=6)
    with pytest.raises(ValueError, match="at least 2 bootstrap replicates"):
        kernel_standard_error(x, x, 1)

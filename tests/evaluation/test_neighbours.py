"""Precision and recall on sets whose balls can be drawn by hand."""

import numpy as np
import pytest

from jaxdiff.evaluation import neighbours
from jaxdiff.evaluation.neighbours import precision_recall


def test_points_on_a_line():
    """K = 1. Real 0, 1, 3: radii 1, 1, 2. Generated 0.5, 2.5, 6, 20: radii 2, 2, 3.5, 14."""
    real, generated = np.array([[0.0], [1], [3]]), np.array([[0.5], [2.5], [6], [20]])
    # In [0-1, 0+1], [1-1, 1+1] or [3-2, 3+2]: 0.5 and 2.5. In [-1.5, 2.5], [0.5, 4.5], [2.5, 9.5] or [6, 34]: all real ones.
    assert precision_recall(real, generated, k=1) == (0.5, 1.0)
    assert precision_recall(generated, real, k=1) == (1.0, 0.5)


def test_the_same_set_is_perfect_and_distant_sets_share_nothing():
    x = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_a_lost_class_costs_recall_and_not_precision():
    rng = np.random.default_rng(1)
    centres = np.repeat(np.eye(4) * 50, 50, axis=0)
    real, generated = centres + rng.normal(size=(200, 4)), centres[:100] + rng.normal(size=(100, 4))
    scores = precision_recall(real, generated)
    assert scores.precision > 0.8
    assert 0.3 < scores.recall < 0.55


def test_a_common_offset_and_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    real, generated = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) + 0.5
    whole = precision_recall(real, generated)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    assert precision_recall(real + 1e4, generated + 1e4) == whole
    assert 0 < whole.precision < 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))

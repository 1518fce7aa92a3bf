"""Intervals of means, against what is known of them."""

import numpy as np
import pytest

from evaluations.bootstrap import mean_interval


def test_against_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, (400, 2)) * [1, 10]
    mean, low, high = mean_interval(values)
    error = values.std(0) / 20
    assert mean == pytest.approx(values.mean(0))
    for edge, sign in ((low, -1), (high, 1)):
        assert (edge - mean) / error == pytest.approx([1.96 * sign] * 2, abs=0.1)


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    values = rng.exponential(1, (100, 500))  # 500 experiments of 100 images
    _, low, high = mean_interval(values)
    assert ((low < 1) & (high > 1)).mean() == pytest.approx(0.94, abs=0.02)


def test_shape_and_seed():
    values = np.arange(12.0).reshape(3, 2, 2)
    mean, low, high = mean_interval(values, seed=1)
    assert mean.shape == low.shape == high.shape == (2, 2)
    alone = mean_interval(values[:, 0, 1], seed=1)
    assert [part[0, 1] for part in (mean, low, high)] == pytest.approx(alone)
    assert mean_interval(np.full(5, 0.25)) == (0.25, 0.25, 0.25)

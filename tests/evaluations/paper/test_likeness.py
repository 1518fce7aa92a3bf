"""Likeness of images whose likeness is known."""

import numpy as np
import pytest

from evaluations.paper.likeness import colour_distance, cosine, described, intersection
from tests.evaluations.conftest import pictures
from tests.evaluations.stand_in import StandIn


def test_colours():
    images = np.zeros((3, 4, 6, 3), np.uint8)
    images[1, :, :3] = images[2] = (255, 0, 0)  # black, half red, red
    black, half, red = ({name: values[i] for name, values in described(images, StandIn()).items()} for i in range(3))
    assert intersection(half["histogram"], red["histogram"]) == 0.5
    assert intersection(black["histogram"], red["histogram"]) == 0
    assert colour_distance(half["colour"], black["colour"]) == 0.5
    assert black["histogram"].sum() == red["histogram"].sum() == 1


def test_cosine():
    one = np.array([[1, 0], [3, 4]], np.float32)
    assert cosine(one, np.array([1, 1])) == pytest.approx([np.sqrt(0.5), 7 / np.sqrt(50)])
    assert cosine(one, 5 * one) == pytest.approx([1, 1])


def test_many_images_are_described_as_alone():
    images = pictures(70, seed=1)
    together = described(images, StandIn())
    for name, values in together.items():
        alone = np.concatenate([described(images[i : i + 1], StandIn())[name] for i in (0, 33, 69)])
        assert values[[0, 33, 69]] == pytest.approx(alone)
        assert len(values) == 70

"""Continued images and their likeness to the first, on tiny models and on pictures whose likeness is known."""

import json

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample.sampler import Sampler
from evaluations.extractors import EvaluationError
from evaluations.paper import figure4
from evaluations.paper.figure4 import first_row_below, fixed_tokens, likenesses
from tests.evaluations.conftest import pictures
from tests.evaluations.stand_in import StandIn

WHOLE, BELOW = 0, 1
FIXED, FREE, OTHER = 0, 1, 2


def test_shares_of_the_paper():
    assert fixed_tokens(576) == [0, 6, 12, 29, 58, 115, 173, 230, 288]


def test_what_is_below_the_fixed_tokens():
    """In a 24 x 24 grid of 16 pixels each: the rows that have one, and one more."""
    assert [first_row_below(n, 24, 384) for n in (0, 6, 24, 25, 29, 288)] == [0, 32, 32, 48, 48, 208]
    assert first_row_below(570, 24, 384) == 368  # something is left


def test_copied_pixels_are_not_likeness():
    """Three shares: nothing fixed; the upper half copied and no effect below; and everything alike."""
    first, free = pictures(6, seed=1), pictures(12, seed=2).reshape(6, 2, 8, 8, 3)
    others = np.stack([free, free, np.stack([first, first], 1)], 1)
    others[:, 1, :, :4] = first[:, None, :4]
    labels = np.array([0, 0, 1, 1, 2, 2])
    batches = [(first[part], others[part]) for part in (slice(0, 4), slice(4, 6))]
    for name, values in likenesses(batches, labels, [0, 4, 6], StandIn()).items():
        assert values.shape == (2, 3, 3, 6)
        better = -values if name == "colour" else values
        assert better[WHOLE, FIXED, 1].mean() > better[WHOLE, FREE, 1].mean()
        assert values[BELOW, FIXED, 1] == pytest.approx(values[BELOW, FREE, 1])
        assert values[:, FIXED, 2] == pytest.approx(0 if name == "colour" else 1)
        assert values[:, FIXED, 0] == pytest.approx(values[:, FREE, 0])
        assert values[WHOLE, FREE, 0] == pytest.approx(values[WHOLE, FREE, 2])


def test_other_classes_are_all_of_them():
    first = np.full((3, 4, 4, 3), 51, np.uint8)
    first[1], first[2] = 255, 102
    others = first[:, None, None]
    found = likenesses([(first, others)], np.array([7, 8, 8]), [0], StandIn())["colour"]
    assert found[WHOLE, OTHER, 0] / np.sqrt(3) == pytest.approx([(0.8 + 0.2) / 2, 0.8, 0.2])
    with pytest.raises(EvaluationError, match="one class"):
        likenesses([(first, others)], np.array([7, 7, 7]), [0], StandIn())


def test_report(protocol_file, tmp_path, monkeypatch):
    """Six images in two batches; started again, nothing is sampled but a batch that is gone."""
    monkeypatch.setattr(figure4, "SHARES", (0, 5, 50))
    argv = ["--model", str(protocol_file()), "--images", "6", "--variants", "2", "--output", str(tmp_path / "out")]
    figure4.main(argv)
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert found["tokens"] == [0, 2, 18] and found["first_row_below"] == [0, 4, 8]
    mean = np.array(found["likeness"]["features"]["mean"])
    assert mean.shape == (2, 3, 3) and (mean[:, FIXED, 0] == mean[:, FREE, 0]).all()
    assert mean[WHOLE, FIXED, -1] > mean[WHOLE, FREE, -1]
    with Image.open(tmp_path / "out" / "figure4.png") as image:
        assert image.size == (5 * 16 + 4, 6 * (12 + 18 + 4) + 4)
    assert (tmp_path / "out" / "curve.png").exists()

    (first, second) = sorted(tmp_path.glob("samples/figure4/*/tokens-*.npz"))
    with np.load(first) as tokens:
        assert tokens["first"].shape == (4, 36) and tokens["others"].shape == (4, 3, 2, 36)
        for share, count in enumerate([0, 2, 18]):
            same = tokens["others"][:, share] == tokens["first"][:, None]
            assert same[..., :count].all() and not same.all(-1).any()
    calls, sample = [], Sampler.tokens
    monkeypatch.setattr(Sampler, "tokens", lambda *a, **k: calls.append(len(a[1])) or sample(*a, **k))
    content = dict(np.load(second))
    figure4.main(argv)
    assert not calls
    second.unlink()
    figure4.main(argv)
    assert calls == [2] * (1 + 2 * 3)
    with np.load(second) as again:
        assert all(np.array_equal(again[name], array) for name, array in content.items())
    assert json.loads((tmp_path / "out" / "table.json").read_text())["likeness"] == found["likeness"]

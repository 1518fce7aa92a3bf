"""Figures 5, 10 and 11 on tiny models."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluations.paper import figure5, figure10, figure11
from evaluations.paper.figure5 import likeness
from evaluations.paper.likeness import cosine


def panels(path, rows, columns):
    """The images of a figure, uint8 [rows, columns, 12, 12, 3]."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    panel = (12 + 18 + 8, columns * 16 + 4)  # padding 4, a caption of 12
    assert pixels.shape == (rows * (panel[0] + 22 + 8) + 8, panel[1] + 16, 3)
    tops = [8 + i * (panel[0] + 22 + 8) + 4 for i in range(rows)]
    lefts = [8 + 4 + i * 16 for i in range(columns)]
    return np.array([[pixels[y : y + 12, x : x + 12] for x in lefts] for y in tops])


def test_figure10(protocol_file, launched, tmp_path):
    argv = ["--model", str(protocol_file()), "--images", "6", "--columns", "3", "--output", str(tmp_path / "out")]
    figure10.main(argv)
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    shown = panels(tmp_path / "out" / "figure10.png", 3, 3)
    for run, row in zip(found["runs"], shown, strict=True):
        assert np.array_equal(np.load(f"{run}/samples.npz")["arr_0"][[0, 2, 4]], row)
    assert [row["slots"] for row in found["rows"]] == [36, 18, 9]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| ADSA-9 of 36 | 9 (-75.0 %) |" in table and table.startswith("`bash scripts/reproduce_figure10.sh --model")
    figure10.main(argv)
    assert launched == ["sample_c2i_ddp"] * 3


def test_figure11(protocol_file, launched, tmp_path):
    figure11.main(["--model", str(protocol_file()), "--images", "2", "--output", str(tmp_path / "out")])
    assert launched == ["sample_t2i_ddp"] * 2
    dense, sparse = panels(tmp_path / "out" / "figure11.png", 2, 2)
    assert not np.array_equal(dense, sparse)


def test_figure5(protocol_file, launched, tmp_path):
    path = protocol_file({"flags": ["--cpu", "--label-distribution", "uniform"]})
    figure5.main(["--model", str(path), "--budget", "9", "--images", "6", "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["title"] for row in found["rows"]] == [
        "ADSA-9 of 36",
        "STREAMING-9 of 36",
        "WINDOW-9 of 36",
        "dense, other seeds",
    ]
    assert found["rows"][0]["less_adsa"] == 0 and found["other_seed"] == 2
    dense, *_, other = found["runs"]
    assert np.array_equal(np.load(f"{dense}/labels.npy"), np.load(f"{other}/labels.npy"))
    features = [np.load(f"{run}/samples.features-stand-in.npz")["features"] for run in (dense, other)]
    assert found["rows"][-1]["cosine"] == pytest.approx(cosine(*features).mean())
    panels(tmp_path / "out" / "figure5.png", 4, 6)
    assert launched == ["sample_c2i_ddp"] * 5
    # As many images with classes as drawn are other runs, elsewhere.
    figure10.main(["--model", str(path), "--images", "6", "--output", str(tmp_path / "figure10")])
    assert launched == ["sample_c2i_ddp"] * 8


def test_differences_are_paired():
    """A cache that is worse by the same amount for every image is surely worse, however different the images are."""
    adsa = np.linspace(0.1, 0.9, 20)
    found = likeness(adsa - 0.05, adsa)
    assert found["less_adsa_interval"] == pytest.approx([-0.05, -0.05])
    low, high = found["cosine_interval"]
    assert low < found["cosine"] - 0.05 and high > found["cosine"] + 0.05

"""Power spectra against what is known in closed form, and the script on tiny models."""

import json

import numpy as np
import pytest

from evaluations.paper import spectrum
from evaluations.paper.spectrum import power_spectra

SIZE = 64


def wave(cycles, amplitude=0.1):
    """[SIZE, SIZE]: a plane wave with so many cycles along x, on grey."""
    return 0.5 + amplitude * np.cos(2 * np.pi * cycles * np.arange(SIZE) / SIZE)[None, :].repeat(SIZE, 0)


def test_white_noise_is_flat():
    noise = 0.5 + 0.1 * np.random.default_rng(0).standard_normal((800, SIZE, SIZE))
    frequencies, power, shares = power_spectra(noise)
    assert frequencies.tolist() == [k / SIZE for k in range(1, SIZE // 2 + 1)]
    assert power.mean(0)[2:] / 0.01 == pytest.approx(1, abs=0.05)  # the first two lack the mean
    assert shares.mean() == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize(("cycles", "share"), [(10, 0), (14, 0), (18, 1), (30, 1)])
def test_a_wave_is_where_it_belongs(cycles, share):
    _, power, shares = power_spectra(np.stack([wave(cycles), wave(cycles).T]))
    assert (power.argmax(1) + 1 == cycles).all()
    others = np.abs(np.arange(1, SIZE // 2 + 1) - cycles) > 1  # the window widens a line by one to either side
    assert power[:, others].max() < 1e-20
    assert shares == pytest.approx(share, abs=1e-12)


def test_blur_takes_the_expected_share():
    """Two waves of equal energy, averaged over neighbours: |H|^2 = cos^2(pi f) along x."""
    sharp = wave(8, 0.2) + wave(24, 0.2)
    blurred = (sharp + np.roll(sharp, 1, axis=1)) / 2
    low, high = np.cos(np.pi * np.array([8, 24]) / SIZE) ** 2
    _, power, shares = power_spectra(np.stack([sharp, blurred]))
    assert shares == pytest.approx([0.5, high / (low + high)], abs=1e-9)
    assert (power[1] / power[0])[[7, 23]] == pytest.approx([low, high], abs=1e-9)


def test_contrast_and_brightness_do_not_matter():
    images = np.random.default_rng(1).uniform(size=(3, 16, 16))
    assert power_spectra(images)[2] == pytest.approx(power_spectra(5 + 3 * images)[2])


def test_one_colour_has_no_details():
    _, power, shares = power_spectra(np.full((2, 12, 12), 0.7))
    assert power.max() < 1e-25 and shares.tolist() == [0, 0]


def test_report(protocol_file, launched, tmp_path, capsys):
    """Dense, both budgets, the data and their reconstructions; by the budgets' runs as they are in their folders."""
    path = protocol_file()
    spectrum.main(["--model", str(path), "--output", str(tmp_path / "out")])
    assert launched == ["sample_c2i_ddp"] * 3
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    dense, *budgets, data, reconstructions = found["rows"]
    assert [row["title"] for row in (dense, *budgets)] == ["dense", "ADSA-18 of 36", "ADSA-9 of 36"]
    assert [row["images"] for row in found["rows"]] == [6] * 5 and found["image_size"] == 12
    assert (data["title"], reconstructions["title"]) == ("data", "data, VQ reconstructions")
    for row in budgets:
        low, high = row["less_dense_interval"]
        assert row["less_dense"] == pytest.approx(row["share"] - dense["share"]) and low <= row["less_dense"] <= high
    images = np.load(next(iter(found["runs"])) + "/samples.npz")["arr_0"]
    _, power, shares = power_spectra(images @ [0.299, 0.587, 0.114] / 255)
    assert dense["share"] == pytest.approx(shares.mean()) and dense["power"] == pytest.approx(power.mean(0))
    assert (tmp_path / "out" / "spectrum.png").exists()
    assert capsys.readouterr().out.startswith("`bash scripts/reproduce_spectrum.sh --model ")


def test_without_the_data(protocol_file, launched, tmp_path):
    """What the runs say is told all the same, and so is what is missing."""
    path = protocol_file({"reference": "nowhere"})
    spectrum.main(["--model", str(path), "--images", "4", "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["images"] for row in found["rows"]] == [4] * 3
    assert "Not measured: data: " in (tmp_path / "out" / "table.md").read_text() and len(found["notes"]) == 2

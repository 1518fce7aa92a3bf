"""The grid script, end to end on tiny random models."""

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample import sample_c2i
from autoregressive.sample.grid import table
from autoregressive.sample.options import OptionError
from tokenizer.tokenizer_image.images import save_image_atomic

from .conftest import start


def test_one_grid(models, tmp_path, capsys):
    output = tmp_path / "new" / "grid.png"
    sample_c2i.main([*models, "--output", str(output), "--class-labels", "3", "thing a", "3"])
    told = capsys.readouterr().out
    assert told.endswith(f"{output}\n")
    assert "3 images of 12 px, 36 tokens each" in told
    with Image.open(output) as image:
        grid = np.asarray(image)
    images = [grid[4:16, x : x + 12] for x in (4, 20, 36)]  # four pixels between and around
    assert all(image.std() > 10 for image in images)
    assert not np.array_equal(images[0], images[2]), "the same class twice, with another seed"


def test_compares_caches_on_the_same_noise(models, tmp_path, capsys, monkeypatch):
    rows = []
    monkeypatch.setattr(
        "autoregressive.sample.grid.table", lambda given, images: rows.extend(given) or table(given, images)
    )
    output, widths = tmp_path / "grid.png", []

    def save(path, image):
        widths.append(image.width)
        save_image_atomic(path, image)

    monkeypatch.setattr("autoregressive.sample.grid.save_image_atomic", save)
    flags = ["--output", str(output), "--class-labels", "1", "2", "--cache-local", "4"]
    sample_c2i.main([*models, *flags, "--compare", "full", "adsa-36", "window-8"])
    lines = capsys.readouterr().out.splitlines()
    dense, whole, window = (line.split() for line in lines[2:5])
    assert (dense[0], dense[1]) == ("dense", "36")
    assert (window[0], window[3]) == ("WINDOW-8", "8")
    assert float(window[4]) <= float(dense[2])
    assert whole[3] == "36"
    assert rows[0][2] is not rows[1][2], "each has its own clock"
    assert widths[0] < widths[1] < widths[2], "one cache more each time"
    with Image.open(output) as image:
        grid = np.asarray(image)
    panel = (grid.shape[1] - 16) // 3
    left, middle, right = (grid[16:28, 16 + i * panel : i * panel + panel] for i in range(3))
    assert np.array_equal(left, middle), "a budget of all tokens is the dense cache"
    assert not np.array_equal(left, right)


def test_several_rows_at_once(models, tmp_path):
    grids = []
    for window in ("6", "5"):  # the tokens of a row are raster order
        output = tmp_path / f"{window}.png"
        flags = ["--class-labels", "1", "2", "--output", str(output), "--cache-policy", "adsa", "--cache-budget", "20"]
        sample_c2i.main([*models, *flags, "--zipar-window", window])
        with Image.open(output) as image:
            grids.append(np.asarray(image))
    assert grids[0].shape == grids[1].shape and not np.array_equal(*grids)


def test_quantised(models, tmp_path):
    """In the same precision: other images, but not others altogether."""
    grids = {}
    for name in ("none", "int8"):
        output = tmp_path / f"{name}.png"
        flags = ["--class-labels", "1", "2", "--precision", "none", "--quantize", name, "--output", str(output)]
        sample_c2i.main([*models, *flags])
        with Image.open(output) as image:
            grids[name] = np.asarray(image).astype(int)
    off = np.abs(grids["int8"] - grids["none"])
    assert 0 < off.mean() < 0.8 * np.abs(grids["none"][:, ::-1] - grids["none"]).mean()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--compare", "dens"], "'dens' is neither full nor POLICY-BUDGET"),
        (["--compare", "windw-8"], "did you mean 'window'"),
        (["--zipar-window", "7"], "window must be 1 to 6, the tokens of a row, not 7"),
        (["--zipar-window", "2", "--cache-policy", "adsa", "--cache-budget", "7"], "budget 7 is too small"),
        (["--class-labels", "11"], "class 11 is not among"),
        (["--output", "{file}/grid.png"], None),
    ],
)
def test_refused_before_sampling(models, tmp_path, flags, told):
    (tmp_path / "file").write_text("in the way")
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    with pytest.raises(OptionError if told else OSError, match=told):
        sample_c2i.main([*models, "--output", str(tmp_path / "grid.png"), *flags])
    assert not (tmp_path / "grid.png").exists()


def test_as_a_command(models, tmp_path):
    """From another working directory; errors are one line, without a traceback."""
    job = start("sample_c2i.py", *models, "--output", str(tmp_path / "grid.png"), "--class-labels", "nothing")
    _, err = job.communicate(timeout=300)
    assert job.returncode == 1
    assert "error: run.grid_labels: 'nothing' is no class" in err
    assert "Traceback" not in err

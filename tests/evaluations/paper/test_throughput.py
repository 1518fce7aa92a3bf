"""Images per second to the batch that fits, from a benchmark's table."""

import json

import pytest

from autoregressive.sample.options import OptionError
from evaluations.paper import throughput

GB = 10**9


def row(cache, images, seconds, per_image=GB, demand=True):
    turn = {"steps": 100, "demand": {"weight_bytes": 2.0 * GB} if demand else None}
    rate = images / (100 * seconds)
    summary = {"step_ms": {"p50": 1000 * seconds}, "steady_images_per_second": rate, "cache_bytes": images * per_image}
    return {"images": images, "cache": cache, "turns": {"0": turn}, "summary": summary if demand else {}}


@pytest.fixture
def record():
    rows = [row("dense", n, 0.01 + 0.002 * n) for n in (1, 4, 16)]
    rows += [row("adsa-9", n, 0.01 + 0.001 * n, GB // 2) for n in (1, 16)]
    rows += [row("falling", 1, 0.02), row("falling", 16, 0.01), row("through 0", 1, 0.01), row("through 0", 2, 0.03)]
    rows += [row("once", 1, 0.01), row("zipar", 1, 0.01, demand=False), row("zipar", 4, 0.01, demand=False)]
    about = {"model": "GPT-X", "settings": {"dtype": "bf16", "tokens": 576}}
    return about | {"command": "some command", "machine": "a machine", "rows": rows}


def test_lines(record):
    dense, adsa, falling, through = throughput.lines_of(record)
    assert (dense.cache, dense.images, dense.per_image) == ("dense", [1, 4, 16], GB)
    assert (dense.fixed, dense.each, adsa.each) == pytest.approx((0.01, 0.002, 0.001))
    assert [dense.fits(gb * GB) for gb in (1, 8, 24)] == [0, 6, 22] and adsa.fits(8 * GB) == 12
    assert dense.rate(22) == pytest.approx(22 / (100 * (0.01 + 0.002 * 22)))
    assert (falling.each, through.fixed) == pytest.approx((0, 0))
    assert through.each == pytest.approx((100 + 200 / 3) / (100**2 + (200 / 3) ** 2))


def test_weights_are_those_of_figure9(record):
    (line, *_) = throughput.lines_of(record | {"model": "GPT-XL"})
    assert line.weights == 2 * 774_699_520 + 4 * 71_948_939


def test_report(record, tmp_path, capsys):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(record))
    throughput.main([str(path), "--caches", "dense", "adsa-9", "--output", str(tmp_path / "out")])
    text = (tmp_path / "out/throughput.md").read_text()
    assert "| dense | 0.833 | 2.222 | 3.810 | 2.727 (6) | 4.074 (22)" in text
    assert "| adsa-9 | 0.909 | - | 6.154 |" in text and "falling" not in text
    assert "some command" in text and "a machine" in text and text.strip() in capsys.readouterr().out
    assert (tmp_path / "out/throughput.png").stat().st_size > 5000


def test_refused(record, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(record))
    with pytest.raises(OptionError, match=r"--caches once: not timed at two batch sizes; dense, adsa-9, fall"):
        throughput.main([str(path), "--caches", "once", "dense"])
    path.write_text(json.dumps(record | {"rows": record["rows"][:1]}))
    with pytest.raises(OptionError, match=r"table\.json: no cache was timed at two batch sizes"):
        throughput.main([str(path)])
    path.write_text("{}")
    with pytest.raises(OptionError, match=r"no table\.json of scripts/benchmark\.sh"):
        throughput.main([str(path)])

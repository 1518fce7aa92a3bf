"""The fold's benchmark on a tiny shape."""

import json

import pytest

from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from scripts import benchmark_fold


@pytest.fixture
def tiny(monkeypatch):
    """One shape, of 1 layer, 2 heads of 8 and 5 text tokens, for images of 36 tokens."""
    args = {"dim": 16, "n_layer": 1, "n_head": 2, "multiple_of": 16}
    shape = {"cls_token_num": 5, "caption_dim": 12, "vocab_size": 64}
    monkeypatch.setitem(GPT_models, "GPT-Tiny", lambda **given: Transformer(ModelArgs(**args, **given)))
    monkeypatch.setattr(benchmark_fold, "SHAPES", {"GPT-Tiny": shape})
    monkeypatch.setattr(benchmark_fold, "TOKENS", 36)


def test_table(tiny, tmp_path, capsys):
    flags = ["--caches", "full", "adsa-12", "--steps", "3", "--repeats", "2", "--batch-size", "2", "--cpu"]
    benchmark_fold.main([*flags, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["command"].startswith("python scripts/benchmark_fold.py --caches full adsa-12")
    assert (record["steps"], record["repeats"], record["batch_size"], record["threads"] > 0) == (3, 2, 2, True)
    slots = [(row["cache"], row["fold"], row["text_slots"], row["image_slots"]) for row in record["rows"]]
    adsa = "ADSA-12 of 36"
    assert slots == [("dense", False, 5, 36), ("dense", True, 1, 36), (adsa, False, 5, 12), (adsa, True, 1, 12)]
    for row in record["rows"]:
        assert row["slots"] == row["text_slots"] + row["image_slots"]
        assert row["kv_bytes"] == 2 * 4 * 2 * row["slots"] * 8 * 4  # k and v, rows, heads, slots, dimensions, float32
        assert row["bytes"] > row["kv_bytes"]
        low, high = sorted(row["ms_per_step_all"])
        assert 0 < low <= row["ms_per_step"] <= high
    table = (tmp_path / "table.md").read_text()
    assert f"| GPT-Tiny | {adsa} | yes | 13 (1 + 12) |" in table
    assert record["command"] in table
    assert table.split("\n\n")[0] in capsys.readouterr().out


def test_caches_are_full_when_timed(tiny):
    """Else an evicting cache would be timed while it doesn't evict."""
    model = benchmark_fold.build("GPT-Tiny", benchmark_fold.torch.device("cpu"), benchmark_fold.torch.float32)
    for config, count in ((benchmark_fold.CacheConfig("full"), 33), (benchmark_fold.CacheConfig("adsa", 12), 12)):
        kv = benchmark_fold.filled(model, config, 1, 3)
        assert kv.layers[0].slots.filled == count
        benchmark_fold.step_time(model, kv, 3)
        assert kv.layers[0].count == count, "a copy was timed"


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--caches", "adsa"], "'adsa' is neither full nor POLICY-BUDGET"),
        (["--caches", "adsaa-12"], "did you mean 'adsa'"),
        (["--repeats", "0"], "--repeats must be at least 1, not 0"),
    ],
)
def test_refused(capsys, flags, told):
    with pytest.raises(SystemExit):
        benchmark_fold.main(flags)
    assert told in capsys.readouterr().err

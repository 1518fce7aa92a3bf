"""The loss on real images through a cache."""

import json
import re

import numpy as np
import pytest
import torch

from adsa import CacheConfig
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.recorded import RecordedSteps
from autoregressive.sample.options import OptionError
from evaluations import perplexity
from evaluations.perplexity import cache_name, main, parse_cache, token_losses
from tests.autoregressive.sample.conftest import CLASSES, tiny  # noqa: F401
from tests.golden import fill_weights
from tests.tape import recorder


@pytest.mark.parametrize("text", [False, True])
def test_a_dense_cache_gives_the_loss_of_whole_sequences(text):
    args = {"dim": 32, "n_layer": 2, "n_head": 2, "block_size": 16, "vocab_size": 24, "num_classes": 5}
    if text:
        args |= {"model_type": "t2i", "caption_dim": 6, "cls_token_num": 4}
    model = fill_weights(Transformer(ModelArgs(**args)), 1).double().eval()
    generator = torch.manual_seed(0)
    tokens = torch.randint(24, (3, 16), generator=generator)
    cond = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64) if text else torch.tensor([0, 3, 4])
    logits, _ = model(idx=tokens[:, :-1], cond_idx=cond)
    expected = torch.nn.functional.cross_entropy(logits.mT, tokens, reduction="none")
    for cache in (None, CacheConfig("adsa", 16, 2, 4)):
        torch.testing.assert_close(token_losses(model, tokens, cond, cache=cache), expected, atol=1e-10, rtol=0)
    sparse = token_losses(model, tokens, cond, cache=CacheConfig("adsa", 8, 2, 4))
    torch.testing.assert_close(sparse[:, :9], expected[:, :9], atol=1e-10, rtol=0)  # nothing is gone by then
    assert not torch.allclose(sparse[:, 9:], expected[:, 9:], atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("cache", [None, CacheConfig("adsa", 9), CacheConfig("adsa", 9, mode="select")], ids=str)
def test_played_steps_have_the_same_losses(monkeypatch, cache, text, scale):
    """On a GPU steps are played, where that can be; here on tapes."""
    shape = {"dim": 32, "n_layer": 2, "n_head": 4, "block_size": 25, "vocab_size": 24}
    kind = {"model_type": "t2i", "caption_dim": 6, "cls_token_num": 4} if text else {"num_classes": 5}
    model = fill_weights(Transformer(ModelArgs(**shape | kind)), 1).double().eval()
    generator, tapes = torch.Generator().manual_seed(0), []
    tokens = torch.randint(24, (2, 25), generator=generator)
    cond = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64) if text else torch.tensor([1, 4])
    masks = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]) if text else None
    rest = {"cache": cache, "cfg_scale": scale}
    expected = token_losses(model, tokens, cond, masks, **rest)
    monkeypatch.setattr(perplexity, "_plays", lambda device: True)
    monkeypatch.setattr(perplexity, "RecordedSteps", lambda *args: RecordedSteps(*args, recorder(tapes)))
    torch.testing.assert_close(token_losses(model, tokens, cond, masks, **rest), expected)
    assert bool(tapes) == (cache is None or cache.mode == "evict")


def test_caches_are_written_and_read():
    for text in ("full", "adsa-256", "keydiff-96:prefix=24,local=48", "adsa-64:granularity=layer,fold_condition=false"):
        assert cache_name(parse_cache(text)) == text
    assert parse_cache("adsa-96:local=48,prefix=0") == CacheConfig("adsa", 96, 0, 48)
    for text in (
        "adsa",
        "adsa-96:locl=4",
        "nothing-5",
        "full:budget=3",
        "adsa-96:local",
        "adsa-96:budget=48",
        "adsa-96:local=[",
    ):
        with pytest.raises(OptionError, match=re.escape(f"cache '{text}'")):
            parse_cache(text)


@pytest.fixture
def arguments(tiny, tmp_path):  # noqa: F811
    codes = tmp_path / "codes"
    codes.mkdir()
    np.save(codes / "codes.npy", np.random.default_rng(0).integers(0, 64, (7, 1, 36)).astype(np.uint16))
    np.save(codes / "labels.npy", np.arange(7))
    (codes / "meta.json").write_text(json.dumps({"classes": CLASSES, "codebook_size": 64}))
    config = tmp_path / "dense.yaml"
    config.write_text(f"model:\n  gpt_ckpt: {tiny / 'gpt.safetensors'}\n  vq_ckpt: {tiny / 'vq.safetensors'}\n")
    return ["--config", str(config), "--code-path", str(codes), "--output", str(tmp_path / "out"), "--cpu"]


def test_the_script_measures_what_is_missing(arguments, tmp_path, capsys):
    main([*arguments, "--caches", "adsa-12", "--images", "5", "--batch-size", "2"])
    cells = tmp_path / "out" / "cells"
    before = {path.name: path.stat().st_mtime_ns for path in cells.iterdir()}
    assert set(before) == {"full.json", "adsa-12.json"}
    main([*arguments, "--caches", "adsa-12", "window-12:local=12", "--images", "5", "--batch-size", "5"])
    assert {path.name: path.stat().st_mtime_ns for path in cells.iterdir()}.items() > before.items()
    told = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(told["results"]) == ["full", "adsa-12", "window-12:local=12"]
    assert all(len(found["losses"]) == 5 for found in told["results"].values())
    dense, sparse = (np.array(told["results"][name]["losses"]) for name in ("full", "adsa-12"))
    assert f"{(sparse - dense).mean():+.4f}" in capsys.readouterr().out
    with pytest.raises(OptionError, match="another number of them"):
        main([*arguments, "--images", "4"])
    split = told["results"]["adsa-12"]
    split["cache"]["prefix"] += 1
    (cells / "adsa-12.json").write_text(json.dumps(split))
    with pytest.raises(OptionError, match=r"adsa-12\.json: .* another default split"):
        main([*arguments, "--caches", "adsa-12", "--images", "5"])
    for damaged in ('{"cache": {}', "{}", "[]"):
        (cells / "full.json").write_text(damaged)
        with pytest.raises(OptionError, match=r"full\.json: no readable result .*; delete it"):
            main([*arguments, "--images", "5"])


def test_losses_by_row(arguments, tmp_path, monkeypatch):
    made = torch.arange(36.0).expand(7, -1) + torch.arange(7.0)[:, None]
    batches = iter(made.split(4))
    monkeypatch.setattr(perplexity, "token_losses", lambda *args, **kwargs: next(batches))
    main([*arguments, "--batch-size", "4"])
    found = json.loads((tmp_path / "out" / "cells" / "full.json").read_text())
    assert found["by_row"] == [2.5 + 3, 8.5 + 3, 14.5 + 3, 20.5 + 3, 26.5 + 3, 32.5 + 3]
    assert found["losses"] == [17.5 + image for image in range(7)]


def test_a_quantised_model_is_another(arguments, tmp_path):
    config, cell = tmp_path / "dense.yaml", tmp_path / "out" / "cells" / "full.json"
    config.write_text(config.read_text() + "  precision: none\n")
    main(arguments)
    before = json.loads(cell.read_text())
    assert "quantize" not in before["identity"], "or cells from before there was the option would be refused"
    config.write_text(config.read_text() + "  quantize: int8\n")
    with pytest.raises(OptionError, match=r"full\.json: of another model"):
        main(arguments)
    cell.unlink()
    main(arguments)
    after = json.loads(cell.read_text())
    assert after["identity"] == before["identity"] | {"quantize": "int8"}
    assert before["losses"] != after["losses"] == pytest.approx(before["losses"], abs=0.1)


def test_codes_of_another_size_are_refused(arguments, tmp_path):
    codes = tmp_path / "codes"
    np.save(codes / "codes.npy", np.zeros((7, 1, 16), np.uint16))
    with pytest.raises(OptionError, match="images of 16 tokens; the model's have 36"):
        main(arguments)
    np.save(codes / "codes.npy", np.zeros((7, 1, 36), np.uint16))
    (codes / "meta.json").write_text(json.dumps({"classes": CLASSES, "codebook_size": 128}))
    with pytest.raises(OptionError, match="a tokenizer that has 128; the model knows 64"):
        main(arguments)

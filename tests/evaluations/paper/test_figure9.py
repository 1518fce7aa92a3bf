import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adsa import CacheConfig
from autoregressive.models.checkpoint import CheckpointError
from autoregressive.models.generate import new_cache
from autoregressive.models.gpt import ModelArgs
from autoregressive.sample.run_folder import RunError
from evaluations.paper import figure9
from evaluations.paper.figure9 import Shape, cache_bytes, weight_bytes
from evaluations.paper.protocol import load_protocol
from tokenizer.tokenizer_image.vq_model import ModelArgs as VQArgs

SIZES = {"dim": 32, "n_layer": 3, "n_head": 4, "multiple_of": 16, "block_size": 36, "vocab_size": 64}
CLASSES = ModelArgs(**SIZES, num_classes=10)
TEXT = ModelArgs(**SIZES, model_type="t2i", caption_dim=8, cls_token_num=7)
MODELS = {"c2i": CLASSES, "t2i": TEXT, "two heads of keys": replace(CLASSES, n_kv_head=2)}
CACHES = {
    "dense": CacheConfig("full"),
    "unfolded": CacheConfig("full", fold_condition=False),
    "of all": CacheConfig("adsa", 36),
    "of more": CacheConfig("adsa", 50),
    "24": CacheConfig("adsa", 24),
    "8": CacheConfig("adsa", 8),
    "8 unfolded": CacheConfig("adsa", 8, fold_condition=False),
}


def shape(args=CLASSES, precision="none", guided=True):
    vq = VQArgs(ch=8, z_channels=16, encoder_ch_mult=[1, 2], decoder_ch_mult=[1, 2], num_res_blocks=1, codebook_size=64)
    return Shape("tiny c2i", args, vq, precision, guided, (24, 8))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["none", "bf16"])
@pytest.mark.parametrize("config", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
def test_formula(args, config, precision, device):
    """A cache on no device at all is laid out as on a GPU."""
    for images, guided in ((1, False), (3, False), (2, True)):
        sizes = shape(args, precision, guided)
        gpt, _ = sizes.models()
        gpt = gpt.to_empty(device="cpu" if device == "cpu" else "meta")
        masks = torch.ones(images, args.cls_token_num, device=gpt.output.weight.device) if args is TEXT else None
        kv = new_cache(gpt, images, args.block_size, masks, 2.0 if guided else 1.0, config)
        expected = cache_bytes(sizes, config, images, device)
        assert kv.kv_nbytes() == expected["kv"]
        assert sum(tensor.untyped_storage().nbytes() for tensor in kv.tensors()) == sum(expected.values())
        if device == "cpu":
            assert kv.nbytes() == sum(expected.values())


@pytest.mark.parametrize("config", [CACHES["dense"], CACHES["8"]], ids=["dense", "8"])
def test_rows(config):
    """Images and guidance multiply."""
    one = cache_bytes(shape(guided=False), config, 1)
    for images, guided, rows in ((5, False, 5), (1, True, 2), (5, True, 10)):
        assert cache_bytes(shape(guided=guided), config, images) == {name: rows * size for name, size in one.items()}


def test_fold():
    """Seven text tokens in one slot save six slots, and nothing else."""
    whole, folded = (cache_bytes(shape(TEXT), CACHES[name], 1) for name in ("unfolded", "dense"))
    per_slot = 2 * 3 * 2 * 32 * 4
    assert whole["kv"] - folded["kv"] == 6 * per_slot
    assert folded["kv"] == (1 + 36) * per_slot


def test_llamagen_xl():
    """Sizes known from its checkpoints: 777,923,840 values, 71,948,939 of the tokenizer; 180 KiB per token and row."""
    text = figure9.shape_of(load_protocol("XL").t2i, "XL", torch.device("cpu"))
    gpt, vq = map(weight_bytes, text.models())
    assert (gpt, vq) == (2 * 777_923_840, 4 * 71_948_939)
    assert list(text.caches) == [
        "dense, text not folded",
        "dense",
        "ADSA-768 of 1024",
        "ADSA-640 of 1024",
        "ADSA-512 of 1024",
    ]
    dense, unfolded, half = (text.caches[name] for name in ("dense", "dense, text not folded", "ADSA-512 of 1024"))
    assert cache_bytes(text, dense, 1)["kv"] == 2 * 1025 * 180 * 1024
    assert cache_bytes(text, unfolded, 1)["kv"] == 2 * 1144 * 180 * 1024
    assert cache_bytes(text, half, 1, "cuda")["kv"] == 2 * 514 * 180 * 1024, "a bias in bf16 takes two slots"
    classes = figure9.shape_of(load_protocol("XL").c2i, "XL", torch.device("cpu"))
    assert (classes.gpt.block_size, classes.budgets, classes.guided) == (576, (384, 256), True)
    assert list(classes.caches) == ["dense", "ADSA-384 of 576", "ADSA-256 of 576"]


def test_saved_and_fitting():
    sizes = shape()
    rows = figure9.rows_of(sizes, [1, 64], "cpu")
    assert [(row["images"], row["cache"]) for row in rows[:3]] == [
        (1, "dense"),
        (1, "ADSA-24 of 36"),
        (1, "ADSA-8 of 36"),
    ]
    for row in rows:
        dense = next(other for other in rows if (other["images"], other["cache"]) == (row["images"], "dense"))
        assert row["total_bytes"] == row["gpt_bytes"] + row["vq_bytes"] + row["cache_bytes"]
        assert row["cache_saved"] == pytest.approx(1 - row["cache_bytes"] / dense["cache_bytes"], abs=1e-6)
        assert row["total_saved"] == pytest.approx(1 - row["total_bytes"] / dense["total_bytes"], abs=1e-6)
    assert rows[2]["total_saved"] < rows[5]["total_saved"] < rows[5]["cache_saved"]
    row, weights = rows[0], rows[0]["gpt_bytes"] + rows[0]["vq_bytes"]
    assert figure9.fitting(row, weights + 5 * row["cache_bytes"]) == 5
    assert figure9.fitting(row, weights + 5 * row["cache_bytes"] - 1) == 4
    assert figure9.fitting(row, weights - 1) == 0


@pytest.mark.parametrize("name", ["dense", "8", "8 unfolded"])
@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_measure(name, precision):
    found = figure9.measure(shape(TEXT, precision), CACHES[name], 2, "cpu")
    expected = cache_bytes(shape(TEXT, precision), CACHES[name], 2)
    assert (found["kv"], found["allocated"]) == (expected["kv"], sum(expected.values()))


def test_measured_in_a_fresh_process():
    """Resident memory grows by what was filled: 48 MiB of cache, and little else."""
    large = shape(replace(CLASSES, dim=128, n_layer=8), guided=True)
    config, images = CACHES["dense"], 83
    found = figure9.measured(large, config, images, "cpu")
    expected = sum(cache_bytes(large, config, images).values())
    assert found["allocated"] == expected > 40 * 2**20
    assert 0.9 * expected < found["cache"] < 1.3 * expected


def killed(*_):
    os._exit(9)


def test_a_process_that_is_killed(monkeypatch):
    monkeypatch.setattr(figure9, "measure", killed)
    with pytest.raises(RunError, match=r"tiny with 4 images: the process was killed.*smaller --max-gib"):
        figure9.measured(SimpleNamespace(name="tiny"), None, 4, "cpu")


def test_results(protocol_file, tmp_path, monkeypatch, capsys):
    points, out = [], tmp_path / "figure9"

    def measured(*point):
        points.append(point)
        return figure9.measure(*point)

    monkeypatch.setattr(figure9, "measured", measured)
    flags = ["--model", str(protocol_file()), "--tasks", "c2i", "--output", str(out), "--batch-sizes", "2", "1"]
    figure9.main([*flags, "--max-gib", "0.5"])
    record = json.loads((out / "table.json").read_text())
    told = (out / "table.md").read_text()
    assert [(point[0].name, point[2]) for point in points] == [("tiny c2i", 1)] * 3 + [("tiny c2i", 2)] * 3
    assert len(record["rows"]) == 12, "of the tiny model and of LlamaGen-XL"
    for row in record["rows"]:
        if row["model"] == "tiny c2i":
            assert row["measured"]["allocated"] == row["cache_bytes"]
        else:
            assert row["measured"] is None
    assert told.startswith("`bash scripts/reproduce_figure9.sh --model ")
    assert "off the formula by at most 0 bytes" in told
    assert re.search(r"## XL c2i: 576 tokens, bf16, with guidance\n\nWeights: GPT 1\.4\d+ GiB", told)
    assert re.search(r"\| saved of the cache \| 0.0 % \| 3\d\.\d % \| 5\d\.\d % \|", told)
    for name in ("tiny_c2i", "XL_c2i"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    points.clear()
    figure9.main([*flags, "4", "--max-gib", "0.5"])
    assert [point[2] for point in points] == [4] * 3, "the others are there already"
    capsys.readouterr()


def test_sizes_that_only_a_missing_checkpoint_tells(protocol_file, tmp_path):
    path = protocol_file()
    config = tmp_path / "c2i.yaml"
    config.write_text(config.read_text().replace("gpt.safetensors", "gone.safetensors"))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        figure9.main(["--model", str(path), "--tasks", "c2i", "--output", str(tmp_path / "out")])

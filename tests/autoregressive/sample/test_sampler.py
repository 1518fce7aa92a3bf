"""Models from options and checkpoints, seeds, and decoding."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.checkpoint import CheckpointError, read_state_dict, save_safetensors
from autoregressive.models.loops import multiplies
from autoregressive.models.recorded import RecordedSteps
from autoregressive.sample import sampler
from autoregressive.sample.options import ModelOptions, OptionError, Options
from autoregressive.sample.sampler import Blueprint, Sampler, image_seeds
from tests.tape import operations_alone, recorder
from tokenizer.tokenizer_image.images import to_uint8

CPU = torch.device("cpu")


def model_options(tiny, **given):
    return ModelOptions(**{"gpt_ckpt": str(tiny / "gpt.safetensors"), "vq_ckpt": str(tiny / "vq.safetensors"), **given})


def test_checkpoints_tell_the_sizes(tiny):
    options = model_options(tiny)
    blueprint = Blueprint(options, CPU)
    assert (options.gpt_model, options.vq_model, options.precision) == ("GPT-Demo", "VQ-8-Demo", "none")
    assert (options.image_size, options.downsample_size, options.codebook_size, options.num_classes) == (12, 2, 64, 10)
    assert blueprint.tokens == 36
    assert all(parameter.is_meta for parameter in blueprint.gpt.parameters()), "no memory before the weights are read"


def test_flags_win(tiny):
    blueprint = Blueprint(model_options(tiny, image_size=16), CPU)
    assert blueprint.tokens == blueprint.gpt.config.block_size == 64


def test_released_files_get_llamagens_defaults(tiny, tmp_path):
    """A .pt tells nothing of itself, so the registered sizes hold, and the strict load finds what doesn't fit."""
    for name in ("gpt", "vq"):
        torch.save({"model": read_state_dict(tiny / f"{name}.safetensors")}, tmp_path / f"{name}.pt")
    options = Options(model=ModelOptions(gpt_ckpt=str(tmp_path / "gpt.pt"), vq_ckpt=str(tmp_path / "vq.pt")))
    blueprint = Blueprint(options.model, CPU)
    model = options.model
    assert (model.gpt_model, model.vq_model, model.image_size, model.num_classes) == ("GPT-B", "VQ-16", 384, 1000)
    assert (blueprint.tokens, blueprint.gpt.config.vocab_size) == (576, 16384)
    with pytest.raises(CheckpointError, match=r"gpt\.pt doesn't fit"):
        Sampler(blueprint, options, CPU)


def test_released_text_models_get_llamagens_defaults(tiny, tmp_path):
    torch.save({"model": read_state_dict(tiny / "gpt_t2i.safetensors")}, tmp_path / "gpt.pt")
    options = model_options(tiny, gpt_ckpt=str(tmp_path / "gpt.pt"), gpt_type="t2i", vq_model="VQ-16")
    blueprint = Blueprint(options, CPU)
    assert (options.gpt_model, options.image_size, options.cls_token_num, options.caption_dim) == (
        ("GPT-XL", 512, 120, 2048)
    )
    assert blueprint.gpt.cls_embedding.uncond_embedding.shape == (120, 2048)
    assert blueprint.tokens == 1024


@pytest.mark.parametrize(
    "given, error, told",
    [
        ({"gpt_ckpt": None}, OptionError, "model.gpt_ckpt is not given"),
        ({"gpt_ckpt": "nowhere.pt"}, CheckpointError, "nowhere.pt"),
        ({"gpt_model": "GPT-XLL"}, OptionError, r"'GPT-XLL' is not registered \(did you mean GPT-XX?L\?\)"),
        ({"image_size": 13}, OptionError, "image_size 13 is not a multiple of VQ-8-Demo's 2"),
        ({"downsample_size": 16}, OptionError, "downsample_size is 16, but VQ-8-Demo's is 2"),
        ({"gpt_type": "t2i"}, OptionError, "a c2i model, and model.gpt_type is t2i"),
    ],
)
def test_refused(tiny, given, error, told):
    with pytest.raises(error, match=told):
        Blueprint(model_options(tiny, **given), CPU)


def test_strange_metadata_is_refused(tiny, tmp_path):
    state = read_state_dict(tiny / "gpt.safetensors")
    path = tmp_path / "gpt.safetensors"
    for args, told in (("{", "not JSON"), (json.dumps({"dim": 16, "wings": 2}), "make no model.*wings")):
        save_safetensors(path, state, {"model": "GPT-Demo", "args": args})
        with pytest.raises(OptionError, match=told):
            Blueprint(model_options(tiny, gpt_ckpt=str(path)), CPU)


def test_seeds_depend_on_index_alone():
    seeds = image_seeds(3, 100)
    assert seeds.dtype == np.int64
    assert seeds.min() >= 0
    assert len(set(seeds.tolist())) == 100
    assert np.array_equal(seeds[:10], image_seeds(3, 10))
    assert not set(seeds.tolist()) & set(image_seeds(4, 100).tolist())


def test_resizing_is_bicubic_without_antialias(tiny):
    options = Options(model=model_options(tiny))
    sampler = Sampler(Blueprint(options.model, CPU), options, CPU)
    tokens = torch.randint(64, (3, 36), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = sampler.vq.decode_code(tokens, (3, 8, 6, 6))
        small = F.interpolate(full, size=(8, 8), mode="bicubic", align_corners=False, antialias=False)
    assert np.abs(sampler.images(tokens, 12).astype(int) - to_uint8(full)).max() <= 1
    assert np.abs(sampler.images(tokens, 8).astype(int) - to_uint8(small)).max() <= 1
    assert sampler.seconds["vq"] > 0


def test_nothing_is_compiled_on_a_cpu(tiny):
    options = Options(model=model_options(tiny, compile=True))
    with pytest.raises(OptionError, match=r"model.compile is for a GPU: .*; leave it out"):
        Sampler(Blueprint(options.model, CPU), options, CPU)


def test_recorded_steps_change_no_token(tiny, monkeypatch):
    """Batches of one size share them; another size has its own."""
    options = Options(model=model_options(tiny, cuda_graphs=True))
    with pytest.raises(OptionError, match="needs a CUDA device, and this one is cpu"):
        Sampler(Blueprint(options.model, CPU), options, CPU)
    options.model.cuda_graphs = False
    options.cache.policy, options.cache.budget = "adsa", 12
    tapes = []
    operations_alone(monkeypatch)
    monkeypatch.setattr(sampler, "RecordedSteps", partial(RecordedSteps, recorder=recorder(tapes)))
    one, other = (Sampler(Blueprint(options.model, CPU), options, CPU) for _ in range(2))
    other.records = True
    counts = []
    for first, batch in ((0, 2), (2, 2), (4, 3), (0, 2)):
        cond, seeds = torch.arange(first, first + batch), torch.arange(first, first + batch)
        assert torch.equal(one.tokens(cond, seeds), other.tokens(cond, seeds))
        counts.append(len(tapes))
    assert 0 < counts[0] == counts[1] < counts[2] < counts[3]


def test_precision_is_the_gpts_alone(tiny):
    options = Options(model=model_options(tiny, precision="bf16"))
    sampler = Sampler(Blueprint(options.model, CPU), options, CPU)
    assert {p.dtype for p in sampler.gpt.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in sampler.vq.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision, dtype", [(None, torch.bfloat16), ("none", torch.float32)])
def test_quantised_is_bf16_unless_told(tiny, precision, dtype):
    options = Options(model=model_options(tiny, precision=precision, quantize="int8"))
    gpt = Sampler(Blueprint(options.model, CPU), options, CPU).gpt
    blocked = dtype == torch.bfloat16 and multiplies(torch.int8) is not None  # with scales of float32
    assert {p.dtype for p in gpt.parameters()} == {dtype, *([torch.uint8, torch.float32] if blocked else [torch.int8])}
    assert gpt.tok_embeddings.weight.dtype == dtype

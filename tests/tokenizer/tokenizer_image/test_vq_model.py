"""The tokenizer against LlamaGen's numbers, names and sizes."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden import GOLDEN, fill_weights
from tokenizer.tokenizer_image.images import to_uint8
from tokenizer.tokenizer_image.vq_model import ModelArgs, VQ_models, VQModel

LISTED = (Path(__file__).parents[2] / "data" / "llamagen_vq_state_dict.txt").read_text()


def listed_shapes(name):
    """Key to shape, from the list made with LlamaGen's own code."""
    block = next(part for part in LISTED.split("\n\n") if part.startswith(name + " "))
    lines = block.splitlines()[1:]
    return {line.split(" ", 1)[0]: ast.literal_eval(line.split(" ", 1)[1]) for line in lines if line}


@pytest.fixture(scope="module")
def tiny():
    args = ModelArgs(codebook_size=64, encoder_ch_mult=[1, 2], decoder_ch_mult=[1, 2], z_channels=32)
    return fill_weights(VQModel(args), 777)


@torch.no_grad()
def test_decode_matches_llamagen(tiny):
    golden = GOLDEN["vq_tiny"]
    image = tiny.decode_code(torch.tensor([golden["codes"]], dtype=torch.int32), (1, 8, 4, 4))
    assert list(image.shape) == golden["decode_shape"]
    np.testing.assert_allclose(image[0, 0, 0, :8], golden["decode_row0_ch0_first8"], atol=2e-5)
    np.testing.assert_allclose([image.mean(), image.std()], [golden["decode_mean"], golden["decode_std"]], atol=2e-5)
    assert to_uint8(image)[0, 0, :4].tolist() == golden["u8_first_pixels"]


@torch.no_grad()
def test_encode_matches_llamagen(tiny):
    golden = GOLDEN["vq_tiny"]
    x = torch.from_numpy(np.tanh(np.random.RandomState(5).standard_normal((1, 3, 16, 16))).astype(np.float32))
    quant, losses, (_, _, indices) = tiny.encode(x)
    assert list(quant.shape) == golden["encode_quant_shape"]
    assert list(indices.shape) == golden["encode_indices_shape"]
    assert indices[:16].tolist() == golden["encode_indices_first16"]
    assert str(losses) == golden["losses_eval"]
    np.testing.assert_allclose(quant[0].flatten(1).norm(dim=0)[:4], golden["quant_norms_first4"], atol=1e-5)
    # what was encoded is what decode_code looks up
    torch.testing.assert_close(tiny.quantize.get_codebook_entry(indices, quant.shape), quant, atol=1e-6, rtol=0)
    channel_last = tiny.quantize.get_codebook_entry(indices, (1, 8, 8, 8), channel_first=False)
    torch.testing.assert_close(channel_last.permute(0, 3, 1, 2), quant, atol=1e-6, rtol=0)


@torch.no_grad()
def test_released_size_matches_llamagen():
    golden = GOLDEN["vq16_full"]
    model = fill_weights(VQ_models["VQ-16"](), 778)
    image = model.decode_code(torch.tensor(golden["codes"]), (1, 8, 2, 2))
    assert list(image.shape) == golden["shape"]
    np.testing.assert_allclose(image[0, 0, 0, :8], golden["row0_ch0_first8"], atol=2e-4)
    np.testing.assert_allclose([image.mean(), image.std()], [golden["mean"], golden["std"]], atol=1e-4)
    assert model.encode(image.tanh())[2][2].tolist() == golden["reencode_tanh_indices"]


@pytest.mark.parametrize(("name", "parameters", "keys"), [("VQ-16", 71_883_403, 344), ("VQ-8", 70_109_835, 300)])
def test_state_dict_is_llamagens(name, parameters, keys):
    with torch.device("meta"):
        model = VQ_models[name]()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == listed_shapes(name)
    assert len(shapes) == keys
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_demo_model_shapes():
    model = VQ_models["VQ-8-Demo"]().eval()
    assert model.config.downsample_size == 8
    with torch.no_grad():
        quant, _, (_, _, indices) = model.encode(torch.zeros(2, 3, 32, 48))
        assert quant.shape == (2, 8, 4, 6)
        assert indices.shape == (2 * 24,)
        assert model.decode(quant).shape == (2, 3, 32, 48)


def test_training_losses_usage_and_gradients():
    torch.manual_seed(0)
    model = VQ_models["VQ-8-Demo"](codebook_size=32, entropy_loss_ratio=0.1).train()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction, (vq, commit, entropy, usage) = model(x)
    torch.testing.assert_close(commit, 0.25 * vq)
    assert torch.isfinite(entropy)
    (reconstruction.square().mean() + vq + commit + entropy).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    indices = model.eval().encode(x)[2][2]
    assert model.quantize.codebook_used[-32:].tolist() == indices.tolist()
    # the window starts out full of zeros, so entry 0 counts as used
    assert usage == pytest.approx(len({0, *indices.tolist()}) / 32)


def test_codes_are_chosen_in_float32_under_autocast():
    torch.manual_seed(0)
    quantizer = VQ_models["VQ-8-Demo"](codebook_size=4096).quantize.train()
    z = torch.randn(4, 8, 16, 16)
    _, losses, (_, _, expected) = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        _, found_losses, (_, _, found) = quantizer(z)
    assert torch.equal(found, expected) and torch.equal(found_losses[0], losses[0])
    half, _, _ = quantizer.eval().bfloat16()(z.bfloat16())
    assert half.dtype == torch.bfloat16


def test_restart_moves_dead_entries_only():
    torch.manual_seed(0)
    model = VQ_models["VQ-8-Demo"](codebook_size=16).train()
    quantizer = model.quantize
    quantizer.codebook_used.fill_(3)
    before = quantizer.embedding.weight.detach().clone()
    z = torch.randn(1, 8, 4, 4)
    assert quantizer.restart_dead_codes(z) == 15
    after = quantizer.embedding.weight.detach()
    assert torch.equal(after[3], before[3])
    rows = torch.nn.functional.normalize(z.permute(0, 2, 3, 1).reshape(-1, 8), dim=-1)
    moved = torch.cat([after[:3], after[4:]])
    assert torch.cdist(moved, rows).min(1).values.max() < 1e-3  # each is one of the encoder's outputs
    assert torch.cdist(moved, moved).fill_diagonal_(1).min() > 1e-3  # and no two are the same

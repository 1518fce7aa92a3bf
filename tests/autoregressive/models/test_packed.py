"""Weights that lie as a CPU's kernels read them: the same products, and the same images but for rounding."""

import copy

import pytest
import torch
from torch import nn

from adsa import CacheConfig
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.packed import PackedLinear, pack, packs
from autoregressive.models.quantize import quantize
from tests.golden import fill_weights

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if packs(CPU, dtype)]
SHAPE = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 32, "vocab_size": 64, "block_size": 16, "num_classes": 5}
TEXT = {"model_type": "t2i", "caption_dim": 6, "cls_token_num": 4}


def model_of(**args) -> Transformer:
    model = Transformer(ModelArgs(**SHAPE, **args)).eval().requires_grad_(False)
    return fill_weights(model, 1)


def test_what_is_packed():
    assert not packs(torch.device("meta"), torch.float32) and not packs(CPU, torch.float64)
    if torch.backends.cpu.get_cpu_capability().startswith("AVX") and torch.backends.mkldnn.is_available():
        assert torch.float32 in DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 300])
def test_products(dtype, rows):
    given = nn.Linear(40, 30, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(40, 2, rows, generator=torch.Generator().manual_seed(1)).to(dtype).permute(1, 2, 0)
    found = PackedLinear(given)(x)
    assert found.shape == (2, rows, 30) and found.dtype == dtype
    expected = x.double() @ given.weight.double().T
    sizes = x.double().abs() @ given.weight.double().abs().T
    rounding = torch.finfo(dtype).eps / 2 * expected.abs() + 40 * torch.finfo(torch.float32).eps * sizes
    assert ((found.double() - expected).abs() <= rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("args", [{}, TEXT, {"n_kv_head": 1}])
def test_layers_of_blocks_and_head_are_packed(dtype, args):
    model = model_of(**args).to(dtype)
    packed = pack(copy.deepcopy(model))
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    found = [name for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)]
    assert found == [name for name in layers if not name.startswith("cls_embedding")] and len(found) == 11
    assert sum(weight.nbytes for weight in packed.parameters()) == sum(weight.nbytes for weight in model.parameters())

    cond = torch.tensor([1, 4]) if model.config.model_type == "c2i" else torch.randn(2, 4, 6).to(dtype)
    idx = torch.randint(64, (2, 15))
    mine, theirs = (each(idx=idx, cond_idx=cond)[0] for each in (packed, model))
    torch.testing.assert_close(mine, theirs, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


@pytest.mark.skipif(torch.float32 not in DTYPES, reason="no such kernels here")
def test_images():
    model = model_of()
    options = {"seeds": torch.arange(3), "cfg_scale": 1.5, "cache": CacheConfig("adsa", 8)}
    mine, theirs = (generate(each, torch.arange(3), 16, **options) for each in (pack(copy.deepcopy(model)), model))
    assert torch.equal(mine, theirs)


def test_integers_stay():
    quantized = quantize(model_of())
    assert [*map(type, pack(quantized).modules())] == [*map(type, quantize(model_of()).modules())]

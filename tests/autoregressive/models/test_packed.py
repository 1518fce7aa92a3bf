"""Weights that lie as a CPU's kernels read them: the same products, and the same images but for rounding."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from adsa import CacheConfig, native
from autoregressive.models import gpt
from autoregressive.models import packed as module
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.loops import _FORMATS, _OUTPUTS, Loops, loops, multiplies
from autoregressive.models.packed import BlockedBlock, BlockedLinear, PackedLinear, pack
from autoregressive.models.quantize import Int8Linear, quantize
from autoregressive.models.rope import rope_table
from tests.golden import fill_weights

DTYPES = [torch.float32, torch.bfloat16]
SHAPE = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 32, "vocab_size": 64, "block_size": 16, "num_classes": 5}
TEXT = {"model_type": "t2i", "caption_dim": 6, "cls_token_num": 4}
LAYERS = BlockedLinear, PackedLinear, Int8Linear, nn.Linear


def model_of(**args) -> Transformer:
    model = Transformer(ModelArgs(**SHAPE, **args)).eval().requires_grad_(False)
    return fill_weights(model, 1)


def layers_of(model: Transformer) -> list[type]:
    """Of the blocks and the head."""
    return [type(layer) for layer in [*model.layers.modules(), model.output] if isinstance(layer, LAYERS)]


def layer_of(dtype: torch.dtype, inputs: int, outputs: int) -> nn.Linear | Int8Linear:
    """For int8: bfloat16's, in integers."""
    linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16 if dtype == torch.int8 else dtype)
    with torch.no_grad():
        linear.weight.normal_(generator=torch.Generator().manual_seed(2))
    return Int8Linear(linear) if dtype == torch.int8 else linear.requires_grad_(False)


def narrow_loops(dtype: torch.dtype, monkeypatch) -> Loops:
    """As on a processor without AVX512."""
    with monkeypatch.context() as patched:
        patched.setattr(native, "_capability", lambda: "AVX2")
        source = Path(module.__file__).with_name("loops.cpp")
        return Loops(native.library.__wrapped__(source, FORMAT=_FORMATS[dtype], OUTPUTS=_OUTPUTS), dtype)


@pytest.fixture(params=["project's", "onednn's"])
def whose(request, monkeypatch):
    """By the project's loops where they are compiled, or without."""
    if request.param == "onednn's":
        monkeypatch.setattr(module, "multiplies", lambda dtype: None)
    elif multiplies(torch.float32) is None:
        pytest.skip("no C++ here")
    return request.param


def packs(whose: str, dtype: torch.dtype) -> bool:
    """Whether layers of floats are packed here at all."""
    return module._by_onednn(dtype) or (whose == "project's" and multiplies(dtype) is not None)


def assert_is_product(found: torch.Tensor, x: torch.Tensor, given: nn.Linear | Int8Linear, layer: nn.Module):
    """Within rounding of sums, float32, and of the result; inputs may become integers of 16 bits, or sums half wide."""
    weight, integers = given.weight.double(), isinstance(given, Int8Linear)
    if integers:
        weight *= given.scale.double()[:, None]
    expected, sizes = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    bound = torch.finfo(x.dtype).eps / 2 * expected.abs() + x.shape[-1] * torch.finfo(torch.float32).eps * sizes
    if integers and isinstance(layer, BlockedLinear):
        bound += 1.01 * x.double().abs().amax(-1, True) / 65024 * weight.abs().sum(1)
    elif integers:
        bound += 4 * torch.finfo(x.dtype).eps * sizes
    assert ((found.double() - expected).abs() <= bound).all()


def test_what_is_packed(whose):
    model = model_of()
    expected = {"project's": BlockedLinear, "onednn's": PackedLinear}[whose]
    if torch.backends.cpu.get_cpu_capability().startswith("AVX") and torch.backends.mkldnn.is_available():
        assert packs(whose, torch.float32)
    if packs(whose, torch.float32):
        assert layers_of(pack(copy.deepcopy(model))) == [expected] * 11
    assert layers_of(pack(copy.deepcopy(model).double())) == [nn.Linear] * 11
    assert layers_of(pack(quantize(copy.deepcopy(model)))) == [Int8Linear] * 11  # for bfloat16 alone
    assert layers_of(pack(Transformer(ModelArgs(**SHAPE)).to("meta"))) == [nn.Linear] * 11


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("inputs, outputs", [(40, 30), (640, 96), (33, 64)])
def test_products(dtype, rows, inputs, outputs, whose):
    given = layer_of(dtype, inputs, outputs)
    x = torch.randn(inputs, 2, rows, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
    x = x.to(torch.bfloat16 if dtype == torch.int8 else dtype)
    together = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
    there = {
        torch.float32: True,
        torch.bfloat16: not native.supports("amx_tile"),
        torch.int8: native.supports("avx512_vnni"),
    }
    layer, before = module._packed(given), x.clone()
    found = layer(x)
    assert found.shape == (2, rows, outputs) and found.dtype == x.dtype and torch.equal(x, before)
    assert_is_product(found, x, given, layer)
    assert isinstance(layer, BlockedLinear) == (whose == "project's" and there[dtype] and inputs % together[dtype] == 0)
    if isinstance(layer, BlockedLinear):
        assert layer(x[:, :0]).shape == (2, 0, outputs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_extremes(dtype):
    """Rows of zeros, of one large number among small ones, of the largest, and what is no number: in that row alone."""
    if (found := multiplies(dtype)) is None:
        pytest.skip("no such products here")
    given = layer_of(dtype, 64, 40)
    x = torch.zeros(6, 64, dtype=found.takes)
    x[1] = 1e-29
    x[2], x[2, 5] = 1e-3, 1e4
    x[3] = 1e36
    x[4, 7], x[5, 9] = float("nan"), float("inf")
    layer = BlockedLinear(given, found)
    made = layer(x)
    assert_is_product(made[:4], x[:4], given, layer)
    assert not made[0].any()
    assert made[4].isnan().all() and not made[5].isfinite().any()


@pytest.mark.skipif(native._capability() != "AVX512" or not native.wanted(), reason="these are the only vectors here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_narrower_vectors_and_fewer_instructions(dtype, rows, monkeypatch):
    """As on a processor without AVX512 and without products of bfloat16."""
    given, x = layer_of(dtype, 96, 70), torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    narrow = narrow_loops(dtype, monkeypatch)
    layer = BlockedLinear(given, narrow)
    assert_is_product(layer(x), x, given, layer)
    wide, weight, table = loops(dtype), given.weight[0], rope_table(3, 24, cls_token_num=0)[:rows]
    eps = torch.finfo(dtype).eps
    for function, arguments in {
        "rms_norm": (x, weight, 1e-5),
        "rope": (x.view(1, rows, 4, 24), table),
        "swiglu": (x, 3 * x.flip(0)),
    }.items():
        mine, theirs = (getattr(each, function)(*arguments) for each in (narrow, wide))
        torch.testing.assert_close(mine, theirs, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_threads(dtype):
    """Change nothing, and nor do rows beside a row."""
    if (found := loops(dtype)) is None:
        pytest.skip("no such loops here")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 2, 4, 64, generator=generator).to(found.takes)
    given, table = layer_of(dtype, 512, 200), rope_table(2, 64, cls_token_num=0)[:2]
    layer, rows, before = BlockedLinear(given, found), x.view(300, 512), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append([layer(rows), found.rms_norm(rows, rows[0], 1e-5), found.rope(x, table), found.swiglu(x, x)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *made))
    assert all(torch.equal(layer(rows[i : i + 1]), made[0][0][i : i + 1]) for i in (0, 7, 299))


def test_wrong_inputs():
    if (found := multiplies(torch.float32)) is None:
        pytest.skip("no C++ here")
    layer = BlockedLinear(layer_of(torch.float32, 40, 30), found)
    for x in (torch.zeros(2, 41), torch.zeros(2, 40, dtype=torch.bfloat16), torch.zeros(2, 40, device="meta")):
        with pytest.raises(ValueError, match=r"inputs must be torch.float32 \[2, 40\] on the CPU"):
            layer(x)
    with pytest.raises(ValueError, match=r"weights must be torch.float32 \[1, 40, 32, 1\]"):
        copy.deepcopy(layer).to(torch.bfloat16)(torch.zeros(2, 40))
    assert torch.equal(copy.deepcopy(layer)(torch.ones(1, 40)), layer(torch.ones(1, 40)))


@pytest.mark.parametrize("tokens", [1, 5, 90])  # 2 rows of 90: more than go from product to product together
@pytest.mark.parametrize("args", [{}, {"n_kv_head": 1}], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    "by, dtype", [*(("wide", dtype) for dtype in (*DTYPES, torch.int8)), *(("narrow", dtype) for dtype in DTYPES)]
)
def test_blocks(by, dtype, args, tokens, monkeypatch):
    """Are what their layers, norms and operations make one after the other, to the last bit."""
    if (found := multiplies(dtype)) is None:
        pytest.skip("no such products here")
    if by == "narrow":
        if native._capability() != "AVX512":
            pytest.skip("these are the only vectors here")
        found = narrow_loops(dtype, monkeypatch)
    monkeypatch.setattr(module, "multiplies", lambda of: found if of == dtype else None)
    monkeypatch.setattr(gpt, "kernels_for", lambda x: found)
    model = model_of(**args).to(found.takes)
    for name, weight in model.named_parameters():
        weight.add_(1 if "norm" in name else 0)
    block = copy.deepcopy(model.layers[1])
    joined = pack(quantize(model) if dtype == torch.int8 else model).layers[1]
    assert type(joined) is BlockedBlock
    alone = copy.deepcopy(block)
    alone.attention, alone.feed_forward = joined.attention, joined.feed_forward
    x, table = torch.randn(2, tokens, 32).to(found.takes), rope_table(10, 16, cls_token_num=0)[:tokens]
    before = x.clone()
    for mask in (None, torch.ones(tokens, tokens, dtype=torch.bool)):
        made = joined(x, table, mask)
        assert made.equal(alone(x, table, mask))
    assert x.equal(before) and made.shape == x.shape
    assert joined(x[:0], table).shape == (0, tokens, 32)
    with pytest.raises(ValueError, match=r"inputs must be"):
        joined(x.double(), table)
    with pytest.raises(ValueError, match=r"the table must be torch.float32"):
        joined(x, table.double())
    with pytest.raises(ValueError, match=r"a norm's weights must be"):
        joined.double()(x, table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("args", [{}, TEXT, {"n_kv_head": 1}])
def test_the_whole_model(dtype, args, whose):
    model = model_of(**args).to(dtype)
    packed = pack(copy.deepcopy(model))
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if packs(whose, dtype):
        found = [name for name, layer in packed.named_modules() if isinstance(layer, BlockedLinear | PackedLinear)]
        assert found == [name for name in layers if not name.startswith("cls_embedding")] and len(found) == 11
    assert sum(weight.nbytes for weight in packed.parameters()) == sum(weight.nbytes for weight in model.parameters())

    cond = torch.tensor([1, 4]) if model.config.model_type == "c2i" else torch.randn(2, 4, 6).to(dtype)
    idx = torch.randint(64, (2, 15))
    mine, theirs = (each(idx=idx, cond_idx=cond)[0] for each in (packed, model))
    torch.testing.assert_close(mine, theirs, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


def test_images(whose):
    model = model_of()
    options = {"seeds": torch.arange(3), "cfg_scale": 1.5, "cache": CacheConfig("adsa", 8)}
    mine, theirs = (generate(each, torch.arange(3), 16, **options) for each in (pack(copy.deepcopy(model)), model))
    assert torch.equal(mine, theirs)

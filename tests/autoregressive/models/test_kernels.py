"""Kernels and loops give what PyTorch's operations give: Triton's in its interpreter where there is no GPU."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from adsa import CacheConfig
from autoregressive.models import gpt
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, RMSNorm, Transformer
from autoregressive.models.loops import loops
from autoregressive.models.rope import apply_rope, rope_table
from tests.golden import fill_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON, LOOPS = "kernels", "loops"
BOTH = pytest.mark.parametrize("kernels", [TRITON, LOOPS], indirect=True)
DTYPES = pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        *((TRITON, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((LOOPS, dtype) for dtype in (torch.float32, torch.bfloat16)),
    ],
    indirect=["kernels"],
)


@pytest.fixture
def kernels(request):
    """rms_norm, rope and swiglu of either, and the device that they are for."""
    if request.param == LOOPS:
        dtype = request.node.callspec.params.get("dtype", torch.float32)
        if (found := loops(dtype)) is None:
            pytest.skip("no C++ here")
        return SimpleNamespace(
            rms_norm=found.rms_norm, rope=found.rope, swiglu=found.swiglu, device=torch.device("cpu"), exact=True
        )
    pytest.importorskip("triton", reason="Triton is for CUDA, and not on all systems that PyTorch is on")
    module = importlib.import_module("autoregressive.models.kernels")
    return SimpleNamespace(
        rms_norm=module.rms_norm, rope=module.rope, swiglu=module.swiglu, device=DEVICE, exact=DEVICE.type == "cuda"
    )


def numbers(kernels, *shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kernels.device, dtype)


def close(kernels, found, expected):
    """But for the order of sums, and one rounding after it. The interpreter cuts bfloat16 off, and doesn't round."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=2 * eps)
    if found.dtype == torch.float16 or kernels.exact:
        assert eps < 1e-4 or (found != expected).float().mean() < 0.02


@DTYPES
@pytest.mark.parametrize("dim", [16, 20, 100])
def test_rms_norm(kernels, dtype, dim):
    norm = RMSNorm(dim, 1e-5).to(kernels.device, dtype).requires_grad_(False)
    norm.weight.copy_(numbers(kernels, dim, dtype=dtype, seed=1))
    for shape in ((3, 2, dim), (5, dim)):
        x = numbers(kernels, *shape, dtype=dtype)
        x[0] *= 100
        close(kernels, kernels.rms_norm(x, norm.weight, norm.eps), norm(x))
    x = numbers(kernels, 3, 4, dim, dtype=dtype)[:, 2:]
    close(kernels, kernels.rms_norm(x, norm.weight, norm.eps), norm(x))


@DTYPES
@pytest.mark.parametrize(("heads", "dim"), [(4, 8), (3, 12), (20, 4)])
def test_rope(kernels, dtype, heads, dim):
    """Of the first heads of a projection, for tokens of the condition and of the image."""
    table = rope_table(3, dim, cls_token_num=2).to(kernels.device)
    x = numbers(kernels, 2, 11, heads + 2, dim, dtype=dtype)
    for tokens in (slice(0, 11), slice(4, 5)):
        part = x[:, tokens, :heads]
        close(kernels, kernels.rope(part, table[tokens]), apply_rope(part, table[tokens]))
    turned = x.transpose(1, 2)[:, :11]
    close(kernels, kernels.rope(turned, table[: turned.shape[1]]), apply_rope(turned, table[: turned.shape[1]]))


@DTYPES
def test_swiglu(kernels, dtype):
    both = 4 * numbers(kernels, 3, 2, 700, dtype=dtype)
    gate, up = both[..., :350], both[..., 350:]
    close(kernels, kernels.swiglu(gate, up), F.silu(gate) * up)
    large = torch.tensor([-300.0, -80, -20, 0, 20, 80, 300]).to(gate)
    close(kernels, kernels.swiglu(large, torch.ones_like(large)), F.silu(large))


@BOTH
def test_the_model_makes_the_same_tokens(kernels, monkeypatch):
    """With grouped queries and guidance."""
    args = ModelArgs(dim=32, n_layer=2, n_head=4, n_kv_head=2, block_size=16, vocab_size=24, num_classes=5)
    model = fill_weights(Transformer(args), 1).eval().to(kernels.device)
    cond, rest = torch.tensor([1, 3], device=kernels.device), {"cfg_scale": 2.0, "seeds": torch.tensor([1, 2])}
    asked = []

    def told(of):
        def kernels_for(x):
            asked.append(of)
            return of

        return kernels_for

    made = []
    for of in (None, kernels):
        monkeypatch.setattr(gpt, "kernels_for", told(of))
        made.append(generate(model, cond, 16, cache=CacheConfig("adsa", 8), **rest))
    assert made[0].equal(made[1]) and made[0].unique().numel() > 5
    assert kernels in asked and None in asked


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE.type}))
def test_training_goes_without(device):
    """They know no gradients."""
    x = torch.zeros(2, requires_grad=True, device=device)
    assert gpt.kernels_for(x) is None
    with torch.no_grad():
        assert (gpt.kernels_for(x) is None) == (device == "cpu" and loops(torch.float32) is None)
        assert gpt.kernels_for(x.double()) is None


def test_loops_refuse_what_they_cannot_read():
    if (found := loops(torch.float32)) is None:
        pytest.skip("no C++ here")
    x, table = torch.zeros(2, 3, 4, 8), rope_table(2, 8, cls_token_num=1)
    for wrong in (
        lambda: found.rms_norm(x, torch.ones(9), 1e-5),
        lambda: found.rope(x, table),
        lambda: found.rope(x.bfloat16(), table[:3]),
        lambda: found.rope(x, table[:3].double()),
        lambda: found.rope(x[..., :7], table[:3]),
        lambda: found.swiglu(x, x[..., :7]),
        lambda: found.swiglu(x, x[:1]),
        lambda: found.swiglu(x, x.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"(inputs|weights|the table) must be"):
            wrong()

"""int8 weights: what they are off by, what they weigh, and that the kernel and the definition agree."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoregressive.models import quantize as module
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.quantize import Int8Linear, quantize
from tests.golden import fill_weights

SHAPE = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 32, "vocab_size": 64, "block_size": 16, "num_classes": 5}
TEXT = {"model_type": "t2i", "caption_dim": 6, "cls_token_num": 4}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    """Rows of very different sizes, one of them of zeros, and weights as large as the scale can tell."""
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-2, 1, outputs)[:, None]
    weight[1] = 0
    made = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    made.weight.data = weight.to(dtype)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_off_by_half_a_step_at_most(dtype):
    given = linear(40, 30, dtype)
    before = given.weight.clone()
    made, again = Int8Linear(given), Int8Linear(given)
    assert (made.weight.dtype, made.scale.dtype) == (torch.int8, dtype)
    assert torch.equal(made.weight, again.weight) and torch.equal(made.scale, again.scale)
    assert torch.equal(given.weight, before)
    scale = made.scale.double()[:, None]
    off = made.weight.double() * scale - before.double()
    assert (off.abs() <= scale / 2 * (1 + 1e-6)).all()
    assert not made.weight[1].any() and (made.scale > 0).all()
    assert (made.weight.abs().amax(1).int() == 127 * (torch.arange(30) != 1)).all(), "the whole range is used"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [32, 40])  # the kernel takes the first alone
@pytest.mark.parametrize("kernel", [True, False])
def test_outputs_are_of_the_rounded_weights(dtype, inputs, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(module, "_KERNEL", False)
    given = linear(inputs, 30, dtype)
    made = Int8Linear(given)
    x = torch.randn(3, inputs, 7, generator=torch.Generator().manual_seed(1)).to(dtype).mT  # not contiguous
    found, wide = made(x).double(), x.double()
    rounded = F.linear(wide, made.weight.double() * made.scale.double()[:, None])
    assert found.shape == (3, 7, 30)
    # A product rounds each weight, each sum and the result.
    sizes = F.linear(wide.abs(), made.weight.double().abs() * made.scale.double()[:, None])
    assert ((found - rounded).abs() <= 4 * torch.finfo(dtype).eps * sizes).all()
    # And each weight is off by half a scale at most.
    bound = wide.abs().sum(-1, keepdim=True) * made.scale.double() / 2
    assert ((rounded - F.linear(wide, given.weight.double())).abs() <= bound * (1 + 1e-6)).all()


def test_the_kernel_is_used():
    """For bf16 and whole blocks of inputs alone, on processors that have it."""

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **kwargs or {})

    for dtype, inputs, expected in (
        (torch.bfloat16, 32, module._KERNEL),
        (torch.bfloat16, 40, 0),
        (torch.float32, 32, 0),
    ):
        made, seen = Int8Linear(linear(inputs, 30, dtype)), []
        with Calls():
            made(torch.ones(2, 1, inputs, dtype=dtype))
        assert seen.count(torch.ops.aten._weight_int8pack_mm.default) == expected


@pytest.mark.parametrize("text", [False, True])
def test_all_of_the_model_but_embeddings_and_norms(text):
    """It computes what the float model does on the rounded weights."""
    model = fill_weights(Transformer(ModelArgs(**SHAPE, **(TEXT if text else {}))), 1).double().requires_grad_(False)
    rounded, names = copy.deepcopy(model), []
    for name, layer in rounded.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith("cls_embedding"):
            made = Int8Linear(layer)
            layer.weight.data = made.weight * made.scale[:, None]
            names.append(name)
    assert len(names) == 2 * 5 + 1
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert quantize(model) is model
    assert [name for name, layer in model.named_modules() if isinstance(layer, Int8Linear)] == names
    for name, weight in model.named_parameters():
        if weight.dtype != torch.int8 and not name.endswith("scale"):
            assert torch.equal(weight, before[name]), name
    cond = torch.randn(3, 4, 6, dtype=torch.float64) if text else torch.tensor([0, 3, 4])
    tokens = torch.randint(64, (3, 15), generator=torch.Generator().manual_seed(0))
    found, expected = (each(idx=tokens, cond_idx=cond)[0] for each in (model, rounded))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_memory(dtype, share):
    model = Transformer(ModelArgs(**SHAPE)).to(dtype)
    linears = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    outputs = sum(len(weight) for weight in linears)
    before = sum(parameter.nbytes for parameter in model.parameters())
    quantize(model)
    saved = before - sum(parameter.nbytes for parameter in model.parameters())
    assert saved == sum(weight.nbytes for weight in linears) * (share - 1) // share - outputs * dtype.itemsize

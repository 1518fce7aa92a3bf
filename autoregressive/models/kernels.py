"""What a decode step does between its matrix products, each in one pass: Triton kernels for CUDA.

A step of few images is hundreds of small operations, and takes as long as these take to start. To import this needs
Triton; :func:`~autoregressive.models.gpt.kernels_for` does where it is of use. Results are rounded where those of
PyTorch's operations are (gpt.py, rope.py), and equal up to the last bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS, _NUMBERS = 16, 1024  # of a program


@triton.jit
def _rms_norm(x, weight, out, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * dim
    at = tl.arange(0, BLOCK)
    here = at < dim
    numbers = tl.load(x + row + at, mask=here, other=0.0)
    wide = numbers.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    scale = tl.load(weight + at, mask=here, other=0.0)
    tl.store(out + row + at, wide.to(numbers.dtype).to(tl.float32) * scale.to(tl.float32), mask=here)


@triton.jit
def _rope(x, table, out, tokens, heads, x_row, x_token, DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    row, token = at // tokens, at % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, WIDTH)
    turned = pair < DIM // 2
    here = (head < heads)[:, None] & turned[None, :]
    angle = table + token * DIM + 2 * pair
    cos, sin = tl.load(angle, mask=turned, other=0.0)[None, :], tl.load(angle + 1, mask=turned, other=0.0)[None, :]
    inside = head[:, None] * DIM + 2 * pair[None, :]
    source = x + row * x_row + token * x_token + inside
    even = tl.load(source, mask=here, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, mask=here, other=0.0).to(tl.float32)
    target = out + at * heads * DIM + inside
    tl.store(target, even * cos - odd * sin, mask=here)
    tl.store(target + 1, odd * cos + even * sin, mask=here)


@triton.jit
def _swiglu(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    x = tl.load(gate + at, mask=here, other=0.0)
    wide = x.to(tl.float32)
    wide = wide / (1 + tl.exp(-wide))
    y = tl.load(up + at, mask=here, other=0.0)
    tl.store(out + at, wide.to(x.dtype).to(tl.float32) * y.to(tl.float32), mask=here)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As :class:`~autoregressive.models.gpt.RMSNorm`. ``x``: ``[..., dim]``; ``weight``: ``[dim]``, of its dtype."""
    x, dim = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _rms_norm[(x.numel() // dim,)](x, weight, out, dim, eps, BLOCK=triton.next_power_of_2(dim))
    return out


def rope(x: Tensor, table: Tensor) -> Tensor:
    """As :func:`~autoregressive.models.rope.apply_rope`. ``x``: ``[B, S, H, D]``, heads without gaps between them."""
    batch, tokens, heads, dim = x.shape
    if x.stride()[2:] != (dim, 1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _rope[batch * tokens, triton.cdiv(heads, _HEADS)](
            x,
            table.contiguous(),
            out,
            tokens,
            heads,
            x.stride(0),
            x.stride(1),
            DIM=dim,
            WIDTH=triton.next_power_of_2(dim // 2),
            HEADS=_HEADS,
        )
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _swiglu[(triton.cdiv(gate.numel(), _NUMBERS),)](gate, up, out, gate.numel(), BLOCK=_NUMBERS)
    return out

"""A CPU's loops for a step of decoding, in C++ (loops.cpp): linear layers, and what a block does between them.

A step has few rows and waits for the weights, which come out of memory at its full speed when they are read in order. A
library's kernels, which are for many rows, take up to twice as long; and PyTorch's operations on a few thousand numbers
take as long as it takes to start them. Results are rounded where theirs are, and equal up to the order of sums.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from adsa import native

Weights = tuple[Tensor, Tensor | None]  # blocks, and scales of integers

_OUTPUTS = 32  # of a block
_FORMATS = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.int8: "Int8"}
# What the functions of loops.cpp take, see :func:`adsa.native.functions`.
_ARGUMENTS = {
    "multiply": "ppppiii",
    "rms_norm": "pppiif",
    "rope": "pppiiiiii",
    "swiglu": "pppi",
    "before_attention": "pp pp pp iiiiii f",
    "after_attention": "ppp p p pp pp pp p iii f",
}


class Loops:
    """The loops for weights of one dtype: float32 or bfloat16, with inputs of that dtype; or int8, with bfloat16.

    All tensors are a CPU's. Sums are float32. With int8 they are exact, and a row's inputs are rounded to multiples of
    its largest / 32512; a row whose largest is below 1e-30 counts as zeros.

    Args:
        library: loops.cpp.
        dtype: of the weights.

    Attributes:
        takes: the inputs' dtype, and the outputs'.
        dtype: of the weights.
        together: inputs of a product that lie side by side; all are a multiple of them.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self.dtype = dtype
        self.takes = torch.bfloat16 if dtype == torch.int8 else dtype
        self.together = 4 // dtype.itemsize
        for name, function in native.functions(library, _ARGUMENTS).items():
            setattr(self, f"_{name}", function)

    def __reduce__(self):
        return loops, (self.dtype,)  # of a layer that is copied or pickled

    def blocks(self, weight: Tensor) -> Tensor:
        """Weights as :meth:`multiply` takes them.

        Args:
            weight: ``[out, in]``.

        Returns:
            ``[out / 32, in / n, 32, n]`` with n numbers of 4 bytes in all; outputs are filled up with zeros.
        """
        filled = F.pad(weight, (0, 0, 0, -len(weight) % _OUTPUTS))
        blocks = filled.unflatten(0, (-1, _OUTPUTS)).unflatten(2, (-1, self.together)).transpose(1, 2)
        if weight.dtype == torch.int8:
            return (blocks.to(torch.int16) + 128).to(torch.uint8).contiguous()
        return blocks.contiguous()

    def multiply(self, x: Tensor, blocks: Tensor, outputs: int, scale: Tensor | None = None) -> Tensor:
        """``[..., in]``, and :meth:`blocks` of weights -> ``[..., out]``, times ``scale``, float32 ``[out]``."""
        inputs = blocks.shape[1] * self.together
        native.check("inputs", x, (*x.shape[:-1], inputs), self.takes)
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs)
        self._multiply(
            x.data_ptr(), *self._weights((blocks, scale), inputs, outputs), out.data_ptr(), x.numel() // inputs,
            inputs, outputs,
        )  # fmt: skip
        return out

    def _weights(self, weights: Weights, inputs: int, outputs: int) -> tuple[int, int | None]:
        """Where they lie, and their scales."""
        blocks, scale = weights
        if inputs % self.together:
            raise ValueError(f"inputs must be a multiple of {self.together} of {self.dtype}, not {inputs}")
        stored = torch.uint8 if self.dtype == torch.int8 else self.dtype
        shape = (-(-outputs // _OUTPUTS), inputs // self.together, _OUTPUTS, self.together)
        native.check("weights", blocks, shape, stored)
        if scale is None:
            return blocks.data_ptr(), None
        native.check("scales", scale, (outputs,), torch.float32)
        return blocks.data_ptr(), scale.data_ptr()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As :class:`~autoregressive.models.gpt.RMSNorm`. ``x``: ``[..., dim]``; ``weight``: ``[dim]``, alike."""
        native.check("inputs", x, x.shape, self.takes)
        native.check("weights", weight, x.shape[-1:], self.takes)
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], eps
        )  # fmt: skip
        return out

    def rope(self, x: Tensor, table: Tensor) -> Tensor:
        """As :func:`~autoregressive.models.rope.apply_rope`. ``x``: ``[B, S, H, D]``; ``table``: float32."""
        batch, tokens, heads, dim = x.shape
        native.check("inputs", x, (batch, tokens, heads, dim // 2 * 2), self.takes)
        native.check("the table", table, (tokens, dim // 2, 2), torch.float32)
        if x.stride()[2:] != (dim, 1):
            x = x.contiguous()
        table, out = table.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        self._rope(
            x.data_ptr(), table.data_ptr(), out.data_ptr(), batch, tokens, heads, dim, x.stride(0), x.stride(1)
        )  # fmt: skip
        return out

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``, of one shape."""
        for x in (gate, up):
            native.check("inputs", x, gate.shape, self.takes)
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        self._swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel())
        return out

    def before_attention(
        self, x: Tensor, norm: Tensor, eps: float, weights: Weights, table: Tensor, heads: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a :class:`~autoregressive.models.gpt.TransformerBlock`: norm, queries, keys and values, RoPE.

        Args:
            x: ``[B, S, dim]``.
            norm: its weights, ``[dim]``.
            eps: the norm's.
            weights: of ``wqkv``.
            table: float32 ``[S, D / 2, 2]``.
            heads: of queries, of keys, and of values.

        Returns:
            ``[B, S, heads, D]`` each.
        """
        (batch, tokens, dim), head_dim = x.shape, 2 * table.shape[1]
        native.check("inputs", x, (batch, tokens, dim), self.takes)
        native.check("the table", table, (tokens, head_dim // 2, 2), torch.float32)
        native.check("a norm's weights", norm, (dim,), self.takes)
        x, norm, table, outputs = x.contiguous(), norm.contiguous(), table.contiguous(), sum(heads) * head_dim
        qkv = x.new_empty(batch, tokens, sum(heads), head_dim)
        self._before_attention(
            x.data_ptr(), norm.data_ptr(), *self._weights(weights, dim, outputs), table.data_ptr(), qkv.data_ptr(),
            batch, tokens, dim, outputs, sum(heads[:2]) * head_dim, head_dim, eps,
        )  # fmt: skip
        return qkv.split(heads, dim=2)

    def after_attention(
        self, x: Tensor, attended: Tensor, wo: Weights, norm: Tensor, eps: float, ffn: Sequence[Weights], hidden: int
    ) -> Tensor:
        """Of a :class:`~autoregressive.models.gpt.TransformerBlock`: all that follows.

        Args:
            x: what came into the block, ``[B, S, dim]``.
            attended: what attention made of values, ``[B, S, dim]``.
            wo: its weights.
            norm: weights of the FFN's, ``[dim]``.
            eps: the norm's.
            ffn: weights of ``w1``, ``w3`` and ``w2``.
            hidden: outputs of the first two.

        Returns:
            ``[B, S, dim]``.
        """
        dim = x.shape[-1]
        for given in (x, attended):
            native.check("inputs", given, x.shape, self.takes)
        native.check("a norm's weights", norm, (dim,), self.takes)
        x, attended, norm = x.contiguous(), attended.contiguous(), norm.contiguous()
        out = torch.empty_like(x)
        w1, w3, w2 = ffn
        self._after_attention(
            x.data_ptr(), attended.data_ptr(), *self._weights(wo, dim, dim), norm.data_ptr(),
            *self._weights(w1, dim, hidden), *self._weights(w3, dim, hidden), *self._weights(w2, hidden, dim),
            out.data_ptr(), x.numel() // dim, dim, hidden, eps,
        )  # fmt: skip
        return out


@functools.cache
def loops(dtype: torch.dtype) -> Loops | None:
    """Those for weights of this dtype, or None where there are none. Found out once."""
    if dtype not in _FORMATS or not native.wanted() or (dtype == torch.int8 and not native.supports("avx512_vnni")):
        return None
    library = native.library(Path(__file__).with_suffix(".cpp"), FORMAT=_FORMATS[dtype], OUTPUTS=_OUTPUTS)
    return None if library is None else Loops(library, dtype)


def multiplies(dtype: torch.dtype) -> Loops | None:
    """Those for weights of this dtype, unless a library's products are faster: by AMX, of bfloat16."""
    return None if dtype == torch.bfloat16 and native.supports("amx_tile") else loops(dtype)

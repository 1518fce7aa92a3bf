"""A CPU's loops for a step of decoding, in C++ (loops.cpp): linear layers, and what a block does between them.

A step has few rows and waits for the weights, which come out of memory at its full speed when they are read in order. A
library's kernels, which are for many rows, take up to twice as long; and PyTorch's operations on a few thousand numbers
take as long as it takes to start them. Results are rounded where theirs are, and equal up to the order of sums.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from adsa import native

_OUTPUTS = 32  # of a block
_FORMATS = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.int8: "Int8"}
# What the functions of loops.cpp take: pointers, integers, floats.
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_ARGUMENTS = {"multiply": "ppppiii", "rms_norm": "pppiif", "rope": "pppiiiiii", "swiglu": "pppi"}


class Loops:
    """The loops for weights of one dtype: float32 or bfloat16, with inputs of that dtype; or int8, with bfloat16.

    All tensors are a CPU's. Sums are float32. With int8 they are exact, and a row's inputs are rounded to multiples of
    its largest / 32512.

    Args:
        library: loops.cpp.
        dtype: of the weights.

    Attributes:
        takes: the inputs' dtype, and the outputs'.
        together: inputs of a product that lie side by side; all are a multiple of them.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self._made_of = dtype
        self.takes = torch.bfloat16 if dtype == torch.int8 else dtype
        self.together = 4 // dtype.itemsize
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = None, [_KINDS[kind] for kind in arguments]
            setattr(self, f"_{name}", function)

    def __reduce__(self):
        return loops, (self._made_of,)  # of a layer that is copied or pickled

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
        self._check(x, inputs)
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs)
        scales = None if scale is None else scale.data_ptr()
        self._multiply(
            x.data_ptr(), blocks.data_ptr(), scales, out.data_ptr(), x.numel() // inputs, inputs, outputs
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As :class:`~autoregressive.models.gpt.RMSNorm`. ``x``: ``[..., dim]``; ``weight``: ``[dim]``, alike."""
        self._check(x, len(weight))
        x = x.contiguous()
        out = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], eps
        )  # fmt: skip
        return out

    def rope(self, x: Tensor, table: Tensor) -> Tensor:
        """As :func:`~autoregressive.models.rope.apply_rope`. ``x``: ``[B, S, H, D]``; ``table``: float32."""
        batch, tokens, heads, dim = x.shape
        self._check(x, dim)
        if table.shape != (tokens, dim // 2, 2):
            raise ValueError(f"a table of [{tokens}, {dim // 2}, 2] is for this, not {[*table.shape]}")
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
            self._check(x, gate.shape[-1])
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        self._swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel())
        return out

    def _check(self, x: Tensor, last: int) -> None:
        """Raises ValueError for what C++ would read past its end, or as other numbers."""
        if x.dtype != self.takes or not x.is_cpu or x.shape[-1] != last:
            raise ValueError(
                f"inputs must be {self.takes} [..., {last}] on the CPU, not {x.dtype} {[*x.shape]} on {x.device}"
            )


@functools.cache
def loops(dtype: torch.dtype) -> Loops | None:
    """Those for weights of this dtype, or None where there are none. Found out once."""
    if dtype not in _FORMATS or not native.wanted() or (dtype == torch.int8 and not native.supports("avx512_vnni")):
        return None
    library = native.library(Path(__file__).with_suffix(".cpp"), FORMAT=_FORMATS[dtype])
    return None if library is None else Loops(library, dtype)


def multiplies(dtype: torch.dtype) -> Loops | None:
    """Those for weights of this dtype, unless a library's products are faster."""
    return None if dtype != torch.float32 and native.supports("amx_tile") else loops(dtype)

"""A CPU's products of few rows with a linear layer's weights, in C++ (products.cpp).

A step of decoding has few rows and waits for the weights, which come out of memory at its full speed when they are read
in order. A library's kernels, which are for many rows, take up to twice as long.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from adsa import native

_OUTPUTS = 32  # of a block
_NAMES = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.int8: "Int8"}


class Products:
    """Products with weights of one dtype: float32 or bfloat16, of inputs of that dtype; or int8, of bfloat16.

    Sums are float32. With int8, a row's inputs are rounded to multiples of its largest / 32512, and sums are exact.

    Args:
        library: products.cpp.
        dtype: of the weights.

    Attributes:
        takes: the inputs' dtype, and the outputs'.
        together: inputs that lie side by side; all are a multiple of them.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self._made_of = dtype
        self.takes = torch.bfloat16 if dtype == torch.int8 else dtype
        self.together = 4 // dtype.itemsize
        self._multiply = library.multiply
        self._multiply.restype = None
        self._multiply.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3

    def __reduce__(self):
        return _compiled, (self._made_of,)  # of a layer that is copied or pickled

    def blocks(self, weight: Tensor) -> Tensor | None:
        """Weights as they are to lie.

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

    def __call__(self, x: Tensor, blocks: Tensor, outputs: int, scale: Tensor | None = None) -> Tensor:
        """``[..., in]`` on the CPU, and :meth:`blocks` -> ``[..., out]``, times ``scale``, float32 ``[out]``."""
        inputs = blocks.shape[1] * self.together
        if x.dtype != self.takes or not x.is_cpu or x.shape[-1] != inputs:
            raise ValueError(
                f"inputs must be {self.takes} [..., {inputs}] on the CPU, not {x.dtype} {[*x.shape]} on {x.device}"
            )
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs)
        scales = None if scale is None else scale.data_ptr()
        self._multiply(
            x.data_ptr(), blocks.data_ptr(), scales, out.data_ptr(), x.numel() // inputs, inputs, outputs
        )  # fmt: skip
        return out


def products(dtype: torch.dtype) -> Products | None:
    """Those with weights of this dtype, or None where there are none, or a library's are faster."""
    if dtype not in _NAMES or not native.wanted():
        return None
    if dtype != torch.float32 and native.supports("amx_tile"):  # a library's products use that
        return None
    if dtype == torch.int8 and not native.supports("avx512_vnni"):
        return None
    return _compiled(dtype)


@functools.cache
def _compiled(dtype: torch.dtype) -> Products | None:
    library = native.library(Path(__file__).with_suffix(".cpp"), FORMAT=_NAMES[dtype])
    return None if library is None else Products(library, dtype)

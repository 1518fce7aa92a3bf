"""int8 weights: half of bf16's memory. A step of few rows waits for the weights, so that it is faster on a CPU.

:func:`~autoregressive.models.packed.pack` puts the project's own products in their place, where there are any: for
these, activations are rounded to 16 bits.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.gpt import Transformer

# PyTorch multiplies bf16 by int8 in vector instructions here. Elsewhere its operator is a plain loop, or missing.
_KERNEL = sys.platform != "win32" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


class Int8Linear(nn.Module):
    """A linear layer without bias, with weights of int8 and one scale for each output; activations are as they were.

    The scale is a row's largest absolute weight / 127, rounded to the layer's own dtype. A weight becomes the nearest
    multiple of it, and is off by half of it at most.

    Args:
        linear: whose weights are taken. It stays as it is.

    Attributes:
        weight: int8 ``[out, in]``, from -127 to 127.
        scale: ``[out]``.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        assert linear.bias is None
        dtype = linear.weight.dtype
        wide = linear.weight.detach().to(torch.promote_types(dtype, torch.float32))
        scale = (wide.abs().amax(1) / 127).to(dtype).clamp(min=torch.finfo(dtype).tiny)  # a row may be all zeros
        steps = (wide / scale.to(wide.dtype)[:, None]).round().clamp(-127, 127)
        self.weight = nn.Parameter(steps.to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` of the scale's dtype -> ``[..., out]``. Without the kernel, weights are unpacked first."""
        # The kernel reads 16 inputs at a time: rows of another length are read past their ends, and not aligned.
        if _KERNEL and x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-1] % 16 == 0:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight.to(x.dtype) * self.scale[:, None])


def quantize(model: Transformer) -> Transformer:
    """Put an :class:`Int8Linear` in place of every linear layer of the blocks, and of the head.

    Embeddings, text projection and norms stay. The same weights always make the same integers.

    Args:
        model: with its weights loaded; changed in place. It can't be trained or saved as a checkpoint from then on.

    Returns:
        The same model.
    """
    return replace_linear_layers(model, lambda layer: layer if isinstance(layer, Int8Linear) else Int8Linear(layer))


def replace_linear_layers(model: Transformer, make: Callable[[nn.Linear | Int8Linear], nn.Module]) -> Transformer:
    """Put what ``make`` makes of a linear layer in its place, in the blocks and for the head; the same model."""
    for parent in [model, *model.layers.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Int8Linear):
                setattr(parent, name, make(child))
    return model

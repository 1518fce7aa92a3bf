"""Weights in the order in which a CPU's kernels read them: they are laid out once, and not again in every step."""

import torch
from torch import Tensor, nn

from autoregressive.models.gpt import Transformer
from autoregressive.models.loops import Loops, multiplies
from autoregressive.models.quantize import Int8Linear, replace_linear_layers


class BlockedLinear(nn.Module):
    """A linear layer without bias for inference on a CPU, by the project's own loops.

    Args:
        layer: whose weights are taken. It stays as it is.
        loops: for weights of that dtype.

    Attributes:
        weight: blocks of 32 outputs, see :meth:`Loops.blocks`.
        scale: float32 ``[out]`` of integers, else None.
    """

    def __init__(self, layer: nn.Linear | Int8Linear, loops: Loops):
        super().__init__()
        self.loops, self.outputs = loops, len(layer.weight)
        self.weight = nn.Parameter(loops.blocks(layer.weight.detach()), requires_grad=False)
        scale = layer.scale.detach().float() if isinstance(layer, Int8Linear) else None
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` of the layer's dtype -> ``[..., out]``."""
        return self.loops.multiply(x, self.weight, self.outputs, self.scale)


class PackedLinear(nn.Module):
    """A linear layer without bias for inference on a CPU, by oneDNN: the same product, its sums in another order.

    Args:
        linear: whose weights are taken. It stays as it is.

    Attributes:
        weight: ``[out, in]``, opaque to all but oneDNN.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        # 64 is a guess at the rows of a step, which decides the order; 1 to 2048 rows take as long by any guess.
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 64)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` of the weight's dtype -> ``[..., out]``."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def pack(model: Transformer) -> Transformer:
    """Put what multiplies fastest in place of every linear layer of the blocks, and of the head, integers or not.

    Args:
        model: with its weights loaded; changed in place. On a CPU it can't be trained, saved, moved or cast from then
            on, nor its ``forward`` compiled. Elsewhere, and where there is nothing faster, layers stay as they are.

    Returns:
        The same model.
    """
    return replace_linear_layers(model, _packed)


def _packed(layer: nn.Linear | Int8Linear) -> nn.Module:
    weight, integers = layer.weight, isinstance(layer, Int8Linear)
    if not weight.is_cpu or getattr(layer, "bias", None) is not None:
        return layer
    loops, of = multiplies(weight.dtype), layer.scale.dtype if integers else weight.dtype
    if loops is not None and of == loops.takes and weight.shape[1] % loops.together == 0:
        return BlockedLinear(layer, loops)
    return PackedLinear(layer) if not integers and _by_onednn(weight.dtype) else layer


def _by_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
